"""The static_graph example, run once: training, tracing, shapes, randomness, errors, the figure."""

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

import lesson_code as lesson
from real_world.static_graph import __main__ as static_graph
from real_world.static_graph.errors import inspect_traceback
from real_world.static_graph.keras_copy import EPSILON, LR, keras_copy
from real_world.static_graph.plot import autograd_nodes
from real_world.static_graph.tf_setup import keras, tf
from real_world.static_graph.tracing import OperatorControlFlow, data_dependent, traced_operations

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Run the example; return the folder with its figure and `output.txt`, what it printed."""
    folder = tmp_path_factory.mktemp("static_graph") / "new"
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        static_graph.main(["--output", str(folder)])
    (folder / "output.txt").write_text(output.getvalue())
    return folder


@pytest.fixture
def rows(folder) -> dict[str, dict[str, str]]:
    """Return the printed values, by section and label."""
    row = re.compile(r"^  (.{32}) (.+?)(?: +ok)?$", re.MULTILINE)
    tables = {}
    for section in (folder / "output.txt").read_text().split("\n\n"):
        found = {label.strip(): value.strip() for label, value in row.findall(section)}
        found.pop("", None)  # the header of the columns
        tables[section.partition(":")[0]] = found
    return tables


def test_keras_copy_computes_the_same_logits():
    model = lesson.SimpleClassifier(6, 8, 5)
    X = torch.randn(10, 6)
    logits = torch.from_numpy(keras_copy(model)(X.numpy()).numpy())
    torch.testing.assert_close(logits, model(X))


def test_losses_of_all_ways_to_train(rows):
    table = rows["Training"]
    for way in ("Keras, fit()", "TensorFlow, @tf.function", "TensorFlow, eager"):
        assert float(table[way].split()[-1]) <= 1e-5
    assert table["train()"] == "loss 1.1223 to 0.7334"


def test_keras_adds_epsilon_before_the_bias_correction():
    """For a gradient as small as epsilon, the first updates of the two Adams differ."""
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.full((1,), EPSILON)
    torch.optim.Adam([parameter], LR).step()
    assert parameter.item() == pytest.approx(-LR / 2)
    variable = keras.Variable([0.0])
    keras.optimizers.Adam(LR, epsilon=EPSILON).apply([tf.constant([EPSILON])], [variable])
    correction = 0.001**0.5
    assert float(variable[0]) == pytest.approx(-LR * correction / (correction + 1), rel=1e-4)


@pytest.mark.parametrize(
    ("x", "result"), [(5.0, 0.390625), (0.5, 0.25), (-3.0, -0.421875), (1.0, 1.0), (0.0, 0.0)]
)
def test_data_dependent(x, result):
    assert data_dependent(x) == result
    assert data_dependent(torch.tensor(x)) == result
    assert data_dependent(tf.constant(x)) == result
    assert OperatorControlFlow()(torch.tensor(x)) == result


def test_python_runs_at_every_call_or_only_while_tracing(rows):
    table = rows["Tracing"]
    assert table["PyTorch, eager"] == "6 of 6        6, one per call"
    assert table["TensorFlow, eager"].startswith("6 of 6 ")
    assert table["@tf.function"] == "1 of 6        1"
    assert table["@tf.function, Python floats"].startswith("3 of 6        3,")
    assert table["torch.compile"].startswith("6 of 6 ")
    assert "while abs(x) > 1" in table["graph breaks for x = 5"]
    assert table["torch.export"] == "Could not guard on data-dependent"
    assert table["with while_loop and cond"] == "1 of 6        1"


def test_autograph_replaces_the_loop_and_the_branch(folder):
    output = (folder / "output.txt").read_text()
    assert "\n    ag__.while_stmt(loop_test, loop_body, " in output
    assert "\n    ag__.if_stmt(ag__.ld(x) > 0, if_body, else_body, " in output


def test_graphs_are_traced_again_for_new_shapes(rows):
    assert rows["Shapes"] == {
        "PyTorch, TensorFlow, eager": "no graphs to build",
        "torch.compile": "3 graphs",
        "@tf.function": "5 graphs",  # one per shape
        "with reduce_retracing": "3 graphs",
        "Keras, fit()": "3 graphs",
    }


def test_python_randomness_is_frozen_while_tracing(rows):
    table = {mode: int(text.split()[0]) for mode, text in rows["Stochastic depth"].items()}
    eager = table["PyTorch, eager"]
    assert 20 < eager < 80
    assert table["torch.compile"] == table["TensorFlow, eager"] == eager
    assert table["@tf.function"] in (0, 100)
    assert 20 < table["with tf.random and tf.cond"] < 80


def test_where_an_error_is_reported(rows):
    table = {mode: re.split(r"\s{2,}", text) for mode, text in rows["Errors"].items()}
    assert {mode: error for mode, (_, _, error) in table.items()} == {
        "PyTorch, eager": "IndexError",
        "torch.compile": "RuntimeError",
        "TensorFlow, eager": "InvalidArgumentError",
        "@tf.function": "InvalidArgumentError",
        "Keras, fit()": "InvalidArgumentError",
    }
    not_named = [mode for mode, (_, line, _) in table.items() if line == "not named"]
    assert not_named == ["torch.compile"]
    lengths = {mode: int(lines.split()[0]) for mode, (lines, _, _) in table.items()}
    assert lengths["Keras, fit()"] > lengths["PyTorch, eager"]
    with pytest.raises(lesson.CheckFailed, match="raised no error"):
        inspect_traceback(lambda: None)


def test_figure_shows_both_branches_only_for_tf_function(folder):
    assert autograd_nodes(5.0) == ["DivBackward0"] * 3 + ["MulBackward0"]
    assert autograd_nodes(-3.0) == ["DivBackward0"] * 2 + ["MulBackward0"] * 2
    assert traced_operations() == ["StatelessWhile", "Greater", "StatelessIf"]
    assert matplotlib.image.imread(folder / "static_graph.png").shape == (384, 1320, 4)


def test_output_fits_a_terminal(folder):
    lines = (folder / "output.txt").read_text().splitlines()
    assert max(len(line) for line in lines if "saved to" not in line) <= 84


def test_missing_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(SystemExit, match=r"^error: TensorFlow is not installed"):
        static_graph.main([])


def test_triton_is_imported_before_tensorflow(tmp_path):
    """In the other order, torch.compile crashes where triton is installed."""
    for name in ("triton", "tensorflow", "keras"):
        (tmp_path / f"{name}.py").write_text("print(__name__)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", "import real_world.static_graph.tf_setup"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["triton", "tensorflow", "keras"], done.stderr


def test_only_tf_setup_imports_tensorflow():
    paths = (ROOT / "real_world" / "static_graph").glob("*.py")
    direct = re.compile(r"^\s*(import|from) (tensorflow|keras)\b", re.MULTILINE)
    assert [path.name for path in paths if direct.search(path.read_text())] == ["tf_setup.py"]
