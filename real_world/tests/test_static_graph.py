"""What a static graph is, on the real frameworks."""

import builtins
import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch import nn

import lesson_code as lesson
from real_world import static_graph

ROOT = Path(__file__).resolve().parents[2]
tf = static_graph.tensorflow()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return the folder of a run of the page, and what it printed."""
    folder, said = tmp_path_factory.mktemp("static"), io.StringIO()
    said.reconfigure = lambda **options: None
    with contextlib.redirect_stdout(said):
        assert static_graph.main(["--output", str(folder)]) == 0
    return folder, said.getvalue()


def cell(printed: str, name: str) -> str:
    """Return what stands in the first line that begins with `name`."""
    return re.search(rf"^ *{re.escape(name)}  +(.+?)(?: +ok)?$", printed, re.MULTILINE)[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_every_loss_is_the_same_in_four_ways(seed):
    X, y = lesson.make_synthetic_data(50, 6, 4, seed=seed)
    torch.manual_seed(seed)
    model = lesson.SimpleClassifier(6, 8, 4)
    twins = [static_graph.keras_twin(model) for _ in range(3)]
    optimizer = torch.optim.Adam(model.parameters(), lr=static_graph.LR)
    losses = lesson.train(model, [(X, y)], nn.CrossEntropyLoss(), optimizer, 30)
    others = (
        static_graph.fit(twins[0], X, y, 30),
        static_graph.train_by(tf.function(static_graph.keras_step(twins[1])), X, y, 30),
        static_graph.train_by(static_graph.keras_step(twins[2]), X, y, 30),
    )
    for other in others:
        assert other == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0]


def test_another_epsilon_is_another_training():
    X, y = lesson.make_synthetic_data()
    model, optimizer = lesson.build_model(0, "cpu")
    twin = static_graph.keras_twin(model)
    losses = lesson.train(model, [(X, y)], nn.CrossEntropyLoss(), optimizer, 100)
    apart = max(
        abs(a - b) for a, b in zip(losses, static_graph.fit(twin, X, y, 100, 1e-7), strict=True)
    )
    assert apart > 1e-5


def test_python_runs_at_every_call_or_once_at_tracing(page):
    printed = page[1].split("One Python function")[1]
    assert cell(printed, "PyTorch, eager").startswith("6 of 6")
    assert cell(printed, "TensorFlow, eager").startswith("6 of 6")
    assert cell(printed, "@tf.function") == "1 of 6     1 graph, then no Python"
    assert cell(printed, "@tf.function, of Python floats") == "3 of 6     3 graphs, one a number"
    assert cell(printed, "torch.compile").startswith("6 of 6")
    assert cell(printed, "while_loop and cond it takes") == "1 of 6     1 graph"
    assert cell(printed, "torch.export refuses it") == "Could not guard on data-dependent"


def test_the_same_function_has_the_same_values_in_both_frameworks(capsys):
    for value, expected in ((5.0, 0.390625), (0.5, 0.25), (-3.0, -0.421875), (1.0, 1.0)):
        for tensor in (torch.tensor(value), tf.constant(value)):
            assert float(static_graph.follow(tensor)) == expected
        assert static_graph.Captured()(torch.tensor(value)).item() == expected
    assert capsys.readouterr().out.count("Python is here\n") == 12


def test_a_coin_tossed_in_python_is_frozen_in_a_graph(page):
    _, printed = page
    tosses = printed.split("toss of a coin")[1]
    eager = cell(tosses, "PyTorch, eager")
    assert 30 < int(re.search(r"\d+", eager)[0]) < 70
    assert cell(tosses, "TensorFlow, eager") == cell(tosses, "torch.compile") == eager
    assert re.fullmatch(
        r"used (0|100) times, as at tracing, for ever", cell(tosses, "@tf.function")
    )
    assert "for ever" not in cell(tosses, "tossed by TensorFlow")


def test_an_error_is_looked_for_at_the_line_at_fault(page):
    _, printed = page
    errors = printed.split("A row that is not in a table")[1]
    assert re.search(
        r"\d+ lines, line \d+ from the end: IndexError", cell(errors, "PyTorch, eager")
    )
    for name in ("TensorFlow, eager", "@tf.function", "Keras, fit()"):
        assert cell(errors, name).endswith(": InvalidArgumentError")
    lines = {
        name: int(cell(errors, name).split()[0]) for name in ("PyTorch, eager", "Keras, fit()")
    }
    assert lines["Keras, fit()"] > lines["PyTorch, eager"]
    with pytest.raises(lesson.CheckFailed, match="this should fail and does not"):
        static_graph.traceback_of(lambda: None)


def test_the_traced_graph_has_both_branches_and_autograds_has_one(page, capsys):
    folder, printed = page
    assert static_graph.traced_nodes() == [
        "Placeholder",
        "StatelessWhile",
        "Greater",
        "StatelessIf",
    ]
    assert "while ...:         becomes  ag__.while_stmt(" in printed
    assert "if ...:            becomes  ag__.if_stmt(" in printed
    assert matplotlib.image.imread(folder / "static_graph.png").shape == (384, 1440, 4)


def test_every_line_fits_a_terminal(page):
    _, printed = page
    assert max(map(len, printed.splitlines()[:-1])) <= 88


def test_without_tensorflow_it_says_what_to_do(monkeypatch, capsys):
    imports = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name == "tensorflow":
            raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
        return imports(name, *rest)

    static_graph.tensorflow.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    assert static_graph.main([]) == 1
    where = "it has wheels for Python 3.11 to 3.13; PYTHON=python3.13 ./setup.sh --all"
    assert capsys.readouterr().err == f"static_graph: this page needs tensorflow: {where}\n"
    static_graph.tensorflow.cache_clear()


def test_a_wrong_option_gets_a_sentence(capsys):
    with pytest.raises(SystemExit) as ended:
        static_graph.main(["--device", "cuda"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert (error.startswith("static_graph: "), error.count("\n")) == (True, 1)


def test_triton_is_imported_before_tensorflow(tmp_path):
    """PyTorch's build for CUDA has triton, which aborts if TensorFlow's LLVM is there first."""
    (tmp_path / "triton.py").write_text(
        "import sys\nassert 'tensorflow' not in sys.modules\nprint('triton')\n"
    )
    code = "from real_world import static_graph; static_graph.tensorflow(); print('tensorflow')"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["triton", "tensorflow"], done.stderr
