"""The decoder of Llama 3 in plain torch, with Hugging Face's names."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import msgspec
import torch
from torch import nn
from torch.nn import functional

from real_world import write_tensors, write_whole
from real_world.llama.sizes import LlamaConfig
from real_world.llama.weights import read_config, refuse, stored_tensors

# %% Where a token stands: the rotary embedding


Rotation = tuple[torch.Tensor, torch.Tensor]
"""The cosines and the sines of the angles, each (length, head_size)."""


@functools.lru_cache(maxsize=8)
def frequencies(config: LlamaConfig, device: torch.device) -> torch.Tensor:
    """Return by how much each pair of a head's numbers turns at every token, (head_size / 2,).

    J. Su et al., "RoFormer", 2021, section 3.2.2; the scaling is that of Llama 3.1: what turns more
    than high_freq_factor times in the original context stays, what turns fewer than low_freq_factor
    times is slowed down by `factor`, and in between the two blend.
    """
    pairs = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=device)
    turns = 1.0 / config.rope_theta ** (pairs / config.head_size)
    if (scaling := config.rope_scaling) is None:
        return turns
    in_context = scaling.original_max_position_embeddings * turns / (2 * math.pi)
    between = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((in_context - scaling.low_freq_factor) / between).clamp(0, 1)
    return kept * turns + (1 - kept) * turns / scaling.factor


def rotation(config: LlamaConfig, start: int, length: int, like: torch.Tensor) -> Rotation:
    """Return the rotation of the tokens from `start` on, of the device and dtype of `like`."""
    positions = torch.arange(start, start + length, dtype=torch.float32, device=like.device)
    angles = torch.outer(positions, frequencies(config, like.device)).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Turn the pairs (x[i], x[i + head_size / 2]) of `x`, (batch, heads, length, head_size)."""
    cosines, sines = by
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


# %% The decoder


class Cache:
    """The keys and values of one layer for the tokens so far, so that they are computed once."""

    def __init__(self, config: LlamaConfig, batch: int, limit: int, like: torch.Tensor) -> None:
        shape = (2, batch, config.num_key_value_heads, limit, config.head_size)
        self.kept = like.new_empty(shape)
        self.length = 0

    def extend(self, *new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys and values of new tokens; return those of all."""
        start, self.length = self.length, self.length + new[0].shape[2]
        for kept, added in zip(self.kept, new, strict=True):
            kept[:, :, start : self.length] = added
        keys, values = self.kept[:, :, :, : self.length]
        return keys, values


class Attention(nn.Module):
    """Grouped-query attention: several heads of queries share one of keys and values.

    J. Ainslie et al., "GQA", 2023. What it saves is the cache, which has only the latter.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        queries = config.num_attention_heads * self.head_size
        shared = config.num_key_value_heads * self.head_size
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, by: Rotation, cache: Cache | None = None) -> torch.Tensor:
        """Let every token of `x`, (batch, length, hidden_size), look at itself and those before."""
        batch, length, _ = x.shape
        queries, keys, values = (
            project(x).view(batch, length, -1, self.head_size).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = rotate(queries, by), rotate(keys, by)
        if cache is not None:
            keys, values = cache.extend(keys, values)
        causal = length > 1  # one token alone, the newest, may look at all there are
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=causal, enable_gqa=True
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU, a two-layer network with a gate (N. Shazeer, "GLU Variants", 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, length, hidden_size) for `x` of the same shape."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention, then the MLP; each reads its normalized input and adds to it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, by: Rotation, cache: Cache | None = None) -> torch.Tensor:
        """Return (batch, length, hidden_size) for `x` of the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), by, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """From tokens to what the last layer makes of them: all of Llama but its output."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: torch.Tensor, caches: list[Cache] | None = None) -> torch.Tensor:
        """Return (batch, length, hidden_size) for `tokens`, (batch, length) int64."""
        start = caches[0].length if caches else 0
        if start and tokens.shape[1] > 1:
            raise ValueError("after the prompt, tokens come one at a time")
        x = self.embed_tokens(tokens)
        by = rotation(self.config, start, tokens.shape[1], like=x)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x = layer(x, by, cache)
        return self.norm(x)


class Llama(nn.Module):
    """Llama 3: tokens, (batch, length) int64, in; logits of the next, (..., vocab_size), out."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    @property
    def config(self) -> LlamaConfig:
        """The sizes of this network."""
        return self.model.config

    def tie(self) -> None:
        """Make the output's matrix the embedding's, where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: torch.Tensor, caches: list[Cache] | None = None) -> torch.Tensor:
        """Return the logits of the token after each of `tokens`.

        With `caches`, `tokens` are those after the ones that the caches hold: a whole prompt into
        empty caches, then one token at a time; ValueError where it is more.
        """
        return self.lm_head(self.model(tokens, caches))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which Hugging Face reads; each whole or not."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict()
        if self.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        about = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        about |= {"bos_token_id": None} | msgspec.to_builtins(self.config)
        write_tensors(folder / "model.safetensors", weights)
        content = json.dumps(about, indent=2) + "\n"
        write_whole(folder / "config.json", lambda path: path.write_text(content))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Llama:
        """Read a Llama from a folder as Hugging Face writes it, in its file's dtype or `dtype`.

        The weights are read tensor by tensor into an empty network; on a CPU they stay in the file,
        which the system maps into memory. Raises CheckpointError where the folder holds something
        else, or not all of it; nothing in it is ever run.
        """
        folder = Path(folder)
        with torch.device("meta"):  # shapes alone
            model = cls(read_config(folder / "config.json"))
        expected = {name: weights.shape for name, weights in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del expected["lm_head.weight"]
        weights = {}
        for path, name, tensor in stored_tensors(folder, device):
            repeated = name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")
            if repeated and name not in expected:
                continue  # older files have what follows from the others
            if name not in expected:
                refuse(path, f"holds {name}, which a Llama of this config.json does not have")
            if name in weights:
                refuse(path, f"holds {name}, which another file holds too")
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                kind = str(tensor.dtype).removeprefix("torch.")
                refuse(path, f"holds {name} in {kind}; float32, float16 and bfloat16 are read")
            if tensor.shape != expected[name]:
                wanted = f"{tuple(expected[name])} by config.json"
                refuse(path, f"holds {name} as {tuple(tensor.shape)}, which is {wanted}")
            weights[name] = tensor.to(dtype or tensor.dtype)
        if missing := expected.keys() - weights.keys():
            refuse(folder, f"lacks {len(missing)} tensors of its config.json: {min(missing)}, ...")
        kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})
        if len(kinds) > 1:
            refuse(folder, f"mixes {' and '.join(kinds)}; name the dtype to load it in")
        model.load_state_dict(weights, strict=False, assign=True)  # tied, one is not there
        model.tie()
        return model
