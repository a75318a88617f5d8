"""Weights in int8, with a scale per output feature: half the bytes of bfloat16 per token."""

from typing import Self

import torch
from torch import nn


class Int8Linear(nn.Module):
    """A linear layer without bias whose weights are integers from -127 to 127, times a scale."""

    weight: torch.Tensor  # (out_features, in_features) int8
    scales: torch.Tensor  # (out_features,)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Return a layer with the rounded weights of another, whose dtype the scales have."""
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12).to(linear.weight.dtype)
        module = cls()
        rounded = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        module.register_buffer("weight", rounded)
        module.register_buffer("scales", scales)
        return module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., out_features) in the dtype of x, (..., in_features)."""
        # Eager, it writes the converted weights to memory, so that nothing is won. Compiled, both
        # lines are one kernel: on a CPU torch._weight_int8pack_mm, which is fast in bfloat16 only.
        y = nn.functional.linear(x, self.weight.to(x.dtype))  # (..., out_features)
        return y * self.scales  # (..., out_features)


def quantize_int8(model: nn.Module) -> None:
    """Replace all linear layers of a model. A tied embedding keeps its own weights."""
    for name, module in list(model.named_children()):
        if isinstance(module, nn.Linear):
            setattr(model, name, Int8Linear.from_linear(module))
        else:
            quantize_int8(module)
