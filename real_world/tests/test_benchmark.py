"""What is compared is the same work, and a run leaves the README alone unless it is told to."""

import json

import pytest

from real_world import benchmark


@pytest.fixture(scope="module")
def ways():
    return benchmark.ways_to_train((60, 7, 12, 4))


def test_every_framework_trains_the_same_network_on_the_same_data(ways):
    losses = {name: [float(loss) for loss in way(6)] for name, way in ways.items()}
    for name, found in losses.items():
        if name.startswith("scikit-learn"):  # it starts from weights of its own
            assert found[-1] < found[0]
        else:
            assert found == pytest.approx(losses["train()"], abs=1e-5)
    assert len(losses) == 7


def test_the_operations_of_a_step_are_those_that_pytorch_counts():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import lesson_code as lesson

    for size in ((10, 4, 16, 3), (7, 64, 128, 10)):
        X, y = lesson.make_synthetic_data(*size[:2], size[3])
        model = lesson.SimpleClassifier(*size[1:])
        optimizer = torch.optim.Adam(model.parameters())
        with FlopCounterMode(display=False) as counter:
            lesson.train(model, X, y, optimizer=optimizer, epochs=1)
        assert counter.get_total_flops() == benchmark.flops_of_a_step(size)


def test_a_quick_run_measures_and_writes_nothing(capsys):
    kept = benchmark.RESULTS.read_bytes(), benchmark.README.read_bytes()
    assert benchmark.main(["--quick", "pictures"]) == 0
    printed = capsys.readouterr().out
    assert "the same images" in printed
    assert "| an image, 50 steps: stable_diffusion.py |" in printed
    assert (benchmark.RESULTS.read_bytes(), benchmark.README.read_bytes()) == kept


def test_numbers_stand_between_their_marks():
    results = json.loads(benchmark.RESULTS.read_text())
    marked = "".join(
        f"<!-- headline {name} -->old<!-- end --> <!-- table {name} -->old<!-- end -->"
        for name in benchmark.ENTRIES
    )
    written = benchmark.with_results(marked, results)
    assert "old" not in written
    assert written.count("<!-- end -->") == 2 * len(benchmark.ENTRIES)
    assert benchmark.with_results(written, results) == written


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["speed"], "there is no entry 'speed'; there is lesson, step, service, scaling, "),
        (["--quick", "--write"], "argument --write: what is measured once is not for the README"),
    ],
)
def test_a_wrong_option_gets_a_sentence(options, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(options)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"benchmark: {sentence}")
    assert error.count("\n") == 1
