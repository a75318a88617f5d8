"""config.json: each field that changes the logits is read as transformers reads it, or refused."""

import dataclasses
import json

import pytest
import torch

import lesson_code as lesson
from real_world.llama import parity
from real_world.llama.checkpoint import (
    config_to_dict,
    load_pretrained,
    read_config,
    save_pretrained,
)
from real_world.llama.config import LlamaConfig
from real_world.llama.model import Llama

CONFIG = dataclasses.replace(parity.BASE, num_hidden_layers=1, rope_theta=10_000.0)
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# What each field of transformers' LlamaConfig is here, with a value that is not its default.
READ = {
    "vocab_size": 98,
    "hidden_size": 192,
    "intermediate_size": 99,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 16,
    "rms_norm_eps": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
    "tie_word_embeddings": True,
    "eos_token_id": [5, 6],
}
REFUSED = {"hidden_act": "gelu", "attention_bias": True, "mlp_bias": True}
NO_EFFECT = {  # on logits
    "architectures": ["LlamaModel"],
    "attention_dropout": 0.5,  # for training
    "bos_token_id": 4,  # the tokenizer adds it
    "chunk_size_feed_forward": 2,
    "dtype": "float32",  # transformers converts to it; here, load_pretrained's dtype does
    "id2label": {"0": "a"},
    "initializer_range": 0.5,  # for training
    "is_encoder_decoder": True,
    "label2id": {"a": 0},
    "output_hidden_states": True,
    "pad_token_id": 3,
    "pretraining_tp": 2,
    "problem_type": "regression",
    "return_dict": False,
    "transformers_version": "4.0.0",
    "use_cache": False,
}
# Fields that transformers reads or has read, though its LlamaConfig does not declare them.
READ_UNDECLARED = {
    "rope_theta": 7.0,
    "rope_scaling": {"type": "linear", "factor": 2.0},
}
REFUSED_UNDECLARED = {
    "attention_chunk_size": 8,
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 8,
    "is_causal": False,
    "partial_rotary_factor": 0.5,
    "per_layer_config": {"0": {"rms_norm_eps": 0.5}},
    "quantization_config": {"bits": 4},
}
NO_EFFECT_UNDECLARED = {
    "original_max_position_embeddings": 16,  # but for llama3 scaling, below
    "torch_dtype": "float32",
}


def save(folder, changes: dict, config: LlamaConfig = CONFIG) -> None:
    """Save a model to a folder, with changes to its config.json."""
    torch.manual_seed(0)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # attention depends on positions
    save_pretrained(model, folder)
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


def transformers_logits(folder, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(folder, return_dict=True)(tokens).logits


def assert_same_logits(folder) -> torch.Tensor:
    """Assert that transformers' logits are those of load_pretrained(); return them."""
    tokens = torch.randint(97, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = load_pretrained(folder)(tokens)
    torch.testing.assert_close(logits, transformers_logits(folder, tokens), atol=1e-3, rtol=0)
    return logits


def test_every_field_of_transformers_is_classified():
    from transformers import LlamaConfig as TransformersConfig

    names = {field.name for field in dataclasses.fields(TransformersConfig)}
    assert names == READ.keys() | REFUSED.keys() | NO_EFFECT.keys()


@pytest.mark.parametrize("name", [*READ, *READ_UNDECLARED])
def test_field_is_read(name, tmp_path):
    save(tmp_path, {"rope_theta": None, "rope_scaling": None})
    path = tmp_path / "config.json"
    before = read_config(path)
    content = json.loads(path.read_text()) | {name: (READ | READ_UNDECLARED)[name]}
    path.write_text(json.dumps(content))
    assert read_config(path) != before


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_UNDECLARED])
def test_field_is_refused(name, tmp_path):
    save(tmp_path, {name: (REFUSED | REFUSED_UNDECLARED)[name]})
    with pytest.raises(lesson.CheckpointError, match=f"must have (no )?{name}"):
        load_pretrained(tmp_path)


def test_other_fields_have_no_effect(tmp_path):
    save(tmp_path / "plain", {})
    save(tmp_path / "changed", NO_EFFECT | NO_EFFECT_UNDECLARED)
    expected = assert_same_logits(tmp_path / "plain")
    assert assert_same_logits(tmp_path / "changed").equal(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": None, "head_dim": None},
        {"hidden_act": "swish"},
        {"sliding_window": 8, "layer_types": ["full_attention"]},
        {"sliding_window": 10_000},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.5}, "rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 7.0},
        {"rope_scaling": LLAMA3},  # transformers' default of max_position_embeddings
        {"rope_scaling": LLAMA3, "max_position_embeddings": 64},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
        {
            "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64},
            "original_max_position_embeddings": 16,
        },
        {
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
        },
    ],
)
def test_config_is_read_as_transformers_reads_it(changes, tmp_path):
    save(tmp_path, changes)
    assert_same_logits(tmp_path)


def test_absent_num_key_value_heads_are_as_many_as_heads(tmp_path):
    path = tmp_path / "config.json"
    content = config_to_dict(CONFIG) | {"num_key_value_heads": None}
    path.write_text(json.dumps(content))
    assert read_config(path) == CONFIG
    del content["num_key_value_heads"]
    path.write_text(json.dumps(content))
    assert read_config(path) == CONFIG


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "must have rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "disagree"),
        ({"rope_scaling": {"type": "default", "rope_theta": 7.0}}, "disagree"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "for all layers"),
        (
            {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}},
            "must have partial_rotary_factor",
        ),
        ({"rms_norm_eps": None}, "is not the configuration of a Llama"),
    ],
)
def test_rope_that_cannot_be_followed_is_refused(changes, message, tmp_path):
    parameters = {"rope_type": "default", "rope_theta": 500_000.0}
    save(tmp_path, {"rope_parameters": parameters, "rope_theta": None} | changes)
    with pytest.raises(lesson.CheckpointError, match=message):
        load_pretrained(tmp_path)
