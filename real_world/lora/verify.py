"""The checks: a new adapter changes nothing; a trained one can be loaded and merged."""

from pathlib import Path

import torch
from torch import nn

from real_world.common import check, show
from real_world.lora.adapter import WEIGHTS_FILE, load_adapter
from real_world.lora.config import FinetuneConfig
from real_world.lora.lora import LoraConfig, apply_lora, merge_lora


def count_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """Return the number of parameters; of all of them, or of those that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


@torch.no_grad()
def add_adapter(
    model: nn.Module, target_modules: tuple[str, ...], config: FinetuneConfig, X: object
) -> LoraConfig:
    """Apply LoRA to a model in place, print how many parameters are trained; return its config.

    Raises CheckFailed if the output for X, an input of the model, changed.
    """
    output = model(X)
    torch.manual_seed(config.seed)
    lora_config = LoraConfig(target_modules, r=config.rank, lora_alpha=2 * config.rank)
    apply_lora(model, lora_config)
    trainable = count_parameters(model, trainable_only=True)
    base = count_parameters(model) - trainable
    show("base parameters", f"{base:,}")
    show(f"trainable, with rank {config.rank}", f"{trainable:,}, {trainable / base:.2%}")
    check("output before training", "equal to the base model's", model(X).equal(output))
    return lora_config


@torch.no_grad()
def check_adapter(model: nn.Module, base_model: nn.Module, folder: Path, X: object) -> None:
    """Load a trained adapter that has been saved, and merge it.

    Raises CheckFailed if the weights of the base model changed, or if outputs differ.

    Args:
        model: changed by apply_lora(), and trained.
        base_model: the model before apply_lora(); the adapter is merged into it, in place.
        folder: where the adapter is.
        X: an input of the model, for the comparisons.
    """
    trained = {  # by the names that they had before apply_lora()
        name.replace(".base_layer.", "."): weight for name, weight in model.state_dict().items()
    }
    weights = base_model.state_dict()
    unchanged = all(trained[name].equal(weights[name]) for name in weights)
    check("weights of the base model", "unchanged", unchanged)

    load_adapter(base_model, folder)
    outputs = model(X)
    difference = (base_model(X) - outputs).abs().max().item()
    check("loaded adapter", f"max. difference {difference:.0e}", difference == 0)
    merge_lora(base_model)
    difference = (base_model(X) - outputs).abs().max().item()
    check("merged adapter", f"max. difference {difference:.0e}", difference < 1e-3)
    size, base_size = (folder / WEIGHTS_FILE).stat().st_size, 4 * count_parameters(base_model)
    show("adapter saved to", folder)
    show("adapter size", f"{size / 1e3:,.0f} kB; the model has {base_size / 1e3:,.0f} kB")
