"""What a folder of Hugging Face's holds, read with care: nothing in it is ever run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import msgspec
import torch

import lesson_code as lesson
from real_world.llama.sizes import LlamaConfig


def refuse(path: Path, reason: str) -> NoReturn:
    """Raise CheckpointError: `path` cannot be used, and why, in one line whatever it holds."""
    raise lesson.CheckpointError(f"{path} {' '.join(reason.split())[:300]}")


def read_config(path: Path) -> LlamaConfig:
    """Return the sizes in a config.json of Hugging Face's; raise CheckpointError if it has none."""
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=dict)
        if stored.get("model_type") != "llama":
            refuse(path, f"describes {stored.get('model_type', 'no type of model')}, not llama")
        # transformers 5 keeps both in rope_parameters, transformers 4 and Meta's own files do not.
        rope = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
        rope = msgspec.convert(rope, dict)
        kind = rope.get("rope_type", rope.get("type", "default"))
        plain = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        plain["quantization_config"] = None
        for name, only in plain.items():
            if stored.get(name, only) != only:
                refuse(path, f"has {name} {stored[name]}; Llama 3 has {only}")
        if kind not in ("default", "llama3"):
            refuse(path, f"has a rotary embedding of type {kind}; Llama 3 has default or llama3")
        theta = rope.get("rope_theta", stored.get("rope_theta", 10_000.0))
        scaling = rope if kind == "llama3" else None
        config = msgspec.convert(
            {"rms_norm_eps": 1e-6} | stored | {"rope_theta": theta, "rope_scaling": scaling},
            LlamaConfig,
        )
    except FileNotFoundError:
        refuse(path, "does not exist; a Llama's folder has config.json and model.safetensors")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        refuse(path, f"is no configuration of a Llama: {error}")
    if (
        config.num_attention_heads % config.num_key_value_heads
        or config.head_size % 2
        or config.head_size == 0
    ):
        heads = f"{config.num_attention_heads} heads of {config.head_size}"
        refuse(path, f"divides {heads} over {config.num_key_value_heads}, which does not come out")
    return config


def stored_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder; raise CheckpointError where there are none."""
    index = folder / "model.safetensors.index.json"
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    if not index.exists():
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")]
        if pickles:
            refuse(pickles[0], "is a pickle, which may run code; only safetensors is read")
        refuse(folder, "holds no model.safetensors")
    try:
        names = msgspec.json.decode(index.read_bytes(), type=dict[str, object])["weight_map"]
        names = set(msgspec.convert(names, dict[str, str]).values())
    except (msgspec.MsgspecError, KeyError):
        refuse(index, "is no index of safetensors files")
    for name in sorted(names):
        if Path(name).name != name or not (folder / name).is_file():
            refuse(index, f"names {name}, which is no file beside it")
    return [folder / name for name in sorted(names)]


def stored_tensors(
    folder: Path, device: torch.device | str
) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """Yield every tensor of a folder, with the file it is in and its name."""
    from safetensors import SafetensorError, safe_open

    for path in stored_files(folder):
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    yield path, name, file.get_tensor(name)
        except SafetensorError as error:
            refuse(path, f"is torn, or no safetensors file ({error})")
