"""Attention with one linear layer per projection, which LoRA can adapt.

nn.MultiheadAttention has parameters instead, and those of queries, keys and values may be one
matrix. The names to_q, to_k, to_v and to_out follow diffusers.
"""

import torch
from torch import nn


def make_linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """Return a linear layer with a copy of a weight and a bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear


class Attention(nn.Module):
    """A batch_first nn.MultiheadAttention, without dropout, with its weights in linear layers."""

    def __init__(self, attn: nn.MultiheadAttention) -> None:
        super().__init__()
        assert attn.batch_first
        self.num_heads = attn.num_heads
        if attn.in_proj_weight is not None:  # keys and values are as wide as queries
            q_weight, k_weight, v_weight = attn.in_proj_weight.chunk(3)
        else:
            q_weight, k_weight, v_weight = (
                attn.q_proj_weight,
                attn.k_proj_weight,
                attn.v_proj_weight,
            )
        q_bias, k_bias, v_bias = attn.in_proj_bias.chunk(3)
        self.to_q = make_linear(q_weight, q_bias)
        self.to_k = make_linear(k_weight, k_bias)
        self.to_v = make_linear(v_weight, v_bias)
        self.to_out = make_linear(attn.out_proj.weight, attn.out_proj.bias)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        need_weights: bool,  # always False
    ) -> tuple[torch.Tensor, None]:
        """Return (batch, length, channels), and None instead of weights of the attention."""
        heads = (self.num_heads, -1)  # each of q, k, v: (batch, heads, length, head_dim)
        q = self.to_q(query).unflatten(-1, heads).transpose(1, 2)
        k = self.to_k(key).unflatten(-1, heads).transpose(1, 2)
        v = self.to_v(value).unflatten(-1, heads).transpose(1, 2)
        attn_out = nn.functional.scaled_dot_product_attention(q, k, v)  # as q
        attn_out = attn_out.transpose(1, 2).flatten(2)  # (batch, length, channels)
        return self.to_out(attn_out), None


def split_attention(model: nn.Module) -> None:
    """Replace every nn.MultiheadAttention of a model, in place, by an Attention."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            model.set_submodule(name, Attention(module))
