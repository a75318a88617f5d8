"""Adapters in files, as peft writes them: only the update is saved, not the model.

adapter_model.safetensors holds A and B of every adapted layer; adapter_config.json says which
layers these are, the rank and the scaling.
"""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from lesson_code import CheckpointError
from real_world.common import atomic_write, read_json
from real_world.lora.lora import LoraConfig, apply_lora, find_targets

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."  # peft's wrappers around the model
# Other values of these fields change the result. Those that change the names or the shapes of the
# weights, as DoRA does, need no check of their own.
UNSET: tuple = (None, False, {}, [])
SUPPORTED_VALUES: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    # Others change the base weights.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None),
    "alora_invocation_tokens": UNSET,
    "alpha_pattern": UNSET,
    "layer_replication": UNSET,
    "modules_to_save": UNSET,
    "use_rslora": UNSET,
}


def save_adapter(model: nn.Module, config: LoraConfig, folder: Path) -> None:
    """Save the adapter of a model.

    Args:
        model: changed by apply_lora().
        config: what apply_lora() was given.
        folder: is created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"peft_type": "LORA", "base_model_name_or_path": "", **asdict(config)}
    atomic_write(folder / CONFIG_FILE, f"{json.dumps(content, indent=2)}\n".encode())
    state_dict = model.state_dict()
    weights = {f"{PREFIX}{name}": state_dict[name] for name in state_dict if "lora_" in name}
    atomic_write(folder / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))


def read_config(path: Path) -> LoraConfig:
    """Read an adapter_config.json. Raises CheckpointError if it is not LoRA as in lora.py."""
    try:
        content = read_json(path)
        target_modules = content["target_modules"]
        if not isinstance(target_modules, list):  # a pattern
            raise CheckpointError(f"{path} is not supported: target_modules is not a list")
        for field, values in SUPPORTED_VALUES.items():
            if content.get(field) not in values:
                value = json.dumps(content.get(field))
                raise CheckpointError(f"{path} is not supported: {field} is {value}")
        if not isinstance(content["r"], int) or content["r"] < 1:
            raise ValueError("r must be an integer of at least 1")
        return LoraConfig(tuple(target_modules), content["r"], float(content["lora_alpha"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the configuration of an adapter: {error!r}") from None


def load_adapter(model: nn.Module, folder: Path) -> LoraConfig:
    """Apply LoRA to a model in place, with weights from a folder; return the configuration.

    Raises:
        CheckpointError: a file is damaged, or the weights do not match the model.
        OSError: a file is missing.
    """
    config = read_config(folder / CONFIG_FILE)
    try:
        targets = find_targets(model, config)
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from None
    path = folder / WEIGHTS_FILE
    try:
        weights = load(path.read_bytes())
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    weights = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
    expected = {}  # the shape of each weight
    for name, linear in targets:
        expected[f"{name}.lora_A.weight"] = (config.r, linear.in_features)
        expected[f"{name}.lora_B.weight"] = (linear.out_features, config.r)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in expected | shapes:
        if shapes.get(name) != expected.get(name):
            message = f"{name} is {shapes.get(name)} instead of {expected.get(name)}"
            raise CheckpointError(f"{path}: its weights do not match the model: {message}")
    apply_lora(model, config)  # only now: a model is not changed by an adapter that is refused
    model.load_state_dict(weights, strict=False)
    return config
