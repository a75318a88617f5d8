"""The benchmark example: how it measures, that it compares equal work, and the READMEs' tables."""

import json
import shutil
import sys
from functools import partial

import matplotlib.image
import pytest
import torch
from starlette.testclient import TestClient
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lesson_code as lesson
from real_world.benchmark import (
    cuda,
    fastapi_app,
    harness,
    inference,
    litserve_app,
    llama,
    llama_cuda,
    scaling,
    serve,
    step,
)
from real_world.benchmark.__main__ import load_entry, main
from real_world.benchmark.frameworks import FRAMEWORKS, Size, build_training
from real_world.llama import parity

TINY = Size(samples=60, in_features=7, hidden_size=12, num_classes=4)


# Measuring


def test_interleave_alternates():
    calls = []

    def measure(name: str) -> int:
        calls.append(name)
        return len(calls)

    measured = harness.interleave({"a": partial(measure, "a"), "b": partial(measure, "b")}, 3, "")
    assert calls == ["a", "b"] * 3
    assert measured == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_summary_is_the_median_and_the_range():
    assert harness.summarize([9, 1, 2.00004]) == {"median": 2, "min": 1, "max": 9}


@pytest.mark.parametrize("script", ["exit('full')", "print('', flush=True); input(); exit('full')"])
def test_worker_that_ends_raises(script):
    with (
        pytest.raises(RuntimeError, match="ended with status 1:\nfull"),
        harness.worker([sys.executable, "-c", script]) as measure,
    ):
        measure()


# Equal work


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_frameworks_have_equal_losses(framework):
    losses = [float(loss) for loss in build_training(framework, TINY)(6)]
    expected = build_training("PyTorch, train()", TINY)(6)
    if framework.startswith("scikit-learn"):  # draws its own initial weights
        assert losses[-1] < losses[0]
    elif framework.endswith("1 epoch"):  # returns the mean loss of the epoch
        assert losses == [pytest.approx(sum(expected) / 6, abs=1e-5)]
    else:
        assert losses == pytest.approx(expected, abs=1e-5)


GPU = torch.cuda.is_available()


@pytest.mark.parametrize("name", cuda.VARIANTS if GPU else ["PyTorch, train()", "bfloat16"])
def test_cuda_variants_have_equal_losses(name):
    variant = cuda.VARIANTS[name]
    device = torch.device("cuda" if GPU else "cpu")
    losses = cuda.build_training(variant, TINY, device)(6)
    expected = build_training("PyTorch, train()", TINY)(6)
    is_float32 = variant.dtype == torch.float32
    assert losses == pytest.approx(expected, abs=1e-5 if is_float32 else 0.01)
    assert (losses == pytest.approx(expected, abs=1e-5)) == is_float32


def test_llama_candidates_do_the_same():
    """Those that are compiled have tests of their own."""
    torch.manual_seed(0)
    model = llama_cuda.build(parity.BASE, torch.device("cpu")).float()
    reference = parity.to_transformers(model)
    prompt = torch.randint(model.config.vocab_size, (1, 9))
    generation = llama_cuda.generation_candidates(model, reference, prompt)
    new = torch.tensor(generation["this example"](5)).T  # (1, 5)
    assert torch.cat((prompt, new), dim=1).tolist() == generation["transformers"](5)
    training = llama_cuda.training_candidates(model, reference, prompt)
    assert training["this example"]() > 0
    assert training["transformers"]() > 0
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), atol=1e-5, rtol=0)


def test_llama_efficiencies():
    weights, flops = 2 * 1_235_746_816, 3 * (2 * 1_235_746_816 + 4 * 16 * 2048 * 2048)
    results = {
        "gpu": "A GPU",
        "peaks": {"bandwidth": {"median": 100 * weights}, "matmul": {"median": 1000 * flops}},
        "generation": {"1B": {"compiled": {"first": {"median": 1}, "next": {"median": 0.02}}}},
        "training": {"eager": {"median": 250}},
    }
    table = llama_cuda.table(results)
    assert "| 1B, compiled | 1,000 | 50.0 | 50% |" in table
    assert "| eager | 250 | 25% |" in table


def test_flops_are_those_that_pytorch_counts():
    X, y = lesson.make_synthetic_data(TINY.samples, TINY.in_features, TINY.num_classes)
    model = lesson.SimpleClassifier(*TINY[1:])
    optimizer = torch.optim.Adam(model.parameters())
    with FlopCounterMode(display=False) as counter:
        lesson.train(model, [(X, y)], nn.CrossEntropyLoss(), optimizer, epochs=1)
    assert counter.get_total_flops() == TINY.flops


def test_other_servers_answer_like_predict(tmp_path, monkeypatch):
    model = lesson.SimpleClassifier()
    optimizer = torch.optim.Adam(model.parameters())
    lesson.save_checkpoint(tmp_path / "lesson.pt", model, optimizer, [])
    monkeypatch.setattr(fastapi_app, "OUTPUT", tmp_path)
    monkeypatch.setattr(litserve_app, "OUTPUT", tmp_path)
    request = json.loads(serve.BODY)
    answers = [TestClient(fastapi_app.create_app()).post("/predict", json=request).json()]
    api = litserve_app.Predict(max_batch_size=2, batch_timeout=1)
    api.setup("cpu")
    other = {"features": [[1, 2, 3, 4], [5, 6, 7, 8]]}
    batch = api.batch([api.decode_request(other), api.decode_request(request)])
    answers.append(api.encode_response(api.unbatch(api.predict(batch))[1]))
    classes, probabilities = lesson.predict(model, torch.tensor(request["features"]))
    for answer in answers:
        assert answer["classes"] == classes.tolist()
        torch.testing.assert_close(torch.tensor(answer["probabilities"]), probabilities)


# Entries, with fewer candidates


def test_step(monkeypatch, tmp_path):
    monkeypatch.setattr(step, "FRAMEWORKS", [step.BASELINE])
    monkeypatch.setattr(step, "SIZES", {"lesson": step.SIZES["lesson"]})
    results = step.measure(quick=True)
    assert list(results["steps"]["lesson"]) == [step.BASELINE]
    assert "| layer sizes | 4-16-3 |  |" in step.table(results)
    step.plot(results, tmp_path / "step.png")


def test_inference(monkeypatch, tmp_path):
    """With a stand-in for the C++ program, which takes a minute to build."""
    monkeypatch.setattr(inference, "ALL_FORMATS", (inference.FORMATS[0], inference.ONNX))
    eager = lesson.SimpleClassifier().requires_grad_(False).eval()
    rows = torch.randn(1024, 4)
    models = inference.load_formats(eager, rows, tmp_path)  # checks the logits
    script = "import sys; print('ready', flush=True); [print(3e-6, flush=True) for _ in sys.stdin]"
    cpp = [sys.executable, "-c", script]
    with inference.one_core():
        assert torch.get_num_threads() == 1
        times = inference.time_formats(models, rows[:64], cpp, quick=True)
    assert list(times) == ["eager", "TorchScript", "ONNX Runtime", inference.FROM_CPP]
    assert times[inference.FROM_CPP]["median"] == 3e-6
    assert times["ONNX Runtime"]["median"] > 0


def test_scaling_on_two_processes():
    assert scaling.time_step(scaling.Run("lesson", 100, processes=2, threads=1)) > 0


def test_llama_writes_results_and_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "DOCS", tmp_path)
    monkeypatch.setattr(harness, "EXAMPLES", tmp_path)
    eager = {name: variant for name, variant in llama.VARIANTS.items() if not variant[1]}
    monkeypatch.setattr(llama, "VARIANTS", eager)
    monkeypatch.setattr(llama, "LOSS_TOKENS", 513)
    monkeypatch.setattr(llama, "PROMPT_LENGTH", 16)
    monkeypatch.setattr(llama, "ANSWER_LENGTH", 3)
    (tmp_path / "benchmark.json").write_text('{"serve": {}}')
    readme = tmp_path / "llama" / "README.md"
    readme.parent.mkdir()
    readme.write_text("<!-- table llama -->\n<!-- end -->\n")
    main(["llama", "--quick", "--write"])
    stored = json.loads((tmp_path / "benchmark.json").read_text())
    assert list(stored) == ["serve", "llama"]
    assert stored["llama"]["quick"]
    table = load_entry("llama").table(stored["llama"]["results"])
    assert readme.read_text() == f"<!-- table llama -->\n{table}\n<!-- end -->\n"
    assert table in capsys.readouterr().out


def test_render(tmp_path, monkeypatch):
    shutil.copy(harness.DOCS / "benchmark.json", tmp_path)
    monkeypatch.setattr(harness, "DOCS", tmp_path)
    monkeypatch.setattr(harness, "EXAMPLES", tmp_path)
    entries = ["inference", "scaling", "serve"]
    for entry in entries:
        harness.readme_path(entry).parent.mkdir()
        harness.readme_path(entry).write_text(f"<!-- table {entry} -->\n<!-- end -->\n")
    main([*entries, "--render"])
    for entry in entries:
        assert harness.readme_path(entry).read_text().count("\n|") > 5
        assert matplotlib.image.imread(tmp_path / f"{entry}.png").shape[1] > 900


# Tables


def test_replace_table_changes_only_its_own():
    text = "a\n<!-- table x -->\nold\n<!-- end -->\nb\n<!-- table y -->\n<!-- end -->\n"
    text = harness.replace_table(text, "x", "new")
    assert text == "a\n<!-- table x -->\nnew\n<!-- end -->\nb\n<!-- table y -->\n<!-- end -->\n"
    assert "<!-- table y -->\n| 1 |\n<!-- end -->" in harness.replace_table(text, "y", "| 1 |")
    with pytest.raises(ValueError, match="found 0"):
        harness.replace_table(text, "z", "new")


@pytest.mark.parametrize("entry", sorted(harness.load_results().keys()))
def test_readme_shows_the_results(entry):
    stored = harness.load_results()[entry]
    readme = harness.readme_path(entry).read_text()
    assert not stored["quick"]
    assert readme == harness.replace_table(
        readme, entry, load_entry(entry).table(stored["results"])
    )
