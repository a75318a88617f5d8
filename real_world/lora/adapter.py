"""Adapters in files, as peft writes them: only the update is saved, not the model.

adapter_model.safetensors holds A and B of every adapted layer; adapter_config.json says which
layers these are, the rank and the scaling.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from lesson_code import CheckpointError
from real_world.common import atomic_write
from real_world.lora.lora import LoraConfig, apply_lora

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."  # peft's wrappers around the model
# What changes the result of peft's LoRA, and not the names or the shapes of the weights.
UNSUPPORTED = ("use_rslora", "alpha_pattern", "alora_invocation_tokens", "layer_replication")


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return A and B of every adapted layer, by peft's names."""
    state_dict = model.state_dict()
    return {f"{PREFIX}{name}": state_dict[name] for name in state_dict if "lora_" in name}


def base_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the frozen weights, by the names that they had before apply_lora()."""
    state_dict = model.state_dict()
    names = [name for name in state_dict if "lora_" not in name]
    return {name.replace(".base_layer.", "."): state_dict[name] for name in names}


def save_adapter(model: nn.Module, config: LoraConfig, folder: Path, base_model: str = "") -> Path:
    """Save the adapter of a model; return the file with the weights.

    Args:
        model: changed by apply_lora().
        config: what apply_lora() was given.
        folder: is created.
        base_model: the name or the folder of the model, which peft shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"peft_type": "LORA", "base_model_name_or_path": base_model, **asdict(config)}
    atomic_write(folder / CONFIG_FILE, f"{json.dumps(content, indent=2)}\n".encode())
    atomic_write(folder / WEIGHTS_FILE, save(lora_state_dict(model), metadata={"format": "pt"}))
    return folder / WEIGHTS_FILE


def read_config(path: Path) -> LoraConfig:
    """Read an adapter_config.json. Raises CheckpointError if it is not LoRA as in lora.py."""
    try:
        content = json.loads(path.read_text())
        target_modules = content["target_modules"]
        if content["peft_type"] != "LORA" or not isinstance(target_modules, list):
            raise CheckpointError(f"{path} is not supported: it must be LoRA with a list of layers")
        for name in UNSUPPORTED:
            if content.get(name):
                raise CheckpointError(f"{path} is not supported: it has {name}")
        return LoraConfig(tuple(target_modules), content["r"], content["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the configuration of an adapter: {error!r}") from None


def load_adapter(model: nn.Module, folder: Path) -> LoraConfig:
    """Apply LoRA to a model in place, with weights from a folder; return the configuration.

    Raises:
        CheckpointError: a file is damaged, or the weights do not match the model.
        OSError: a file is missing.
    """
    config = read_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    try:
        weights = load(path.read_bytes())
        apply_lora(model, config)
        weights = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (SafetensorError, ValueError, RuntimeError) as error:  # RuntimeError: other shapes
        raise CheckpointError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    missing = [name for name in missing if "lora_" in name]
    if missing or unexpected:
        message = f"its weights do not match the model: {(missing + unexpected)[0]}"
        raise CheckpointError(f"{path}: {message}")
    return config
