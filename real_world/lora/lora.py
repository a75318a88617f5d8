"""LoRA: low-rank adaptation of linear layers. Modules and options have the names of peft.

E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1.
"""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class LoraConfig:
    """Which layers are adapted, and how."""

    target_modules: tuple[str, ...]  # the names of the layers, or how they end: "q_proj"
    r: int = 8  # the rank
    lora_alpha: float = 16  # the update is multiplied by lora_alpha / r


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trainable update of low rank: (W + lora_alpha / r * B A) x."""

    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        # In float32, as in peft: in float16 or bfloat16, small updates would be lost.
        dtype = torch.promote_types(base_layer.weight.dtype, torch.float32)
        device = base_layer.weight.device
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False).to(device, dtype)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False).to(device, dtype)
        # B is zero, so that training starts from the base model. A is not: the gradient of each has
        # the other as a factor. nn.Linear's initialization is peft's; the paper's is Gaussian.
        nn.init.zeros_(self.lora_B.weight)
        self.scaling = lora_alpha / r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., out_features)."""
        h = self.lora_A(x.to(self.lora_A.weight.dtype))  # (..., in_features) -> (..., r)
        update = self.lora_B(h)  # (..., out_features)
        return self.base_layer(x) + (self.scaling * update).to(x.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """Return the linear layer with the update added to its weight, as fast as before."""
        update = self.lora_B.weight @ self.lora_A.weight  # (out_features, in_features)
        weight = self.base_layer.weight + self.scaling * update  # not in place: it may be shared
        weight = weight.to(self.base_layer.weight.dtype)
        self.base_layer.weight = nn.Parameter(weight, requires_grad=False)
        return self.base_layer


def find_targets(model: nn.Module, config: LoraConfig) -> list[tuple[str, nn.Linear]]:
    """Return the layers to adapt. Raises ValueError if there are none, or an adapter already."""
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise ValueError("the model has an adapter already: merge it first")
    suffixes = tuple(f".{name}" for name in config.target_modules)
    targets = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f".{name}".endswith(suffixes)
    ]
    if not targets:
        raise ValueError(f"no linear layer is named {' or '.join(config.target_modules)}")
    return targets


def apply_lora(model: nn.Module, config: LoraConfig) -> None:
    """Freeze a model in place, and wrap its target modules. Raises ValueError as find_targets()."""
    targets = find_targets(model, config)
    model.requires_grad_(False)
    for name, linear in targets:
        model.set_submodule(name, LoraLinear(linear, config.r, config.lora_alpha))


def merge_lora(model: nn.Module) -> None:
    """Replace every adapted layer, in place, by a linear layer with the merged weight."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            model.set_submodule(name, module.merge())
