"""Weights in int8 with a scale per output feature: half the bytes of bfloat16 to read.

torchao's tensors reach the same kernels, but PyTorch 2.13 compiles them again in every run.
"""

import torch
from torch import nn


class Int8Linear(nn.Module):
    """A linear layer without bias whose weights are integers from -127 to 127, times a scale."""

    weight: torch.Tensor  # (out_features, in_features) int8
    scales: torch.Tensor  # (out_features,)

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(dim=1) / 127).to(linear.weight.dtype)  # (out_features,)
        scales = scales.clamp(min=torch.finfo(scales.dtype).tiny)  # a row may be all zeros
        rounded = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.register_buffer("weight", rounded)
        self.register_buffer("scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., out_features) in the dtype of x, (..., in_features)."""
        # Eager, the converted weights are written to memory, which costs more than it saves.
        # Compiled, both lines are one kernel: on a CPU, torch._weight_int8pack_mm, which is fast
        # if x is in bfloat16.
        y = nn.functional.linear(x, self.weight.to(x.dtype))  # (..., out_features)
        return y * self.scales  # (..., out_features)


def quantize_int8(model: nn.Module) -> None:
    """Replace all linear layers of a model, in place, by Int8Linear; a tied embedding stays."""
    for name, module in list(model.named_children()):
        if isinstance(module, nn.Linear):
            setattr(model, name, Int8Linear(module))
        else:
            quantize_int8(module)
