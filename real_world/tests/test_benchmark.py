"""What is compared is the same work, and a run leaves the README alone unless it is told to."""

import json
import subprocess
import sys

import matplotlib.image
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lesson_code as lesson
from real_world import benchmark
from real_world.benchmark import cuda, growth, service, step
from real_world.tests.processes import ROOT

SMALL = step.Size(60, 7, 12, 4)


# The same work


@pytest.mark.parametrize("way", step.WAYS)
def test_every_framework_trains_the_same_network_on_the_same_data(way):
    losses = [float(loss) for loss in step.training(way, SMALL)(6)]
    if way.startswith("scikit-learn"):  # it starts from weights of its own
        assert losses[-1] < losses[0]
    else:
        expected = step.training("train()", SMALL)(6)
        assert losses == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("way", [way for way in cuda.WAYS if "graphs" not in way])
def test_what_a_gpu_is_timed_on_is_the_same_network_too(way):
    """On the CPU, which has everything but graphs; bfloat16 has three digits."""
    expected = step.training("train()", SMALL)(6)
    losses = cuda.training(way, SMALL, torch.device("cpu"))(6)
    precise = "bfloat16" not in way
    assert losses == pytest.approx(expected, abs=1e-5 if precise else 0.01)
    assert (losses == pytest.approx(expected, abs=1e-6)) == precise


def test_the_operations_of_a_step_are_those_that_pytorch_counts():
    for size in (step.Size(10, 4, 16, 3), step.Size(7, 64, 128, 10)):
        X, y = lesson.make_synthetic_data(size.samples, size.features, size.classes)
        model = lesson.SimpleClassifier(*size[1:])
        optimizer = torch.optim.Adam(model.parameters())
        with FlopCounterMode(display=False) as counter:
            lesson.train(model, X, y, optimizer=optimizer, epochs=1)
        assert counter.get_total_flops() == size.flops


def test_the_plain_endpoint_answers_what_the_service_does(monkeypatch, tmp_path):
    from starlette.testclient import TestClient

    from real_world import lesson_checkpoint

    monkeypatch.setattr(lesson, "CHECKPOINTS", tmp_path)
    model = lesson_checkpoint(tmp_path / "lesson.pt").model
    features = [[0.5, -1.2, 0.3, 0.8], [1.0, 2.0, 3.0, 4.0]]
    answer = TestClient(service.plain_endpoint()).post("/predict", json={"features": features})
    classes, probabilities = lesson.predict(model, features)
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
    with benchmark.worker([sys.executable, "-c", script]) as ask:
        assert [ask(), ask()] == [0.5, 0.5]
    with (
        pytest.raises(OSError, match="does not run"),
        benchmark.worker([sys.executable, "-c", "import nothing_of_that_name"]),
    ):
        pass


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


def test_growth_is_read_from_the_least_and_the_most():
    times = {"10": {"median": 2.0}, "100": {"median": 5.0}, "1000": {"median": 30.0}}
    assert growth.times_as_long(times) == (100, 15)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_entry_gets_a_sentence(capsys):
    assert benchmark.main(["cuda"]) == 1
    sentence = "this entry needs an NVIDIA GPU, and PyTorch finds none here"
    assert capsys.readouterr().err == f"benchmark: {sentence}\n"


# The README


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
