"""The benchmark example: how it measures, and the tables and figures."""

import json
import os
import shutil
import sys
import time
import timeit
from functools import partial

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import lesson_code as lesson
from real_world.benchmark import (
    cuda,
    frameworks,
    harness,
    inference,
    llama,
    scaling,
    step,
)
from real_world.benchmark.__main__ import load_entry, main
from real_world.benchmark.frameworks import Size

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


def test_summary_is_the_median_and_the_range_with_four_digits():
    values = [98_765.4, 1.23446, 2.34567, 0.00123456, 3.45678]
    assert harness.summarize(values) == {"median": 2.346, "min": 0.001235, "max": 98_770}


class Clock:
    """A clock that only sleep() advances."""

    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Replace the clock that the benchmarks and timeit read."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(timeit, "timeit", partial(timeit.timeit, timer=clock))
    return clock


def test_times_are_per_step_and_per_call(clock, monkeypatch, capsys):
    assert harness.time_call(lambda: clock.sleep(3)) == 3
    assert cuda.time_step(lambda steps: clock.sleep(0.5 * steps), 4) == 0.5
    assert inference.time_forward(lambda batch: clock.sleep(0.25), torch.zeros(1), 8) == 0.25
    first_and_next = llama.time_first_and_next(lambda count: clock.sleep(2 + 0.5 * count), 4)
    assert first_and_next == (2.5, 0.5)
    monkeypatch.setattr(frameworks, "build_training", lambda *_: lambda n: clock.sleep(0.125 * n))
    monkeypatch.setattr(sys, "stdin", ["\n", "\n"])
    frameworks.main("PyTorch, train()", TINY)
    assert capsys.readouterr().out == "ready\n0.125\n0.125\n"


def test_speed_of_equal_matrix_products(monkeypatch):
    products = []
    monkeypatch.setattr(harness, "time_call", lambda product: products.append(product()) or 0.5)
    monkeypatch.setattr(step, "PAUSE", 0)
    speeds = step.time_matmul(rounds=1, n=50)
    for product in products:
        torch.testing.assert_close(torch.tensor(np.asarray(product)), products[0])
    assert [speed["median"] for speed in speeds.values()] == [500_000] * 4  # 2 * 50^3 in 0.5 s


@pytest.mark.parametrize("script", ["exit('full')", "print('', flush=True); input(); exit('full')"])
def test_worker_that_ends_raises(script):
    with (
        pytest.raises(RuntimeError, match="ended with status 1:\nfull"),
        harness.worker([sys.executable, "-c", script]) as measure,
    ):
        measure()


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
        assert not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) == 1
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
    monkeypatch.setattr(llama, "REFERENCES", {"transformers, float32": False})
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


# Tables and figures


def test_numbers_worked_out_by_hand():
    numbers = [0.012345, 0.999, 1.0, 9.876, 12.34, 123.4, 1234.5]
    expected = ["0.0123", "0.999", "1.00", "9.88", "12.3", "123", "1,234"]
    assert [harness.format_number(number) for number in numbers] == expected
    times = [harness.format_time(0.00125, unit) for unit in ("s", "ms", "µs")]
    assert times == ["0.00125", "1.25", "1,250"]
    results = {"a": {"x": {"median": 0.002}, "y": {"median": 0.003}}}
    rows = harness.time_rows(results, {"a": "ms"}, at="a", baseline="x")
    assert rows == [["x", "2.00", "1.00 x"], ["y", "3.00", "1.50 x"]]


def test_speedup_is_in_samples_per_second():
    one, two, twice, small = (0.4, 0.25, 0.5, 0.001)
    results = {
        "wide, 1 process": {"median": one},
        "wide, 2 processes": {"median": two},
        "wide, 2 processes, twice the samples": {"median": twice},
        "lesson, 1 process": {"median": small},
    }
    assert list(scaling.speedups(results).values()) == [1, 1.6, 1.6, 1]


def test_figure_of_a_step_shows_ms_and_percentages_of_the_peak():
    left, right = Figure().subplots(1, 2)
    steps = {"tiny": {"x": {"median": 0.002}}}
    # 2 * 60 * 12 * (2 * 7 + 3 * 4) = 37,440 operations
    step.plot_steps(left, right, steps, {"tiny": TINY}, {"x": 37_440_000.0})
    assert left.lines[0].get_xydata().tolist() == [[37_440, 2]]
    assert right.lines[0].get_xydata().tolist() == [[37_440, 50]]


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
