"""The Llama example's weights: Hugging Face's format in both directions, errors, memory."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from llama_models import CONFIG, build
from safetensors.torch import load_file, save_file

import lesson_code as lesson
from real_world.llama import parity
from real_world.llama.checkpoint import load_pretrained, read_config, save_pretrained
from real_world.llama.config import LLAMA_3_1_8B


@pytest.mark.parametrize("tied", [True, False])
def test_weights_to_transformers_and_back(tied, tmp_path):
    from transformers import LlamaForCausalLM

    config = replace(CONFIG, tie_word_embeddings=tied, rope_scaling=parity.SCALING)
    model, tokens = build(replace(config, eos_token_ids=(7, 9))), torch.randint(97, (2, 40))
    save_pretrained(model, tmp_path / "ours")
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(reference(tokens).logits, model(tokens), atol=1e-6, rtol=0)
    reference.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    old["lm_head.weight"] = model.lm_head.weight.detach().clone()  # older files have both
    save_file(load_file(path) | old, path)
    loaded = load_pretrained(tmp_path / "theirs")
    assert loaded.config == model.config
    assert loaded(tokens).equal(model(tokens))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("stored", ["both", "lm_head", "embedding"])
def test_tied_weights_are_tied_as_transformers_does(stored, tmp_path):
    from transformers import LlamaForCausalLM

    save_pretrained(build(replace(CONFIG, tie_word_embeddings=True)), tmp_path)
    path = tmp_path / "model.safetensors"
    state_dict = load_file(path)
    if stored != "embedding":
        state_dict["lm_head.weight"] = torch.randn(97, 96)  # after fine-tuning of lm_head only
    if stored == "lm_head":
        del state_dict["model.embed_tokens.weight"]
    save_file(state_dict, path, metadata={"format": "pt"})
    warns = pytest.warns(UserWarning, match="it is not tied")
    with warns if stored == "both" else contextlib.nullcontext():
        loaded = load_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings == (stored != "both")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (stored != "both")
    tokens = torch.randint(97, (2, 40))
    expected = LlamaForCausalLM.from_pretrained(tmp_path)(tokens).logits
    torch.testing.assert_close(loaded(tokens), expected, atol=1e-5, rtol=0)
    save_pretrained(loaded, tmp_path / "again")
    assert load_pretrained(tmp_path / "again")(tokens).equal(loaded(tokens))


def test_mixed_dtypes_are_refused_or_converted(tmp_path):
    from transformers import LlamaForCausalLM

    save_pretrained(build(), tmp_path)
    path = tmp_path / "model.safetensors"
    mixed = {name: w if "norm" in name else w.bfloat16() for name, w in load_file(path).items()}
    save_file(mixed, path, metadata={"format": "pt"})
    with pytest.raises(lesson.CheckpointError, match="mixes bfloat16 and float32; choose one"):
        load_pretrained(tmp_path)
    tokens = torch.randint(97, (2, 40))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = load_pretrained(tmp_path, dtype=dtype)
        assert {weight.dtype for weight in model.state_dict().values()} == {dtype}
        reference = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        difference = (model(tokens) - reference(tokens).logits).abs().max()
        assert difference <= (1e-6 if dtype == torch.float32 else 0.02)


def test_rotary_frequencies_of_old_files_do_not_count_as_mixed_dtypes(tmp_path):
    save_pretrained(build().bfloat16(), tmp_path)
    path = tmp_path / "model.safetensors"
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(path) | old, path)
    assert load_pretrained(tmp_path).lm_head.weight.dtype == torch.bfloat16


def test_sharded_bfloat16_weights(tmp_path):
    reference = parity.to_transformers(build()).bfloat16()
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    old = {name: torch.zeros_like(w) for name, w in reference.state_dict().items()}
    save_file(old, tmp_path / "model-00009-of-00009.safetensors")  # not in the index
    state_dict = load_pretrained(tmp_path).state_dict()
    assert all(weight.dtype == torch.bfloat16 for weight in state_dict.values())
    assert all(state_dict[name].equal(w) for name, w in reference.state_dict().items())


def test_config_json_as_published_and_its_defaults(tmp_path):
    from transformers import LlamaConfig as TransformersConfig

    path = tmp_path / "config.json"
    content = asdict(LLAMA_3_1_8B) | {"model_type": "llama", "eos_token_id": 0}
    content["rope_scaling"]["rope_type"] = "llama3"
    path.write_text(json.dumps(content))
    assert read_config(path) == replace(LLAMA_3_1_8B, eos_token_ids=(0,))
    for name in ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling"):
        del content[name]
    path.write_text(json.dumps(content))
    config, expected = read_config(path), TransformersConfig.from_pretrained(tmp_path)
    assert config.head_dim == expected.head_dim
    assert config.num_key_value_heads == expected.num_key_value_heads
    assert config.rms_norm_eps == expected.rms_norm_eps
    assert config.rope_theta == expected.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4}, r"Missing key\(s\) in state_dict: .model.layers.3"),
        ({"num_hidden_layers": 2}, r"Unexpected key\(s\)"),
        ({"intermediate_size": 47}, "size mismatch for model.layers.0.mlp.gate_proj"),
        ({"model_type": "mistral"}, "must have model_type 'llama'"),
        ({"rope_scaling": {"type": "yarn"}}, "must have rope_type 'default', 'linear' or 'llama3'"),
        ({"num_key_value_heads": 3}, "a multiple of num_key_value_heads"),
        ({"vocab_size": "97"}, "vocab_size is '97'"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"rope_scaling": "linear"}, "is not the configuration of a Llama"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "'Tensor' and 'str'"),
        ({"num_hidden_layers": 2.0}, "'float' object cannot be interpreted as an integer"),
        ({"vocab_size": -1}, "negative dimension"),
        ({}, r"model\.safetensors is damaged"),
    ],
)
def test_folder_that_cannot_be_loaded(changes, message, tmp_path):
    save_pretrained(build(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if not changes:
        os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(lesson.CheckpointError, match=message):
        load_pretrained(tmp_path)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"\xff\xfe", "config.json is not JSON"),
        ("config.json", b"[]", "config.json is not a JSON object"),
        ("generation_config.json", b"[]", "generation_config.json is not a JSON object"),
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1\n",
            "run `git lfs pull`",
        ),
        (INDEX, b"", f"{INDEX} is not JSON"),
        (INDEX, b"[]", f"{INDEX} is not a JSON object"),
        (INDEX, b"{}", f"{INDEX} has no weight_map"),
        (INDEX, b'{"weight_map": {"a": 5}}', f"{INDEX} has no weight_map"),
        (INDEX, b'{"weight_map": {"a": "b.safetensors"}}', "b.safetensors is missing"),
    ],
)
def test_damaged_file_is_named_in_one_line(name, content, message, tmp_path):
    save_pretrained(build(), tmp_path)
    if name == INDEX:
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(lesson.CheckpointError, match=message) as error:
        load_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_byte_order_mark_in_config_json(tmp_path):
    save_pretrained(build(), tmp_path)
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_pretrained(tmp_path).config == build().config


def test_failed_save_keeps_the_old_files(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    save_pretrained(build(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(build(seed=1), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


MEASURE_MEMORY = """
import re, sys, torch
from real_world.llama.checkpoint import load_pretrained
def load_and_run(folder):
    load_pretrained(folder)(torch.arange(8).view(1, 8))
def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
with torch.no_grad():
    load_and_run(sys.argv[1])  # a small model: the libraries' code is in memory now
    before = memory("VmRSS")
    load_and_run(sys.argv[2])
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_memory_of_one_copy_of_the_weights(tmp_path):
    save_pretrained(build().bfloat16(), tmp_path / "small")
    large = replace(CONFIG, hidden_size=1024, intermediate_size=4096)
    save_pretrained(build(large).bfloat16(), tmp_path / "large")
    root = Path(lesson.__file__).parent
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEASURE_MEMORY, tmp_path / "small", tmp_path / "large"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert size > 70e6
    assert 0.9 * size < int(result.stdout) < 1.3 * size
