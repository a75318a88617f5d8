"""The static_graph example, run once: training, tracing, shapes, randomness, errors, the figure."""

import contextlib
import io
import re
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from processes import run
from readmes import assert_transcript
from torch import nn

import lesson_code as lesson
from real_world.common import CheckFailed
from real_world.static_graph import __main__ as static_graph
from real_world.static_graph import dynamic, keras_copy, tracing
from real_world.static_graph.dynamic import compare_randomness, stochastic_depth
from real_world.static_graph.errors import compare_errors, inspect_traceback
from real_world.static_graph.keras_copy import compare_training, compiled_copy, make_train_step
from real_world.static_graph.plot import autograd_nodes
from real_world.static_graph.tf_setup import tf
from real_world.static_graph.tracing import (
    OperatorControlFlow,
    compare_tracing,
    data_dependent,
    traced_operations,
)


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
def tables(folder) -> dict[str, dict[str, str]]:
    """Return the printed values, by section and label."""
    row = re.compile(r"^ {2,4}(\S.{,30}?) {2,}(.+?)(?: +ok)?$", re.MULTILINE)
    sections = (folder / "output.txt").read_text().split("\n\n")
    return {section.partition(":")[0]: dict(row.findall(section)) for section in sections}


def test_readme(folder):
    # A traceback has the lines of whoever called the example, too.
    assert_transcript("static_graph", (folder / "output.txt").read_text(), "lines")


def test_keras_copy_computes_the_same_logits():
    model = lesson.SimpleClassifier(6, 8, 5)
    X = torch.randn(10, 6)
    logits = torch.from_numpy(keras_copy.keras_copy(model)(X.numpy()).numpy())
    torch.testing.assert_close(logits, model(X))


def test_losses_of_all_ways_to_train(tables):
    table = tables["Training"]
    for way in ("Keras, fit()", "TensorFlow, @tf.function", "TensorFlow, eager"):
        assert float(table[way].split()[-1]) <= 1e-5
    assert table["train()"] == "loss 1.1223 to 0.7334"


@pytest.mark.parametrize(
    ("x", "result"), [(5.0, 0.390625), (0.5, 0.25), (-3.0, -0.421875), (1.0, 1.0), (0.0, 0.0)]
)
def test_data_dependent(x, result):
    assert data_dependent(x) == result
    assert data_dependent(torch.tensor(x)) == result
    assert data_dependent(tf.constant(x)) == result
    assert OperatorControlFlow()(torch.tensor(x)) == result


def test_python_runs_at_every_call_or_only_while_tracing(tables):
    modes = {mode: re.split(r"\s{2,}", text) for mode, text in tables["Tracing"].items()}
    assert modes["PyTorch, eager"] == ["6 of 6", "6, one per call"]
    assert modes["TensorFlow, eager"][0] == "6 of 6"
    assert modes["@tf.function"] == ["1 of 6", "1"]
    assert modes["@tf.function, Python floats"] == ["3 of 6", "3, one per number"]
    assert modes["torch.compile"][0] == "6 of 6"
    assert "while abs(x) > 1" in modes["graph breaks"][0]
    assert modes["torch.export"] == ["Could not guard on data-dependent"]
    assert modes["with while_loop and cond"] == ["1 of 6", "1"]


def test_new_shapes_are_traced_again(tables):
    counts = [text.split()[0] for text in tables["Shapes"].values()]
    assert counts == ["no", "3", "5", "3", "3"]


def test_python_randomness_is_fixed_while_tracing(tables):
    counts = [int(text.split()[0]) for text in tables["Stochastic depth"].values()]
    torch_eager, torch_compile, tf_eager, tf_function, tf_random = counts
    assert 20 < torch_eager == torch_compile == tf_eager < 80
    assert tf_function in (0, 100)
    assert 20 < tf_random < 80


def test_where_an_error_is_reported(tables):
    table = {mode: re.split(r"\s{2,}", text) for mode, text in tables["Errors"].items()}
    # From the end: the line's number, the line, its ~~~^^^, the error.
    assert table["PyTorch, eager"][1:] == ["4 from the end", "IndexError"]
    assert table["torch.compile"][1:] == ["not named", "RuntimeError"]
    for mode in ("TensorFlow, eager", "@tf.function", "Keras, fit()"):
        assert re.fullmatch(r"\d+ from the end", table[mode][1])
        assert table[mode][2] == "InvalidArgumentError"
    with pytest.raises(CheckFailed, match="raised no error"):
        inspect_traceback(lambda: None)

    def fail() -> None:
        raise IndexError

    assert inspect_traceback(fail) == ("IndexError", 6, None)  # two lines per call, first and last


def test_figure_shows_both_branches_only_for_tf_function(folder):
    assert autograd_nodes(5.0) == ["DivBackward0"] * 3 + ["MulBackward0"]
    assert autograd_nodes(-3.0) == ["DivBackward0"] * 2 + ["MulBackward0"] * 2
    assert traced_operations() == ["StatelessWhile", "Greater", "StatelessIf"]
    assert matplotlib.image.imread(folder / "static_graph.png").shape == (384, 1320, 4)


# %% Checks: with a part that is broken in one mode


def eager_tensor(x):
    return isinstance(x, torch.Tensor) and x.requires_grad


def compiled_tensor(x):
    return isinstance(x, torch.Tensor) and not x.requires_grad


def eager_tf(x):
    return tf.is_tensor(x) and tf.executing_eagerly()


def traced_tf(x):
    return tf.is_tensor(x) and not tf.executing_eagerly()


def traced_float(x):
    return isinstance(x, float) and not tf.executing_eagerly()


def wrong_for(mode):
    """Return data_dependent(), which returns 1 more in a mode."""

    def broken(x):
        result = data_dependent(x)
        return result + 1 if mode(x) else result

    return broken


def always_for(mode):
    """Return stochastic_depth(), which always applies the layer in a mode."""

    def broken(x):
        return x + 1 if mode(x) else stochastic_depth(x)

    return broken


def random_in_graph(x):
    return dynamic.stochastic_depth_in_graph(x) if traced_tf(x) else stochastic_depth(x)


def wrong_train_step(eagerly):
    """Return make_train_step(), whose steps return a wrong loss eagerly, or in a graph."""

    def broken(model):
        step = make_train_step(model)
        return lambda X, y: step(X, y) + 1e-3 * (tf.executing_eagerly() == eagerly)

    return broken


def copy_with_epsilon(epsilon):
    return lambda model, **_: compiled_copy(model, epsilon)


def train_briefly():
    compare_training(epochs=3)


def compiling(x):
    return torch.compiler.is_compiling()


COPY, STEP, DEPTH = "compiled_copy", "make_train_step", "stochastic_depth"
IN_GRAPH, FUNCTION, MODULE = "stochastic_depth_in_graph", "data_dependent", "OperatorControlFlow"


@pytest.mark.parametrize(
    ("part", "check", "module", "name", "broken"),
    [
        (train_briefly, "Keras, fit()", keras_copy, COPY, copy_with_epsilon(1e-2)),
        (train_briefly, "TensorFlow, @tf.function", keras_copy, STEP, wrong_train_step(False)),
        (train_briefly, "TensorFlow, eager", keras_copy, STEP, wrong_train_step(True)),
        (
            train_briefly,
            "fit(), Keras's epsilon of 1e-7",
            keras_copy,
            COPY,
            copy_with_epsilon(1e-8),
        ),
        (compare_tracing, "PyTorch, eager", tracing, FUNCTION, wrong_for(eager_tensor)),
        (compare_tracing, "TensorFlow, eager", tracing, FUNCTION, wrong_for(eager_tf)),
        (compare_tracing, "@tf.function", tracing, FUNCTION, wrong_for(traced_tf)),
        (
            compare_tracing,
            "@tf.function, Python floats",
            tracing,
            FUNCTION,
            wrong_for(traced_float),
        ),
        (compare_tracing, "torch.compile", tracing, FUNCTION, wrong_for(compiled_tensor)),
        (compare_tracing, "torch.export", tracing, "PythonControlFlow", nn.Identity),
        (compare_tracing, "  with while_loop and cond", tracing, MODULE, nn.Identity),
        (compare_randomness, "PyTorch, eager", dynamic, DEPTH, lambda x: x + 1),
        (compare_randomness, "torch.compile", dynamic, DEPTH, always_for(compiling)),
        (compare_randomness, "TensorFlow, eager", dynamic, DEPTH, always_for(eager_tf)),
        (compare_randomness, "@tf.function", dynamic, DEPTH, random_in_graph),
        (compare_randomness, "  with tf.random and tf.cond", dynamic, IN_GRAPH, stochastic_depth),
    ],
)
def test_broken_part_fails_its_check(part, check, module, name, broken, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(CheckFailed, match=re.escape(f"check failed: {check} (got")):
        part()


def test_missing_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(SystemExit, match=r"^error: TensorFlow is not installed"):
        static_graph.main([])


def test_triton_is_imported_before_tensorflow(tmp_path):
    """In the other order, torch.compile crashes where triton is installed."""
    for name in ("triton", "tensorflow", "keras"):
        (tmp_path / f"{name}.py").write_text("print(__name__)\n")
    command = (sys.executable, "-c", "import real_world.static_graph.tf_setup")
    done = run(*command, PYTHONPATH=str(tmp_path))
    assert done.stdout.split() == ["triton", "tensorflow", "keras"], done.stderr


def test_missing_compiler_is_named(tmp_path, monkeypatch):
    """It is not reported as a property of torch.compile, or as the model's error."""
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/no/compiler",)}),
        pytest.raises(CheckFailed, match=r"torch\.compile is not available: "),
    ):
        compare_errors()


def test_backend_of_keras_is_tensorflow(tmp_path):
    (tmp_path / ".keras").mkdir()
    (tmp_path / ".keras" / "keras.json").write_text('{"backend": "torch"}')
    code = "from real_world.static_graph.tf_setup import keras as k; print(k.config.backend())"
    done = run(sys.executable, "-c", code, HOME=str(tmp_path))
    assert done.stdout == "tensorflow\n", done.stderr
