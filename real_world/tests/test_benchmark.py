"""What is compared is the same work, and a run leaves the README alone unless it is told to."""

import json
import subprocess
import sys

import matplotlib.image
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lesson_code as lesson
from real_world import benchmark
from real_world.benchmark import cuda, growth, inference, scaling, service, step
from real_world.benchmark.inference import IN_CPP
from real_world.tests.processes import ROOT

SMALL = step.Size(60, 7, 12, 4)


# The same work


@pytest.mark.parametrize("way", step.WAYS)
def test_every_framework_trains_the_same_network_on_the_same_data(way):
    losses = [float(loss) for loss in step.training(way, SMALL)(6)]
    expected = step.training("train()", SMALL)(6)
    if way.startswith("scikit-learn"):  # it starts from weights of its own
        assert losses[-1] < losses[0]
    elif way.endswith("in one epoch"):  # of which fit() tells the mean
        assert losses == [pytest.approx(sum(expected) / 6, abs=1e-5)]
    else:
        assert losses == pytest.approx(expected, abs=1e-5)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # which has no graphs


@pytest.mark.parametrize(
    "way", [way for way in cuda.WAYS if DEVICE.type == "cuda" or "graphs" not in way]
)
def test_what_a_gpu_is_timed_on_is_the_same_network_too(way):
    """Also where there is none; bfloat16 has three digits."""
    expected = step.training("train()", SMALL)(6)
    losses = cuda.training(way, SMALL, DEVICE)(6)
    precise = "bfloat16" not in way
    assert losses == pytest.approx(expected, abs=1e-5 if precise else 0.01)
    assert (losses == pytest.approx(expected, abs=1e-6)) == precise


def test_the_operations_of_a_step_are_those_that_pytorch_counts():
    for size in (step.Size(10, 4, 16, 3), step.Size(7, 64, 128, 10)):
        X, y = lesson.make_synthetic_data(size.samples, size.features, size.classes)
        model = lesson.SimpleClassifier(*size[1:])
        optimizer = torch.optim.Adam(model.parameters())
        with FlopCounterMode(display=False) as counter:
            lesson.train(model, [(X, y)], nn.CrossEntropyLoss(), optimizer, 1)
        assert counter.get_total_flops() == size.flops


def test_the_plain_endpoint_answers_what_the_service_does(monkeypatch, tmp_path):
    from starlette.testclient import TestClient

    from real_world import lesson_checkpoint

    monkeypatch.setattr(lesson, "OUTPUT", tmp_path)
    model = lesson_checkpoint(tmp_path / "lesson.pt")
    features = [[0.5, -1.2, 0.3, 0.8], [1.0, 2.0, 3.0, 4.0]]
    answer = TestClient(service.plain_endpoint()).post("/predict", json={"features": features})
    classes, probabilities = lesson.predict(model, torch.tensor(features))
    assert answer.json()["classes"] == classes.tolist()
    torch.testing.assert_close(torch.tensor(answer.json()["probabilities"]), probabilities)


# Measuring


def test_what_is_measured_takes_turns():
    turns = []

    def way(name: str, *times: float):
        left = iter(times)
        return lambda: turns.append(name) or next(left)

    found = benchmark.alternate({"a": way("a", 3, 1, 2), "b": way("b", 9, 9, 9)}, 3, "")
    assert turns == ["a", "b"] * 3
    assert found["a"] == {"median": 2, "lowest": 1, "highest": 3}


def test_a_worker_is_asked_and_ends_with_its_block():
    script = "import sys; print('warm', flush=True); [print(0.5, flush=True) for _ in sys.stdin]"
    with benchmark.worker("it", [sys.executable, "-c", script]) as ask:
        assert [ask(), ask()] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import nothing_of_that_name", "1; it said: ModuleNotFoundError: No module named"),
        ("print('warm', flush=True); input(); raise SystemExit('full')", "1; it said: full"),
        ("print('warm', flush=True); import os; os.close(0); os._exit(3)", "3; it said: nothing"),
    ],
)
def test_a_worker_that_ends_is_named_with_what_it_said(script, said):
    with (
        pytest.raises(OSError, match=f"it ended with status .*{said}"),
        benchmark.worker("it", [sys.executable, "-c", script]) as ask,
    ):
        ask()


@pytest.mark.parametrize(
    "name", ["floor", "inference", "language", "pictures", "trainings", "growth"]
)
def test_a_quick_run_measures_draws_and_writes_nothing(name, capsys, tmp_path, monkeypatch):
    kept = benchmark.RESULTS.read_bytes(), benchmark.README.read_bytes()
    measured = []
    original = benchmark.entry(name)
    seen = lambda quick: measured.append(original.measure(quick)) or measured[0]  # noqa: E731
    changed = benchmark.Entry(
        original.claim, seen, original.headline, original.table, original.chart
    )
    monkeypatch.setattr(benchmark, "entry", lambda _: changed)
    assert benchmark.main(["--quick", name]) == 0
    assert f'"{original.claim}"' in capsys.readouterr().out
    assert (benchmark.RESULTS.read_bytes(), benchmark.README.read_bytes()) == kept
    original.chart(measured[0], tmp_path / "x.png")
    assert matplotlib.image.imread(tmp_path / "x.png").shape[1] > 900


@pytest.mark.parametrize("name", ["step", "inference", "scaling", "service", "cuda"])
def test_a_table_and_a_headline_say_what_was_measured(name, tmp_path):
    """Of results made by hand, in which every number can be worked out."""
    ways = {
        "step": lambda: (
            {
                size: {way: seconds(0.002 if way == "train()" else 0.006) for way in step.WAYS}
                for size in step.SIZES
            }
            | {"products": {"PyTorch": seconds(0.5), "JAX": seconds(0.25)}}
        ),
        "inference": lambda: {
            size: {
                form: {
                    str(many): seconds(2e-6 if form == "eager" else 5e-6) for many in (1, 64, 1024)
                }
                for form in ("eager", "TorchScript", "torch.compile", "ExecuTorch", IN_CPP)
            }
            for size in inference.SIZES
        },
        "scaling": lambda: {
            name: seconds(time)
            for name, time in zip(scaling.SCALES, (0.4, 0.25, 0.2, 0.5, 0.01, 0.02), strict=True)
        },
        "service": lambda: {
            server: {
                many: {"rate": rate, "lowest": 1, "highest": 2, "p50": 3, "p99": p99, "errors": 0}
                for many in ("1", "32", "128")
            }
            for server, rate, p99 in (
                ("serve, 2 workers", 6000, 5),
                ("serve, 1 worker", 3000, 6),
                ("FastAPI, 1 worker", 1000, 150),
                ("FastAPI, 2 workers", 2000, 90),
            )
        },
        "cuda": lambda: (
            {
                size: {way: seconds(0.01 if way == "train()" else 0.004) for way in cuda.WAYS}
                for size in cuda.SIZES
            }
            | {"products": {"torch.float32": seconds(0.02), "torch.bfloat16": seconds(0.002)}}
            | {"device": "a GPU"}
        ),
    }
    expected = {
        "step": (
            "At the lesson's size 3 times as fast as `fit()` with an epoch a step, as the lesson "
            "has them, 3.0 times as `fit()` with all steps in one, 3.0 times as `@tf.function`; at "
            "the largest 43311% of what PyTorch's own matrix product reaches, 21655% of the "
            "fastest one's",
            "| NumPy, by hand | 6 ms (3 to 12), 3.00 x, 0% |",
        ),
        "inference": (
            "one row takes 2.5 times eager's time in TorchScript, 2.5 in `torch.compile`, 2.5 in "
            "ExecuTorch, 2.5 in AOTInductor called from C++; with much to multiply they come to "
            "2.50 (TorchScript) to 2.50 times (TorchScript)",
            "| wide: ExecuTorch | 5 us (2.5 to 10), 2.50 x | 5 us (2.5 to 10), 2.50 x |",
        ),
        "scaling": (
            "2.00 times the speed on the same work, 1.60 times on twice the work; at the lesson's "
            "own size 0.50 times: there it loses",
            "|   the same, with a thread a core | 250.00 ms (125.00 to 500.00) | 1.60 x |",
        ),
        "service": (
            "6.0 times the requests of a plain FastAPI endpoint, 3.0 times those of one with as "
            "many workers; 99 of 100 within 5 ms instead of 150 and 90",
            "| 128 | serve, 1 worker | 3,000 (1 to 2) | 3.00 x | 3.00 ms | 6.00 ms | 0 |",
        ),
        "cuda": (
            "On a GPU, at the lesson's size train(), torch.compile is 2.5 times as fast as eager; "
            "at the largest bfloat16 2.5 times, 2000% and 500% of their types' peaks",
            "| train() | 10 ms, 1.00 x, 0% |",
        ),
    }
    results, entry = ways[name](), benchmark.entry(name)
    headline, row = expected[name]
    assert entry.headline(results) == headline
    assert row in entry.table(results)
    entry.chart(results, tmp_path / "x.png")
    assert matplotlib.image.imread(tmp_path / "x.png").shape[1] > 900


def seconds(median: float) -> dict[str, float]:
    return {"median": median, "lowest": median / 2, "highest": median * 2}


def test_times_are_in_the_unit_that_suits_them_and_say_what_noise_may_hide():
    assert benchmark.scaled(seconds(0.0025), 0.0025) == "2.5 ms (1.25 to 5)"
    assert benchmark.scaled(seconds(2.5), 0.0025) == "2,500 ms (1,250 to 5,000)"
    assert benchmark.scaled(seconds(2.5e-8), 2.5e-8) == "25 ns (12.5 to 50)"
    assert benchmark.times(seconds(6), seconds(1)) == "6.00 times"
    assert benchmark.times(seconds(3), seconds(1)) == "3.00 times (within the spread)"
    table = benchmark.plain_table({"a loaf": {"ours": seconds(2), "theirs": seconds(5)}}, "loaves")
    assert table.splitlines()[0] == "| a loaf | takes | against the first | loaves a second |"
    assert table.splitlines()[3] == "| theirs | 5 s (2.5 to 10) | 2.50 x | 0 |"
    both = {"a": {"x": seconds(1), "y": seconds(2)}, "b": {"x": seconds(4)}}
    assert "| a: y | 2 s (1 to 4) | 2.00 x |" in benchmark.plain_table(both)


def test_growth_is_read_from_the_least_and_the_most():
    times = {"10": {"median": 2.0}, "100": {"median": 5.0}, "1000": {"median": 30.0}}
    assert growth.times_as_long(times) == (100, 15)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_entry_gets_a_sentence(capsys):
    assert benchmark.main(["cuda"]) == 1
    sentence = "this entry needs an NVIDIA GPU, and PyTorch finds none here"
    assert capsys.readouterr().err == f"benchmark: {sentence}\n"


# The README


def test_what_is_torn_or_lacks_its_marks_gets_a_sentence_before_anything_is_measured(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "benchmark.json")
    monkeypatch.setattr(benchmark, "README", tmp_path / "README.md")
    benchmark.README.write_text("no marks")
    benchmark.RESULTS.write_text('{"pictures": {"results": {"an image": {"x":')
    assert benchmark.main(["pictures", "--write"]) == 1
    assert "benchmark.json is torn (" in capsys.readouterr().err
    results = {"pictures": {"results": {"an image": {"x": seconds(1), "y": seconds(2)}}}}
    benchmark.RESULTS.write_text(json.dumps(results))
    assert benchmark.main(["pictures", "--write"]) == 1
    printed = capsys.readouterr()
    sentence = "README.md should hold <!-- headline pictures -->, and later <!-- end -->, once"
    assert (printed.out, printed.err) == ("", f"benchmark: {sentence}\n")
    assert benchmark.README.read_text() == "no marks"


def test_numbers_stand_between_their_marks():
    results = json.loads(benchmark.RESULTS.read_text())
    marked = "".join(
        f"<!-- headline {name} -->old<!-- end --> <!-- table {name} -->old<!-- end -->"
        for name in benchmark.NAMES
    )
    written = benchmark.with_results(marked, results)
    assert written.count("old") == 2 * len(set(benchmark.NAMES) - results.keys())
    assert written.count("<!-- end -->") == 2 * len(benchmark.NAMES)
    assert benchmark.with_results(written, results) == written


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["speed"], "there is no entry 'speed'; there is floor, step, inference, service, "),
        (["--quick", "--write"], "argument --write: what is measured once is not for the README"),
    ],
)
def test_a_wrong_option_gets_a_sentence(options, sentence):
    command = [sys.executable, "-m", "real_world.benchmark", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith(f"benchmark: {sentence}")
    assert done.stderr.count("\n") == 1
