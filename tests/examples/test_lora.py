"""The LoRA example: layers, adapters compared with peft's, fine-tuning of both models."""

import copy
import json
import math
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import lesson_code as lesson
from lesson_code import CheckpointError
from real_world.common import CheckFailed
from real_world.llama.checkpoint import load_pretrained, save_pretrained
from real_world.llama.config import LLAMA_TINY
from real_world.llama.model import Llama
from real_world.llama.parity import CONFIGS, to_transformers
from real_world.llama.train import next_token_loss
from real_world.lora import verify
from real_world.lora.adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from real_world.lora.config import FinetuneConfig
from real_world.lora.lora import LoraConfig, LoraLinear, apply_lora, merge_lora
from real_world.lora.stable_diffusion import TARGET_MODULES
from real_world.lora.verify import add_adapter, check_adapter, count_parameters
from real_world.stable_diffusion.unet import UNet, UNetInput

CONFIG = LoraConfig(("q_proj", "v_proj"), r=4, lora_alpha=6)
TOKENS = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(0))


def make_llama() -> Llama:
    torch.manual_seed(0)
    return Llama(CONFIGS["6 heads, 2 KV heads"])


def randomize_adapter(model: nn.Module) -> None:
    """Give A and B values as after training."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)


@pytest.fixture
def model() -> Llama:
    """Return a Llama with an adapter that changes the logits."""
    model = make_llama()
    apply_lora(model, CONFIG)
    randomize_adapter(model)
    assert not model(TOKENS).allclose(make_llama()(TOKENS))
    return model


@pytest.fixture
def folder(model, tmp_path):
    """Return the folder of the model's adapter."""
    save_adapter(model, CONFIG, tmp_path)
    return tmp_path


# Layers


def test_update_is_zero_before_training():
    model = make_llama()
    logits = model(TOKENS)
    apply_lora(model, CONFIG)
    assert sum(isinstance(module, LoraLinear) for module in model.modules()) == 6
    assert model(TOKENS).equal(logits)


def test_only_the_adapter_is_trained(model):
    model(TOKENS).sum().backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    layers = [
        f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in ("q_proj", "v_proj")
    ]
    expected = {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"}
    assert names == expected
    per_layer = (96 + 96) + (96 + 32)  # in_features + out_features of q_proj and of v_proj
    assert count_parameters(model, trainable_only=True) == 3 * 4 * per_layer


def test_layer_with_a_bias_and_dtype():
    linear = nn.Linear(5, 7, dtype=torch.float64)
    layer = LoraLinear(linear, r=2, lora_alpha=3)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    weight = linear.weight + 3 / 2 * layer.lora_B.weight @ layer.lora_A.weight
    expected = nn.functional.linear(x, weight, linear.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.merge()(x), expected)


@pytest.mark.parametrize(("name", "count"), [("self_attn.q_proj", 3), ("lm_head", 1)])
def test_target_modules_match_by_suffix(name, count):
    model = make_llama()
    apply_lora(model, LoraConfig((name,)))
    assert sum(isinstance(module, LoraLinear) for module in model.modules()) == count


def test_merging_does_not_change_memory_mapped_files(tmp_path):
    save_pretrained(make_llama(), tmp_path)
    saved = (tmp_path / "model.safetensors").read_bytes()
    model = load_pretrained(tmp_path)
    apply_lora(model, CONFIG)
    randomize_adapter(model)
    merge_lora(model)
    assert (tmp_path / "model.safetensors").read_bytes() == saved


# Adapters, compared with peft's


def test_peft_loads_our_adapter_and_merges_it_to_the_same_weights(model, folder):
    theirs = peft.PeftModel.from_pretrained(to_transformers(make_llama()), folder)
    assert theirs(TOKENS).logits.equal(model(TOKENS))
    merge_lora(model)
    merged = theirs.merge_and_unload().state_dict()
    weights = model.state_dict()
    assert merged.keys() == weights.keys()
    assert all(merged[name].equal(weights[name]) for name in weights)


@pytest.mark.parametrize("init", [True, "orthogonal"])
def test_load_adapter_saved_by_peft(tmp_path, init):
    config = peft.LoraConfig(
        r=6, lora_alpha=5, target_modules=["k_proj", "down_proj"], init_lora_weights=init
    )
    theirs = peft.get_peft_model(to_transformers(make_llama()), config)
    randomize_adapter(theirs)
    theirs.save_pretrained(tmp_path)
    ours = make_llama()
    loaded = load_adapter(ours, tmp_path)
    assert ours(TOKENS).equal(theirs(TOKENS).logits)
    assert not ours(TOKENS).allclose(make_llama()(TOKENS))
    assert (loaded.r, loaded.lora_alpha) == (6, 5)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"rank_pattern": {"q_proj": 3}}])
def test_other_methods_of_peft_raise_checkpoint_error(option, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], **option)
    peft.get_peft_model(to_transformers(make_llama()), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
        load_adapter(make_llama(), tmp_path)


def test_peft_loads_the_adapter_of_a_unet(tmp_path):
    torch.manual_seed(0)
    unet = UNet()
    base = copy.deepcopy(unet)
    config = LoraConfig(TARGET_MODULES)
    apply_lora(unet, config)
    randomize_adapter(unet)
    save_adapter(unet, config, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    inputs = UNetInput(torch.randn(2, 2, 4, 4), torch.tensor([1, 500]), torch.tensor([3, 5]))
    assert theirs(inputs).equal(unet(inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_rslora": True}, "not supported: use_rslora is true"),
        ({"alpha_pattern": {"q_proj": 3}}, "not supported: alpha_pattern is"),
        ({"init_lora_weights": "pissa"}, 'not supported: init_lora_weights is "pissa"'),
        ({"modules_to_save": ["lm_head"]}, "not supported: modules_to_save is"),
        ({"bias": "all"}, 'not supported: bias is "all"'),
        ({"target_modules": "all-linear"}, "target_modules is not a list"),
        ({"peft_type": "IA3"}, 'peft_type is "IA3"'),
        ({"r": 5}, r"lora_A.weight is \(4, 96\) instead of \(5, 96\)"),
        ({"r": 0}, "is not the configuration of an adapter"),
        ({"r": "8"}, "is not the configuration of an adapter"),
        ({"target_modules": ["q_proj"]}, r"do not match the model: .*v_proj\.lora_"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, r"match .*o_proj\.lora_"),
        ({"target_modules": ["proj"]}, "no linear layer is named proj"),  # but q_proj
    ],
)
def test_other_adapters_raise_checkpoint_error(folder, change, message):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model = make_llama()
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, folder)
    modules = {type(module) for module in model.modules()}
    assert LoraLinear not in modules, "a refused adapter changes nothing"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapter_on_an_adapter_is_refused(folder):
    model = make_llama()
    apply_lora(model, LoraConfig(("o_proj",)))
    with pytest.raises(CheckpointError, match="has an adapter already: merge it first"):
        load_adapter(model, folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapter_of_a_model_in_half_precision_is_trained_in_float32(dtype):
    """In float16, the loss would be nan after some steps; in bfloat16, small updates are lost."""
    model = make_llama().to(dtype)
    apply_lora(model, CONFIG)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    before = [parameter.clone() for parameter in trained]
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    losses = lesson.train(model, [(TOKENS, TOKENS)], next_token_loss, optimizer, epochs=40)
    assert all(math.isfinite(loss) for loss in losses)
    moved = [(new != old).float().mean() for new, old in zip(trained, before, strict=True)]
    assert min(moved) > 0.9
    logits = model(TOKENS)
    merge_lora(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    torch.testing.assert_close(model(TOKENS), logits, atol=0.05, rtol=0)


def test_merged_lm_head_is_saved_beside_a_tied_embedding(tmp_path):
    torch.manual_seed(0)
    model = Llama(LLAMA_TINY)
    apply_lora(model, LoraConfig(("lm_head",)))
    randomize_adapter(model)
    with pytest.raises(CheckpointError, match="call merge_lora"):
        save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    merge_lora(model)
    save_pretrained(model, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    assert not loaded.config.tie_word_embeddings
    assert loaded(TOKENS).equal(model(TOKENS))


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("content", [lambda content: content[:-20], lambda _: b"{}"])
def test_damaged_files_raise_checkpoint_error(folder, name, content):
    (folder / name).write_bytes(content((folder / name).read_bytes()))
    with pytest.raises(CheckpointError, match=name):
        load_adapter(make_llama(), folder)


def test_check_finds_a_changed_base_model(model, folder):
    check_adapter(model, make_llama(), folder, TOKENS)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    with pytest.raises(CheckFailed, match="weights of the base model"):
        check_adapter(model, make_llama(), folder, TOKENS)


def with_other_weights(model: nn.Module, config: LoraConfig) -> None:
    apply_lora(model, config)
    randomize_adapter(model)


def load_with_other_scaling(model: nn.Module, folder: Path) -> None:
    load_adapter(model, folder)
    next(module for module in model.modules() if isinstance(module, LoraLinear)).scaling = 7


def finetune(model: Llama, folder: Path) -> None:
    config = add_adapter(model, CONFIG.target_modules, FinetuneConfig(rank=4), TOKENS)
    randomize_adapter(model)
    save_adapter(model, config, folder)
    check_adapter(model, make_llama(), folder, TOKENS)


@pytest.mark.parametrize(
    ("check", "module", "name", "broken"),
    [
        ("output before training", verify, "apply_lora", with_other_weights),
        ("loaded adapter", verify, "load_adapter", load_with_other_scaling),
        ("merged adapter", LoraLinear, "merge", lambda layer: layer.base_layer),
    ],
)
def test_broken_part_fails_its_check(check, module, name, broken, tmp_path, monkeypatch):
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(CheckFailed, match=f"check failed: {check} "):
        finetune(make_llama(), tmp_path)
