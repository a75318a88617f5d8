"""The Llama example: parity with transformers, weights, generation, data, training, costs."""

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.image
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

import lesson_code as lesson
from real_world.llama import __main__ as llama
from real_world.llama import costs, parity
from real_world.llama.checkpoint import load_pretrained, read_config, save_pretrained
from real_world.llama.config import LLAMA_CONFIGS, LLAMA_TINY, LlamaConfig, RopeScaling
from real_world.llama.data import RandomWindows, byte_entropies, load_corpus, train_val_split
from real_world.llama.generate import (
    SamplingParams,
    filter_logits,
    generate,
    make_caches,
    stream_generate,
)
from real_world.llama.model import Llama, apply_rotary_emb, rope_cos_sin
from real_world.llama.tokenizer import ByteTokenizer
from real_world.llama.train import next_token_loss, train_llama

ROOT = Path(__file__).parent.parent
CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
PROMPT = torch.tensor([[1, 2, 3]])


def build(config: LlamaConfig = CONFIG, std: float = 0.0) -> Llama:
    """A model with seeded weights; with `std`, the norms' are random, too."""
    torch.manual_seed(0)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape) * std
    return model


def generated(model: Llama, prompt: torch.Tensor, n: int, **options) -> torch.Tensor:
    return torch.stack(list(generate(model, prompt, n, **options)), dim=1)


# %% Parity with transformers


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4, "rope_theta": 10_000.0},
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
        {"num_attention_heads": 6, "head_dim": 4, "hidden_size": 36, "num_hidden_layers": 3},
        {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 16), "hidden_size": 40},
    ],
)
def test_logits_gradients_and_greedy_tokens_equal_transformers(changes):
    model = build(replace(CONFIG, **changes), std=0.1)
    reference = parity.to_transformers(model)
    tokens = torch.randint(50, (2, 70))
    assert max(parity.max_abs_diff(model, reference, tokens)) <= 1e-5
    expected = reference.generate(tokens[:, :2], max_new_tokens=20, do_sample=False)[:, 2:]
    assert generated(model, tokens[:, :2], 20).equal(expected)
    assert generated(model, tokens[:, :2], 20, use_cache=False).equal(expected)


def test_parity_check_fails_for_a_different_weight():
    model = build()
    reference = parity.to_transformers(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] += 0.01
    assert min(parity.max_abs_diff(model, reference, torch.arange(40).view(2, 20))) > 1e-5


def test_bfloat16_logits_are_near_transformers_in_a_long_context():
    model = build(replace(CONFIG, rope_theta=10_000.0), std=0.2).bfloat16()
    tokens = torch.randint(50, (1, 600))
    with torch.no_grad():
        diff = model(tokens) - parity.to_transformers(model)(tokens).logits
    assert diff.abs().mean() < 0.05  # with angles computed in bfloat16: 0.2


def test_rope_angles_are_computed_in_float32():
    cos, sin = rope_cos_sin(CONFIG, 1001, 1, like=torch.zeros(1))
    cos_bfloat16, sin_bfloat16 = rope_cos_sin(CONFIG, 1001, 1, like=torch.zeros(1).bfloat16())
    assert cos_bfloat16.equal(cos.bfloat16())
    assert sin_bfloat16.equal(sin.bfloat16())


def test_rope_depends_on_relative_positions_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8)

    def score(q_position: int, k_position: int) -> torch.Tensor:
        rotated_q = apply_rotary_emb(q, *rope_cos_sin(CONFIG, q_position, 1, like=q))
        return (rotated_q * apply_rotary_emb(k, *rope_cos_sin(CONFIG, k_position, 1, k))).sum()

    torch.testing.assert_close(score(3, 5), score(103, 105), atol=1e-5, rtol=0)
    assert abs(score(3, 5) - score(3, 9)) > 1e-3


def test_attention_is_causal():
    model, tokens = build(), torch.randint(50, (1, 30))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 50
    before, after = model(tokens), model(changed)
    assert before[:, :20].equal(after[:, :20])
    assert not before[:, 20:].equal(after[:, 20:])


# %% Weights in Hugging Face's format


@pytest.mark.parametrize("tied", [True, False])
def test_weights_to_transformers_and_back(tied, tmp_path):
    from transformers import LlamaForCausalLM

    scaling = RopeScaling(8.0, 1.0, 4.0, 16)
    config = replace(CONFIG, tie_word_embeddings=tied, rope_scaling=scaling, eos_token_ids=(7, 9))
    model, tokens = build(config), torch.randint(50, (2, 40))
    save_pretrained(model, tmp_path / "ours")
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(reference(tokens).logits, model(tokens), atol=1e-6, rtol=0)
    reference.save_pretrained(tmp_path / "theirs")
    loaded = load_pretrained(tmp_path / "theirs")
    assert loaded.config == config
    assert loaded(tokens).equal(model(tokens))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_sharded_bfloat16_weights(tmp_path):
    reference = parity.to_transformers(build()).bfloat16()
    reference.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    state_dict = load_pretrained(tmp_path).state_dict()
    assert all(weight.dtype == torch.bfloat16 for weight in state_dict.values())
    assert all(state_dict[name].equal(w) for name, w in reference.state_dict().items())


def test_old_files_with_redundant_tensors(tmp_path):
    model = build(replace(CONFIG, tie_word_embeddings=True))
    save_pretrained(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors")
    assert load_pretrained(tmp_path)(PROMPT).equal(model(PROMPT))


def test_config_json_of_meta_and_its_defaults(tmp_path):
    from transformers import LlamaConfig as TransformersConfig

    path = tmp_path / "config.json"
    content = asdict(LLAMA_CONFIGS["Llama 3.1 8B"]) | {"model_type": "llama", "eos_token_id": 0}
    content["rope_scaling"]["rope_type"] = "llama3"
    path.write_text(json.dumps(content))
    assert read_config(path) == replace(LLAMA_CONFIGS["Llama 3.1 8B"], eos_token_ids=(0,))
    optional = ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling")
    path.write_text(json.dumps({key: content[key] for key in content if key not in optional}))
    config, expected = read_config(path), TransformersConfig.from_pretrained(tmp_path)
    assert config.head_dim == expected.head_dim
    assert config.num_key_value_heads == expected.num_key_value_heads
    assert config.rms_norm_eps == expected.rms_norm_eps
    assert config.rope_theta == expected.rope_parameters["rope_theta"]


def edit_config(**changes):
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def remove_norm(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_norm, r'Missing key\(s\) in state_dict: "model.norm.weight"'),
        (edit_config(num_hidden_layers=1), r"Unexpected key\(s\)"),
        (edit_config(intermediate_size=47), "size mismatch for model.layers.0.mlp.gate_proj"),
        (edit_config(model_type="mistral"), "must have model_type 'llama'"),
        (edit_config(rope_scaling={"type": "yarn"}), "must have rope_type 'default' or 'llama3'"),
        (edit_config(attention_bias=True), "must have attention_bias False"),
        (edit_config(quantization_config={"bits": 4}), "must have no quantization_config"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "is damaged"),
    ],
)
def test_folder_that_cannot_be_loaded(damage, message, tmp_path):
    save_pretrained(build(), tmp_path)
    damage(tmp_path)
    with pytest.raises(lesson.CheckpointError, match=message):
        load_pretrained(tmp_path)


def test_failed_save_keeps_the_old_weights(tmp_path, monkeypatch):
    save_pretrained(build(), tmp_path)
    old = (tmp_path / "model.safetensors").read_bytes()

    def disk_full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(build(std=1), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


MEASURE_MEMORY = """
import re, sys, torch
from real_world.llama.checkpoint import load_pretrained
def load_and_run(folder):
    load_pretrained(folder)(torch.arange(8).view(1, 8))
def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
with torch.no_grad():
    load_and_run(sys.argv[1])  # a small model: the code of PyTorch's libraries is in memory now
    before = memory("VmRSS")
    load_and_run(sys.argv[2])
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_needs_the_memory_of_one_copy_of_the_weights(tmp_path):
    save_pretrained(build().bfloat16(), tmp_path / "small")
    large = replace(CONFIG, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3)
    save_pretrained(build(large).bfloat16(), tmp_path / "large")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEASURE_MEMORY, tmp_path / "small", tmp_path / "large"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert size > 70e6
    assert 0.9 * size < int(result.stdout) < 1.3 * size


# %% Generation


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.5, None, 1.0), (1.3, 7, 1.0), (1.0, None, 0.6), (2.0, 9, 0.8)],
)
def test_filter_logits_equals_transformers(temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(6, 50) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(filter_logits(logits, temperature, top_k, top_p), expected)


def test_sampling():
    model = build()

    def tokens(*params) -> list[int]:
        return generated(model, PROMPT, 30, params=SamplingParams(*params))[0].tolist()

    assert tokens(1.0, None, 1.0, 1) == tokens(1.0, None, 1.0, 1) == tokens(1.0, 1000, 1.0, 1)
    assert tokens(1.0, None, 1.0, 1) != tokens(1.0, None, 1.0, 2)
    assert tokens(0.0) == tokens(1.0, 1) == tokens(1.0, None, 1e-9) == tokens(1e-9)
    batch = generated(model, PROMPT.repeat(4, 1), 10, params=SamplingParams(1.0))
    assert len({tuple(row) for row in batch.tolist()}) == 4


def test_kv_cache_processes_every_token_once():
    model, lengths = build(), []
    model.model.embed_tokens.register_forward_hook(lambda _, args, y: lengths.append(y.shape[1]))
    generated(model, PROMPT, 5)
    generated(model, PROMPT, 5, use_cache=False)
    assert lengths == [3, 1, 1, 1, 1, 3, 4, 5, 6, 7]


def test_several_tokens_after_the_prompt_are_an_error():
    model = build()
    caches = make_caches(model, 1, 20)
    model(PROMPT, caches)
    with pytest.raises(AssertionError, match="one token at a time"):
        model(PROMPT, caches)


def test_streamed_text_has_whole_characters_and_no_control_characters(monkeypatch):
    tokens = iter("né\x1b[2J€\n".encode() + b"\xff")
    monkeypatch.setattr("real_world.llama.generate.sample", lambda *_: torch.tensor([next(tokens)]))
    pieces = list(stream_generate(build(LLAMA_TINY), ByteTokenizer(), "A", 12, SamplingParams()))
    assert pieces == ["A", "n", "é", ".", "[", "2", "J", "€", "\n", "."]


def test_generation_with_a_tokenizer_stops_at_the_end_of_sequence(tmp_path, capsys):
    words = tokenizers.models.WordLevel({f"w{n}": n for n in range(50)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = build()
    new = generated(model, torch.tensor([[4, 7]]), 12)[0].tolist()
    model.config = replace(CONFIG, eos_token_ids=(49, new[5]))
    save_pretrained(model, tmp_path)
    arguments = ["--weights", str(tmp_path), "--prompt", "w4 w7", "--temperature", "0"]
    with pytest.raises(lesson.CheckpointError, match=r"has no tokenizer\.json"):
        llama.main(arguments)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    llama.main(arguments)
    expected = [4, 7, *new[: new.index(new[5])]]
    assert capsys.readouterr().out.split() == [f"w{n}" for n in expected]


# %% Data, training and costs


def test_entropies_of_known_distributions():
    alternating = torch.tensor([0, 1] * 500, dtype=torch.uint8)
    assert byte_entropies(alternating) == (pytest.approx(math.log(2)), pytest.approx(0, abs=1e-5))
    torch.manual_seed(0)
    dice = torch.randint(6, (200_000,), dtype=torch.uint8)
    assert byte_entropies(dice) == (pytest.approx(math.log(6), abs=1e-3),) * 2


def test_corpus_has_no_duplicate_paragraphs():
    train_text, validation_text = train_val_split(load_corpus())
    assert len(validation_text) == len(load_corpus()) // 10
    paragraphs = bytes(torch.cat((train_text, validation_text)).tolist()).decode().split("\n\n")
    assert len(paragraphs) == len(set(paragraphs)) > 1000


def test_windows_cover_the_text_and_y_is_the_next_byte():
    text = torch.arange(100, dtype=torch.uint8)
    batches = list(RandomWindows(text, batch_size=16, context_length=20, steps=30, seed=1))
    assert len(batches) == 30
    assert all(X.shape == y.shape == (16, 20) and y.equal(X + 1) for X, y in batches)
    starts = torch.stack([X[:, 0] for X, _ in batches])
    assert (starts.min(), starts.max()) == (0, 79)
    again, other = (next(iter(RandomWindows(text, 16, 20, 1, seed)))[0] for seed in (1, 2))
    assert batches[0][0].equal(again)
    assert not batches[0][0].equal(other)


def test_train_is_the_lessons(monkeypatch):
    calls = []
    train = lesson.train
    monkeypatch.setattr(lesson, "train", lambda *args, **_: calls.append(args) or train(*args, **_))
    model = build(replace(CONFIG, vocab_size=256))
    losses = train_llama(model, load_corpus(), 20, seed=0)
    assert [(args[0], args[2]) for args in calls] == [(model, next_token_loss)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> tuple[Path, str]:
    """The output folder and the printed output of the example with a short training."""
    folder = tmp_path_factory.mktemp("story")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        llama.main(["--device", "cpu", "--steps", "100", "--output", str(folder)])
    return folder, output.getvalue()


def test_example_beats_the_unigram_entropy(story):
    folder, output = story
    _, validation_text = train_val_split(load_corpus())
    unigram, bigram = byte_entropies(validation_text)
    assert float(re.search(r"validation loss +([\d.]+)", output)[1]) < unigram - 0.5
    assert float(re.search(r"bigram entropy +([\d.]+)", output)[1]) == pytest.approx(
        bigram, abs=1e-4
    )
    assert output.count(" ok\n") == 9
    assert len(re.findall(r"^    step +\d+    loss", output, re.MULTILINE)) == 10
    assert matplotlib.image.imread(folder / "llama.png").shape == (480, 1440, 4)


def test_prompt_continues_with_the_trained_model(story, capsys):
    folder, _ = story
    texts = []
    for seed in ("1", "1", "2"):
        llama.main(["--output", str(folder), "--prompt", "The é", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("The é")
    assert len(texts[0]) > 200
    assert texts[0] == texts[1] != texts[2]


def test_validation_loss_that_is_too_high_fails_the_check(monkeypatch, tmp_path):
    monkeypatch.setattr(llama, "train_llama", lambda model, *_: [5.5])
    with pytest.raises(lesson.CheckFailed, match="validation loss"):
        llama.main(["--device", "cpu", "--output", str(tmp_path), "--max-new-tokens", "1"])


def test_costs_follow_from_the_configuration():
    published = [8_030_261_248, 70_553_706_496, 405_853_388_800]
    assert [costs.num_parameters(config) for config in LLAMA_CONFIGS.values()] == published
    for tied in (True, False):
        model = build(replace(CONFIG, tie_word_embeddings=tied))
        assert costs.num_parameters(model.config) == sum(p.numel() for p in model.parameters())
        assert costs.count_flops(model, 30) == 30 * costs.flops_per_token(model.config, 30)
    cache = make_caches(Llama(LLAMA_TINY).bfloat16(), 1, 1)
    size = sum(2 * (layer.k_cache.numel() + layer.v_cache.numel()) for layer in cache)
    assert costs.kv_cache_bytes_per_token(LLAMA_TINY) == size


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", ""],
        ["--weights", "x"],
        ["--steps", "19"],
        ["--top-k", "0"],
        ["--top-p", "1.5"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
    ],
)
def test_wrong_option(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        llama.main(arguments)
    assert error.value.code == 2
    assert f"{arguments[0]}" in capsys.readouterr().err.splitlines()[-1]


def test_prompt_before_training(tmp_path):
    with pytest.raises(lesson.CheckpointError, match="no trained model"):
        llama.main(["--output", str(tmp_path), "--prompt", "a"])
