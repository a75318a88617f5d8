"""Llama 3 in plain PyTorch. Modules and parameters have the names of Hugging Face's Llama.

A. Grattafiori et al., "The Llama 3 Herd of Models", 2024, section 3.2.
"""

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import nn

from real_world.llama.config import LinearRopeScaling, LlamaConfig

# %% Rotary position embedding (J. Su et al., "RoFormer", 2021, section 3.2.2)


def rope_inv_freq(config: LlamaConfig, device: torch.device) -> torch.Tensor:
    """Return the angle by which each pair of features rotates per position, (head_dim / 2,).

    Linear scaling divides all by `factor`. With Llama 3.1's scaling, low frequencies are divided by
    `factor`, high ones are unchanged, and those between are interpolated.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    inv_freq = 1.0 / config.rope_theta ** (exponents / config.head_dim)  # (head_dim / 2,)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    if isinstance(scaling, LinearRopeScaling):
        return inv_freq / scaling.factor
    rotations = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((rotations - low) / (high - low)).clamp(0, 1)  # 0 for low frequencies, 1 for high
    return smooth * inv_freq + (1 - smooth) * inv_freq / scaling.factor


def rope_cos_sin(
    inv_freq: torch.Tensor, positions: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of the angles at positions, (length,), both (length, head_dim).

    They have the dtype of `like`, and are converted last: bfloat16 has no large positions.
    """
    angles = torch.outer(positions.float(), inv_freq)  # (length, head_dim / 2)
    angles = angles.repeat(1, 2)  # (length, head_dim): the same for both features of a pair
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def apply_rotary_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + head_dim / 2]) of x, (batch, heads, length, head_dim)."""
    x1, x2 = x.chunk(2, dim=-1)  # (batch, heads, length, head_dim / 2) each
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin  # (batch, heads, length, head_dim)


# %% The model


def make_attn_mask(attention_mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return a mask, True where a token attends to a key: (batch, 1, length, total) bool.

    Positions need no correction for padding on the left: with RoPE, attention depends on the
    distance of two tokens only. Padding attends to itself: a softmax over nothing would be NaN.

    Args:
        attention_mask: (batch, total) bool, False for padding.
        positions: (length,) int64 of the new tokens, which attend to no later position.
    """
    keys = torch.arange(attention_mask.shape[1], device=positions.device)  # (total,)
    causal = keys <= positions[:, None]  # (length, total)
    own = keys == positions[:, None]  # (length, total)
    return causal & attention_mask[:, None, None, :] | own  # (batch, 1, length, total)


class KVCache(nn.Module):
    """The keys and values of one layer, with room for max_length tokens.

    Its shape never changes, and its tensors are buffers, so that a decoding step can be compiled
    once, and be a CUDA graph.
    """

    k_cache: torch.Tensor  # (batch, kv_heads, max_length, head_dim)
    v_cache: torch.Tensor  # (batch, kv_heads, max_length, head_dim)

    def __init__(
        self, config: LlamaConfig, batch_size: int, max_length: int, like: torch.Tensor
    ) -> None:
        super().__init__()
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        # Uninitialized: the system assigns memory only when tokens are written.
        self.register_buffer("k_cache", like.new_empty(shape))
        self.register_buffer("v_cache", like.new_empty(shape))

    def update(self, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store the keys and values of the tokens at positions, (length,) int64."""
        self.k_cache.index_copy_(2, positions, k)
        self.v_cache.index_copy_(2, positions, v)

    def reset(self) -> None:
        """Set all keys and values to zero, so that those that are not written yet are finite."""
        self.k_cache.zero_()
        self.v_cache.zero_()


class Attention(nn.Module):
    """Causal grouped-query attention: several query heads share one key and one value head.

    J. Ainslie et al., "GQA", 2023. The KV cache holds only key and value heads, so fewer of them
    make it smaller.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        assert config.num_attention_heads % config.num_key_value_heads == 0
        self.head_dim = config.head_dim
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: KVCache | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return (batch, length, hidden_size): every token attends to itself and earlier ones."""
        batch, length, _ = x.shape  # (batch, length, hidden_size)
        heads = (batch, length, -1, self.head_dim)
        q = self.q_proj(x).view(heads).transpose(1, 2)  # (batch, heads, length, head_dim)
        k = self.k_proj(x).view(heads).transpose(1, 2)  # (batch, kv_heads, length, head_dim)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (batch, kv_heads, length, head_dim)
        q = apply_rotary_emb(q, cos, sin)
        k = apply_rotary_emb(k, cos, sin)
        if cache is not None:
            cache.update(positions, k, v)
            if attn_mask is not None:  # otherwise, there are no earlier tokens
                total = attn_mask.shape[-1]
                k = cache.k_cache[:, :, :total]  # (batch, kv_heads, total, head_dim)
                v = cache.v_cache[:, :, :total]  # (batch, kv_heads, total, head_dim)
        if length == 1:  # the heads of a group become queries of one head: each key is read once
            q = q.view(batch, k.shape[1], -1, self.head_dim)  # (batch, kv_heads, group, head_dim)
        is_causal = attn_mask is None and length > 1
        attn_out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask, is_causal=is_causal, enable_gqa=length > 1
        )  # as q
        attn_out = attn_out.reshape(batch, -1, length, self.head_dim)  # (batch, heads, length, ...)
        attn_out = attn_out.transpose(1, 2).flatten(2)  # (batch, length, heads * head_dim)
        return self.o_proj(attn_out)  # (batch, length, hidden_size)


class MLP(nn.Module):
    """SwiGLU (N. Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, length, hidden_size), as x."""
        gate = nn.functional.silu(self.gate_proj(x))  # (batch, length, intermediate_size)
        return self.down_proj(gate * self.up_proj(x))  # (batch, length, hidden_size)


class DecoderLayer(nn.Module):
    """Attention, then the MLP, each on its normalized input and with a residual connection."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: KVCache | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return (batch, length, hidden_size), as x."""
        x = x + self.self_attn(self.input_layernorm(x), positions, cos, sin, cache, attn_mask)
        return x + self.mlp(self.post_attention_layernorm(x))  # (batch, length, hidden_size)


class Decoder(nn.Module):
    """The decoder stack, without lm_head: Hugging Face's LlamaModel."""

    inv_freq: torch.Tensor  # of the rotary embedding, (head_dim / 2,) float32

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        # On the CPU even if the parameters are on the meta device: it is not in a checkpoint.
        inv_freq = rope_inv_freq(config, torch.device("cpu"))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move to a device or convert to a dtype; the frequencies stay in float32."""
        inv_freq = self.inv_freq
        super()._apply(fn, recurse)
        self.inv_freq = inv_freq.to(self.inv_freq.device)
        return self

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the normalized output of the last layer, (batch, length, hidden_size)."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)  # (length,)
        else:
            assert attention_mask is not None, "it says how many tokens of the caches there are"
        x = self.embed_tokens(tokens)  # (batch, length, hidden_size)
        cos, sin = rope_cos_sin(self.inv_freq, positions, like=x)
        attn_mask = None if attention_mask is None else make_attn_mask(attention_mask, positions)
        for index, layer in enumerate(self.layers):
            x = layer(x, positions, cos, sin, caches[index] if caches else None, attn_mask)
        return self.norm(x)  # (batch, length, hidden_size)


class Llama(nn.Module):
    """Llama with its language modeling head: Hugging Face's LlamaForCausalLM."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def tie_weights(self) -> None:
        """Let lm_head share the weights of the embedding, if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits of the token after each token.

        Args:
            tokens: (batch, length) int64.
            positions: (length,) int64 of the tokens. None: they are the first ones.
            caches: a KVCache per layer, with the tokens before `positions`; these are added. None:
                `tokens` is the whole sequence.
            attention_mask: (batch, total) bool, False for padding. Required with positions: tokens
                attend to the first `total` of the caches, up to their own. None: no padding.

        Returns:
            Logits, (batch, length, vocab_size).
        """
        x = self.model(tokens, positions, caches, attention_mask)  # (batch, length, hidden_size)
        return self.lm_head(x)  # (batch, length, vocab_size)
