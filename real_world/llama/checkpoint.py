"""Configuration and weights in Hugging Face's folder format: config.json and safetensors files.

Safetensors files hold tensors only; unlike pickles, they cannot run code when they are loaded.
"""

import json
import math
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from lesson_code import CheckpointError
from real_world.common import atomic_write, read_json
from real_world.llama.config import LinearRopeScaling, LlamaConfig, RopeScaling
from real_world.llama.model import Llama

LFS_POINTER = b"version https://git-lfs"  # the start of what Git stores instead of a large file


def check_requirements(path: Path, requirements: dict[str, bool]) -> None:
    """Raise CheckpointError for the first requirement that is not met."""
    for requirement, met in requirements.items():
        if not met:
            raise CheckpointError(f"{path} is not supported: it must have {requirement}")


def read_rope(
    path: Path, content: dict, rope: dict
) -> tuple[float, RopeScaling | LinearRopeScaling | None]:
    """Return rope_theta and the scaling; `rope` is rope_parameters or rope_scaling."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    partial_rotary_factor = rope.get("partial_rotary_factor", content.get("partial_rotary_factor"))
    requirements = {
        "one rope_type for all layers": not any(isinstance(value, dict) for value in rope.values()),
        "rope_type 'default', 'linear' or 'llama3'": rope_type in ("default", "linear", "llama3"),
        "partial_rotary_factor 1": partial_rotary_factor in (None, 1),
    }
    check_requirements(path, requirements)
    theta = rope.get("rope_theta") or content.get("rope_theta") or 10_000.0
    if rope_type == "default":
        return theta, None
    if rope_type == "linear":
        return theta, LinearRopeScaling(rope["factor"])
    scaling = RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position_embeddings=(  # the order of transformers
            content.get("original_max_position_embeddings")
            or rope.get("original_max_position_embeddings")
            or content.get("max_position_embeddings", 2048)
        ),
    )
    return theta, scaling


def read_eos_token_ids(content: dict) -> tuple[int, ...]:
    """Return eos_token_id: one number, a list, or none."""
    eos = content.get("eos_token_id")
    ids = (eos,) if isinstance(eos, int) else tuple(eos or ())
    if not all(isinstance(token, int) for token in ids):
        raise ValueError(f"eos_token_id is {eos!r}")
    return ids


def read_config(path: Path) -> LlamaConfig:
    """Read a config.json. Raises CheckpointError if it describes a model that is not supported."""
    content = read_json(path)
    requirements = {
        "model_type 'llama'": content.get("model_type") == "llama",
        "hidden_act 'silu'": content.get("hidden_act", "silu") in ("silu", "swish"),  # synonyms
        "attention_bias False": not content.get("attention_bias"),
        "mlp_bias False": not content.get("mlp_bias"),
        "is_causal True": content.get("is_causal", True),
        "no per_layer_config": not content.get("per_layer_config"),
        "no quantization_config": not content.get("quantization_config"),
        "no attention_chunk_size": not content.get("attention_chunk_size"),
        "layer_types 'full_attention'": set(content.get("layer_types") or []) <= {"full_attention"},
        "no sliding_window below max_position_embeddings": (
            bool(content.get("layer_types"))  # all of them are full_attention
            or (content.get("sliding_window") or math.inf)
            >= (content.get("max_position_embeddings") or 2048)
        ),
    }
    check_requirements(path, requirements)
    # transformers 5 writes all of it to rope_parameters, other versions and Meta to rope_scaling.
    ropes = [content[name] for name in ("rope_parameters", "rope_scaling") if content.get(name)]
    rope_theta, rope_scaling = read_rope(path, content, ropes[0] if ropes else {})
    if len(ropes) == 2 and read_rope(path, content, ropes[1]) != (rope_theta, rope_scaling):
        raise CheckpointError(f"{path} is ambiguous: its rope_parameters and rope_scaling disagree")
    heads = content["num_attention_heads"]
    kv_heads = content.get("num_key_value_heads") or heads
    multiple = "num_attention_heads that are a multiple of num_key_value_heads"
    check_requirements(path, {multiple: heads % kv_heads == 0})
    config = LlamaConfig(  # the defaults are those of transformers
        vocab_size=content["vocab_size"],
        hidden_size=content["hidden_size"],
        intermediate_size=content["intermediate_size"],
        num_hidden_layers=content["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=content.get("head_dim") or content["hidden_size"] // heads,
        max_position_embeddings=content.get("max_position_embeddings") or 2048,
        rms_norm_eps=float(content.get("rms_norm_eps", 1e-6)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=content.get("tie_word_embeddings", False),
        eos_token_ids=read_eos_token_ids(content),
    )
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type in (int, float) and not isinstance(value, (int, float)):
            raise ValueError(f"{field.name} is {value!r}")
    return config


def config_to_dict(config: LlamaConfig) -> dict:
    """Return the content of a config.json that all versions of transformers read."""
    content = asdict(config)
    content["architectures"] = ["LlamaForCausalLM"]
    content["model_type"] = "llama"
    content["bos_token_id"] = None
    content["eos_token_id"] = list(content.pop("eos_token_ids")) or None
    if config.rope_scaling is not None:
        content["rope_scaling"]["rope_type"] = config.rope_scaling.rope_type
    return content


def read_sampling(folder: Path) -> dict[str, Any]:
    """Return the sampling that a model's makers recommend, by the names of SamplingParams."""
    path = folder / "generation_config.json"
    content = read_json(path) if path.exists() else {}
    names = ["repetition_penalty"]  # with greedy decoding, too
    if content.get("do_sample"):
        names += ["temperature", "top_k", "top_p", "min_p"]
    values = {name: content[name] for name in names if content.get(name) is not None}
    if values.get("top_k") == 0:
        del values["top_k"]  # off
    return values


def load_weights(
    folder: Path, device: torch.device | str, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Return the weights in a folder's safetensors files, by name, in one dtype."""
    path = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"  # if the weights are in several files
    if path.exists():
        paths = [path]
    elif index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or {*map(type, weight_map.values())} != {str}:
            raise CheckpointError(f"{index} has no weight_map")
        paths = sorted(folder / file for file in set(weight_map.values()))
    else:
        message = "pickled weights (.bin, .pth), which can run code, are not supported"
        raise CheckpointError(f"{folder} has no model.safetensors; {message}")
    state_dict: dict[str, torch.Tensor] = {}
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path} is missing")
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(f"{path} is a pointer of Git LFS: run `git lfs pull`")
        try:
            state_dict |= load_file(path, device=str(device))
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
    for name in list(state_dict):
        if name.endswith("rotary_emb.inv_freq"):  # in old files; it follows from the config
            del state_dict[name]
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in state_dict.values()})
    if dtype is not None:
        for name in state_dict:  # one at a time: the memory need not hold all of them twice
            state_dict[name] = state_dict[name].to(dtype)
    elif len(dtypes) > 1:
        raise CheckpointError(f"{folder} mixes {' and '.join(dtypes)}; choose one with --dtype")
    return state_dict


def share_embedding(config: LlamaConfig, state_dict: dict[str, torch.Tensor]) -> LlamaConfig:
    """Use one tensor for the embedding and lm_head; if both are stored and differ, untie them."""
    embedding = state_dict.get("model.embed_tokens.weight")
    lm_head = state_dict.get("lm_head.weight")
    if embedding is not None and lm_head is not None and not lm_head.equal(embedding):
        message = "differs from the embedding: it is not tied, although tie_word_embeddings is true"
        warnings.warn(f"the stored lm_head.weight {message}", stacklevel=3)
        return replace(config, tie_word_embeddings=False)
    shared = lm_head if embedding is None else embedding
    if shared is not None:
        state_dict["model.embed_tokens.weight"] = state_dict["lm_head.weight"] = shared
    return config


def load_pretrained(
    folder: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Llama:
    """Load a Llama from a folder in Hugging Face's format.

    On the CPU, the weights are memory-mapped: read from the file when they are needed, not copied.

    Args:
        folder: with config.json and safetensors files.
        device: where the weights are loaded to.
        dtype: to which the weights are converted. None: that of the files.

    Raises:
        CheckpointError: a file is damaged, the weights do not match config.json, or they have
            several dtypes and `dtype` is None.
        OSError: a file is missing.
    """
    folder = Path(folder)
    path = folder / "config.json"
    try:
        config = read_config(path)
        path = folder / "generation_config.json"  # instruct models end a turn by another token
        if path.exists() and (eos := read_eos_token_ids(read_json(path))):
            config = replace(config, eos_token_ids=eos)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not the configuration of a Llama: {error!r}") from None
    state_dict = load_weights(folder, device, dtype)
    if config.tie_word_embeddings:
        config = share_embedding(config, state_dict)
    try:
        with torch.device("meta"):  # shapes only: no memory, no random weights
            model = Llama(config)
        model.load_state_dict(state_dict, assign=True)
    except (RuntimeError, TypeError) as error:  # wrong sizes, or names or shapes that do not match
        raise CheckpointError(f"{folder}: {' '.join(str(error).split())[:300]}") from None
    model.tie_weights()
    return model.to(device)


def save_pretrained(model: Llama, folder: Path | str) -> None:
    """Save a Llama to a folder that load_pretrained() and Hugging Face's libraries read.

    Raises CheckpointError if the model has an adapter: merge it first.
    """
    folder = Path(folder)
    state_dict = model.state_dict()
    if any("lora_" in name for name in state_dict):
        raise CheckpointError("the model has an adapter: call merge_lora() before it is saved")
    # After LoRA on lm_head, the merged weight is not that of the embedding any more.
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    if tied:
        del state_dict["lm_head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "model.safetensors", save(state_dict, metadata={"format": "pt"}))
    content = config_to_dict(replace(model.config, tie_word_embeddings=tied))
    config = json.dumps(content, indent=2)
    atomic_write(folder / "config.json", f"{config}\n".encode())
