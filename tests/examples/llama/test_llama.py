"""The Llama example: parity with transformers, data, training, options."""

import contextlib
import io
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch
from llama_models import CONFIG, build, generated
from processes import run
from readmes import REAL_WORLD
from torch._dynamo.utils import counters

import lesson_code as lesson
from real_world.common import CheckFailed
from real_world.llama import __main__ as llama
from real_world.llama import parity
from real_world.llama.checkpoint import save_pretrained
from real_world.llama.config import LLAMA_TINY
from real_world.llama.data import RandomWindows, byte_entropies, load_corpus, train_val_split
from real_world.llama.sampling import SamplingParams
from real_world.llama.train import TrainConfig, evaluate, next_token_loss, train_llama

# %% Parity with transformers


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, num_hidden_layers=2, rope_theta=10_000.0, rms_norm_eps=1e-3),
        replace(CONFIG, num_key_value_heads=1, tie_word_embeddings=True),
        replace(CONFIG, num_attention_heads=6, num_key_value_heads=2, head_dim=8),
        replace(CONFIG, num_key_value_heads=2, rope_scaling=parity.SCALING),
    ],
)
def test_logits_gradients_and_greedy_tokens_equal_transformers(config):
    model = build(config, std=0.05)
    reference = parity.to_transformers(model)
    tokens = torch.randint(97, (2, 70))
    assert max(parity.max_abs_diff(model, reference, tokens)) <= 1e-5
    expected = reference.generate(tokens[:, :2], max_new_tokens=20, do_sample=False)[:, 2:]
    assert generated(model, tokens[:, :2], 20).equal(expected)
    assert generated(model, tokens[:, :2], 20, use_cache=False).equal(expected)


def test_parity_check_detects_a_different_weight():
    model = build()
    reference = parity.to_transformers(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] += 0.01
    assert min(parity.max_abs_diff(model, reference, torch.arange(40).view(2, 20))) > 1e-5


def test_bfloat16_logits_are_near_transformers_in_a_long_context():
    model = build(replace(CONFIG, rope_theta=10_000.0), std=0.1).bfloat16()
    tokens = torch.randint(97, (1, 600))
    with torch.no_grad():
        diff = model(tokens) - parity.to_transformers(model)(tokens).logits
    assert diff.abs().mean() < 0.02  # RMSNorm rounds otherwise; with angles in bfloat16, 0.027


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
    paragraphs = bytes([*train_text.tolist(), *validation_text.tolist()]).decode().split("\n\n")
    assert len(paragraphs) == len(set(paragraphs)) > 1000


def test_evaluate_is_the_mean_loss_of_the_next_byte():
    model = build(replace(CONFIG, vocab_size=256), std=0.1)
    text = load_corpus()[:65]  # 4 windows of 16 bytes, and the byte after the fourth
    losses = []
    for start in (0, 16, 32, 48):
        window = text[start : start + 17].long()
        probabilities = model(window[None, :16])[0].softmax(dim=-1)  # (16, 256)
        losses += [-probabilities[i, window[i + 1]].log().item() for i in range(16)]
    config = TrainConfig(context_length=16, batch_size=3)
    expected = pytest.approx(sum(losses) / 64, rel=1e-5)
    assert evaluate(model, text, config) == expected
    assert evaluate(model, load_corpus()[:70], config) == expected


def test_windows_cover_the_text_and_y_is_the_next_byte():
    text = torch.arange(100, dtype=torch.uint8)
    batches = list(RandomWindows(text, batch_size=16, context_length=20, steps=30, seed=1))
    assert len(batches) == 30
    assert all(X.shape == y.shape == (16, 20) and y.equal(X + 1) for X, y in batches)
    starts = torch.stack([X[:, 0] for X, _ in batches])
    assert (starts.min(), starts.max()) == (0, 79)
    again, other = [next(iter(RandomWindows(text, 16, 20, 1, seed)))[0] for seed in (1, 2)]
    assert batches[0][0].equal(again)
    assert not batches[0][0].equal(other)


def test_train_is_the_lessons(monkeypatch, tmp_path):
    calls, train = [], lesson.train

    def recording_train(*args, **kwargs):
        calls.append(args)
        return train(*args, **kwargs)

    monkeypatch.setattr(lesson, "train", recording_train)
    model = build(replace(CONFIG, vocab_size=256))
    losses = train_llama(model, load_corpus(), TrainConfig(steps=20), tmp_path)
    assert [(args[0], args[2]) for args in calls] == [(model, next_token_loss)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == losses
    assert [line["step"] for line in lines] == list(range(1, 21))
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] < rates[1] == max(rates) == 0.003 > rates[2], "warm-up for two steps"


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> tuple[Path, str]:
    """Return the output folder and the printed output of the example with a short training."""
    folder = tmp_path_factory.mktemp("story")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        llama.main(["--device", "cpu", "--steps", "150", "--output", str(folder)])
    return folder, output.getvalue()


def test_example_learns_more_than_byte_frequencies(story):
    folder, output = story
    unigram = float(re.search(r"unigram entropy of validation +([\d.]+)", output)[1])
    assert float(re.search(r"validation loss +([\d.]+)", output)[1]) < unigram - 0.3
    assert output.count(" ok\n") == 9
    assert len(re.findall(r"^    step +\d+    loss", output, re.MULTILINE)) == 10
    assert matplotlib.image.imread(folder / "llama.png").shape == (480, 1440, 4)


def test_prompt_is_continued_by_the_trained_model(story, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        llama.main(["--output", str(story[0]), "--prompt", "The é", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("The é")
    assert len(texts[0]) > 200
    assert texts[0] == texts[1] != texts[2]


def test_several_prompts_are_one_batch(story, capsys):
    options = ["--output", str(story[0]), "--temperature", "0", "--max-new-tokens", "40"]
    texts = []
    for prompt in ("The", "A class"):
        llama.main([*options, "--prompt", prompt])
        texts.append(capsys.readouterr().out)
    llama.main([*options, "--prompt", "The", "--prompt", "A class"])
    assert capsys.readouterr().out == f"{texts[0]}\n{texts[1]}\n"


def test_compiled_text_is_the_same(story, capsys):
    options = ["--output", str(story[0]), "--temperature", "0", "--max-new-tokens", "40"]
    llama.main([*options, "--prompt", "The"])
    expected = capsys.readouterr().out
    counters["stats"].clear()
    llama.main([*options, "--prompt", "The", "--compile"])
    assert capsys.readouterr().out == expected
    assert counters["stats"]["unique_graphs"] == 1


def test_model_that_does_not_learn_fails_the_check(monkeypatch, tmp_path):
    monkeypatch.setattr(llama, "train_llama", lambda model, *_: [5.5])
    with pytest.raises(CheckFailed, match="validation loss"):
        llama.main(["--device", "cpu", "--output", str(tmp_path), "--max-new-tokens", "1"])


def test_model_of_somebody_else_is_not_replaced(tmp_path):
    save_pretrained(build(), tmp_path / "llama")
    before = (tmp_path / "llama" / "model.safetensors").read_bytes()
    with pytest.raises(CheckFailed, match="llama has a model that was not trained here"):
        llama.main(["--device", "cpu", "--output", str(tmp_path)])
    assert (tmp_path / "llama" / "model.safetensors").read_bytes() == before


def test_printed_costs_are_those_of_the_readme(story):
    readme = (REAL_WORLD / "llama" / "README.md").read_text(encoding="utf-8")
    shown = readme[readme.index("  Costs at a context") : readme.index("\n  figure saved to")]
    assert shown in story[1]


@pytest.mark.parametrize(
    "argument",
    [
        "--prompt=",
        "--weights=x",
        "--dtype=bfloat16",
        "--compile",
        "--pretrained=smollm2",
        "--pretrained=gpt2",
        "--no-chat",
        "--stop=x",
        "--prompt=a --stop=",
        "--prompt=\udcff",
        "--max-new-tokens=200000",
        "--steps=19",
        "--top-p=1.5",
        "--temperature=nan",
        "--learning-rate=-1",
        "--min-p=2",
        "--prompt=a --learning-rate=1",
        "--context-length=9000",
    ],
)
def test_wrong_option(argument, capsys):
    with pytest.raises(SystemExit) as error:
        llama.main(argument.split())
    assert error.value.code == 2
    assert argument.split()[-1].partition("=")[0] in capsys.readouterr().err.splitlines()[-1]


def test_dtype_of_the_command_line(tmp_path, monkeypatch):
    dtypes = []

    def record(model, *_):
        dtypes.append((model.lm_head.weight.dtype, model.model.norm.weight.dtype))
        return iter(())

    monkeypatch.setattr(llama, "stream_generate", record)
    save_pretrained(build(LLAMA_TINY), tmp_path)
    for name in ("auto", "float32", "bfloat16", "float16", "int8"):
        llama.main(["--weights", str(tmp_path), "--prompt", "a", "--dtype", name])
    expected = [torch.float32, torch.float32, torch.bfloat16, torch.float16]
    assert dtypes == [*zip(expected, expected, strict=True), (torch.int8, torch.bfloat16)]


def test_recommended_sampling_is_the_default(tmp_path, monkeypatch, capsys):
    used = []
    monkeypatch.setattr(llama, "stream_generate", lambda *args: used.append(args[4]) or iter(()))
    save_pretrained(build(LLAMA_TINY), tmp_path)
    recommended = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50}
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    options = ["--weights", str(tmp_path), "--prompt", "a"]
    llama.main(options)
    assert capsys.readouterr().err.startswith("generation_config.json: {'temperature': 0.6, ")
    llama.main([*options, "--temperature", "0", "--seed", "3"])
    expected = SamplingParams(temperature=0.6, top_k=50, top_p=0.9)
    assert used == [expected, replace(expected, temperature=0.0, seed=3)]
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended | {"do_sample": False}))
    llama.main(options)
    assert used[2] == SamplingParams(temperature=0.8), "the example's own default"
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended | {"top_p": 2}))
    with pytest.raises(lesson.CheckpointError, match="top_p must be"):
        llama.main(options)


def test_threads_that_wait_are_set_before_torch_is_imported():
    code = "import os, sys, real_world.llama; print(os.environ['GOMP_SPINCOUNT'], *sys.modules)"
    command = ["env", "-u", "GOMP_SPINCOUNT", sys.executable, "-c", code]
    printed = run(*command).stdout.split()
    assert printed[0] == "1000"
    assert "torch" not in printed


def test_prompt_before_training(tmp_path):
    with pytest.raises(lesson.CheckpointError, match="no trained model"):
        llama.main(["--output", str(tmp_path), "--prompt", "a"])
