"""The dynamic graph beside static ones: the same network, and the same Python, in both frameworks.

    python -m real_world.static_graph

The article: "early TensorFlow work[s] by constructing a static computation graph ... PyTorch builds
the computation graph on the fly, operation by operation, as your code executes." Since TensorFlow 2
(2019) both do both. TensorFlow runs operation by operation too, and what @tf.function wraps is
traced into a graph, as Keras's fit() does. PyTorch has torch.compile and torch.export. So the
difference is which one you get if you ask for nothing, and what Python means inside the other.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import os
import random
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import lesson_code as lesson
from real_world import heading, parser, quiet, run, show, shown

if TYPE_CHECKING:
    import keras


@functools.cache
def tensorflow() -> Any:  # noqa: ANN401 - a module
    """Import TensorFlow, quietly; raise OSError, which says what to do, where there is none."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    with contextlib.suppress(ImportError):
        # PyTorch's own build for CUDA brings triton, and imports it at the first optimizer. After
        # TensorFlow, it would use TensorFlow's LLVM, and abort (tensorflow/tensorflow#124205).
        import triton  # noqa: F401
    try:
        with quiet():
            import tensorflow
    except ModuleNotFoundError as missing:
        where = "it has wheels for Python 3.11 to 3.13; PYTHON=python3.13 ./setup.sh --all"
        raise OSError(f"this page needs {missing.name}: {where}") from None
    return tensorflow


# %% The same training, four ways


LR, EPSILON = 0.01, 1e-8  # PyTorch's epsilon; Keras's own is 1e-7


def keras_twin(model: lesson.SimpleClassifier) -> keras.Sequential:
    """Return the network in Keras, with the same weights.

    Left to itself it would not have them: Keras draws weights from Glorot's uniform distribution
    and starts biases at 0; PyTorch draws both uniformly, within 1 / sqrt(inputs) of 0.
    """
    tensorflow()
    from keras import Sequential, layers

    inputs, hidden, classes = (
        model.fc1.in_features,
        model.fc1.out_features,
        model.fc2.out_features,
    )
    twin = Sequential(
        [layers.Input((inputs,)), layers.Dense(hidden, activation="relu"), layers.Dense(classes)]
    )
    both = (model.fc1, model.fc2)
    weights = ((layer.weight.detach().mT.numpy(), layer.bias.detach().numpy()) for layer in both)
    twin.set_weights(list(itertools.chain(*weights)))
    return twin


def fit(
    twin: keras.Sequential, X: torch.Tensor, y: torch.Tensor, epochs: int, epsilon: float = EPSILON
) -> list[float]:
    """Train with Keras, all samples in one batch; return the loss of every epoch."""
    from keras import losses, optimizers

    twin.compile(
        optimizers.Adam(LR, epsilon=epsilon), losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    whole = {"batch_size": len(X), "epochs": epochs, "shuffle": False, "verbose": 0}
    return twin.fit(X.numpy(), y.numpy(), **whole).history["loss"]


def keras_step(twin: keras.Sequential) -> Callable:
    """Return the five lines as TensorFlow has them: a function of X and y that returns the loss."""
    tf = tensorflow()
    from keras import losses, optimizers

    criterion = losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = optimizers.Adam(LR, epsilon=EPSILON)
    optimizer.build(twin.trainable_variables)

    def step(X: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = criterion(y, twin(X, training=True))
        gradients = tape.gradient(loss, twin.trainable_variables)
        optimizer.apply(gradients, twin.trainable_variables)
        return loss

    return step


def train_by(step: Callable, X: torch.Tensor, y: torch.Tensor, epochs: int) -> list[float]:
    """Call a TensorFlow step `epochs` times; return its losses."""
    tf = tensorflow()
    inputs, labels = tf.constant(X.numpy()), tf.constant(y.numpy())
    return [step(inputs, labels).numpy().item() for _ in range(epochs)]


def compare_training(epochs: int = 100) -> None:
    """Train the lesson's network by train(), and its twins in TensorFlow in three ways."""
    tf = tensorflow()
    print("\n  The lesson's network, its first weights, its data, its Adam, in four ways:")
    X, y = lesson.make_synthetic_data()
    model, optimizer = lesson.build_model(0, torch.device("cpu"))
    twins = [keras_twin(model) for _ in range(4)]
    losses = lesson.train(model, [(X, y)], nn.CrossEntropyLoss(), optimizer, epochs)
    show("train()", f"loss {losses[0]:.4f} to {losses[-1]:.4f}")
    ways = {
        "Keras, fit()": lambda: fit(twins[0], X, y, epochs),
        "TensorFlow, @tf.function": lambda: train_by(
            tf.function(keras_step(twins[1])), X, y, epochs
        ),
        "TensorFlow, eager": lambda: train_by(keras_step(twins[2]), X, y, epochs),
    }
    for name, way in ways.items():
        apart = max(abs(a - b) for a, b in zip(losses, way(), strict=True))
        lesson.check(name, f"every loss, to {apart:.0e}", apart <= 1e-5)
    apart = max(abs(a - b) for a, b in zip(losses, fit(twins[3], X, y, epochs, 1e-7), strict=True))
    show("fit() with Keras's own epsilon", f"to {apart:.0e}: 1e-7, where PyTorch has 1e-8")


# %% One function, and how often Python runs it


def follow(x: Any) -> Any:  # noqa: ANN401 - a tensor of either framework
    """Halve a 0-d tensor until it lies within 1 of zero; square it, or where negative, cube it."""
    print("Python is here")
    while abs(x) > 1:
        x = x / 2
    if x > 0:
        return x * x
    return x * x * x


class Captured(nn.Module):
    """The same for torch.export, with its loop and its branch spelled out as operators."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what `follow` returns."""
        print("Python is here")
        (x,) = torch.while_loop(lambda x: x.abs() > 1, lambda x: (x / 2,), (x,))
        return torch.cond(x > 0, lambda x: x * x, lambda x: x * x * x, (x,))


class Followed(nn.Module):
    """`follow` as a module, which is what torch.export takes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what `follow` returns."""
        return follow(x)


INPUTS = (5.0, 0.5, -3.0)


def visits(function: Callable, inputs: tuple = INPUTS) -> tuple[list[float], int]:
    """Return what `function` makes of `inputs`, and how often Python went through it."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        values = [float(function(value)) for value in inputs]
    return values, said.getvalue().count("Python is here")


@contextlib.contextmanager
def counted_graphs() -> Iterator[tuple[Callable, list[int]]]:
    """Yield a backend for torch.compile that runs what it gets, and a list of the sizes of that."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    yield backend, graphs
    torch._dynamo.reset()


def row(way: str, ran: int, calls: int, graphs: str, values: list[float]) -> None:
    """Print how often Python ran in so many calls, and check that the values are right."""
    expected, _ = visits(lambda value: follow(torch.tensor(value)), (*INPUTS, *INPUTS)[:calls])
    same = all(abs(a - b) < 1e-6 for a, b in zip(values, expected, strict=True))
    lesson.check(way, f"{f'{ran} of {calls}':<11}{graphs}", same)


def compare_graphs() -> None:
    """Call one Python function, with a loop, a branch and a print, in every mode of both."""
    tf = tensorflow()
    twice = (*INPUTS, *INPUTS)
    print(
        "\n  One Python function, called for 5, 0.5 and -3, then again: while abs(x) > 1, if x > 0,"
    )
    print("  and a print, which shows when Python is there:")
    print(f"  {'':<32} {'Python ran':<11}and recorded")
    values, ran = visits(lambda value: follow(torch.tensor(value)), twice)
    row("PyTorch, eager", ran, 6, "a graph at every call", values)
    values, ran = visits(lambda value: follow(tf.constant(value)), twice)
    row("TensorFlow, eager", ran, 6, "nothing, without a tape", values)
    static = tf.function(follow)
    values, ran = visits(lambda value: static(tf.constant(value)), twice)
    row(
        "@tf.function",
        ran,
        6,
        f"{static.experimental_get_tracing_count()} graph, then no Python",
        values,
    )
    static = tf.function(follow)
    values, ran = visits(static, twice)
    row(
        "@tf.function, of Python floats",
        ran,
        6,
        f"{static.experimental_get_tracing_count()} graphs, one a number",
        values,
    )
    with counted_graphs() as (backend, graphs):
        compiled = torch.compile(follow, backend=backend)
        values, ran = visits(lambda value: compiled(torch.tensor(value)), twice)
        row("torch.compile", ran, 6, f"{len(graphs)} pieces between breaks", values)
    with contextlib.redirect_stdout(io.StringIO()), quiet():
        try:
            torch.export.export(Followed(), (torch.tensor(5.0),))
            refused = "not so"
        except RuntimeError as error:
            refused = str(error).split(" expression")[0]
    lesson.check("torch.export refuses it", refused, refused.startswith("Could not guard"))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        program = torch.export.export(Captured(), (torch.tensor(5.0),)).module()
        values = [program(torch.tensor(value)).item() for value in twice]
    row("  while_loop and cond it takes", said.getvalue().count("here"), 6, "1 graph", values)
    print("  AutoGraph is how @tf.function understands it: it rewrites the source, so that")
    for statement, call in autograph_calls().items():
        print(f"    {statement:<18} becomes  {call}")


def autograph_calls() -> dict[str, str]:
    """Return what AutoGraph makes of the loop and of the branch of `follow`."""
    code = tensorflow().autograph.to_code(follow)
    calls = [
        line.strip()
        for line in code.splitlines()
        if "ag__.while_stmt(" in line or "ag__.if_stmt(" in line
    ]
    return {
        f"{call.split('_stmt')[0].removeprefix('ag__.')} ...:": f"{call.split(',')[0]}, ...)"
        for call in calls
    }


def keras_narrow() -> tuple[keras.Model, list[int]]:
    """Return a layer in Keras whose width follows the data, and a list: an item for every run."""
    tf = tensorflow()
    from keras import Model

    traced = []

    class Narrow(Model):
        def build(self, shape: tuple) -> None:
            self.table = self.add_weight(shape=(8, 2))

        def call(self, x: tf.Tensor) -> tf.Tensor:
            traced.append(x.shape[1])
            return x @ self.table[: tf.shape(x)[1]]

    model = Narrow()
    model(tf.zeros((8, 4)))
    model.compile("adam", "mse")
    traced.clear()
    return model, traced


def compare_shapes() -> None:
    """Give a layer batches of other sizes and widths; count what is traced or compiled anew."""
    tf = tensorflow()
    shapes = ((8, 4), (16, 4), (32, 4), (8, 6), (8, 7), (8, 4))
    table, same = torch.ones(8, 2), tf.ones((8, 2))

    def narrow(x: tf.Tensor) -> tf.Tensor:
        return x @ same[: tf.shape(x)[1]]  # x.shape, at tracing, does not know a size left open

    static, relaxed = tf.function(narrow), tf.function(narrow, reduce_retracing=True)
    model, traced = keras_narrow()
    print("\n  A layer whose width follows the data, and six batches, of five sizes and widths:")
    with counted_graphs() as (backend, graphs), quiet():  # TensorFlow warns of so much tracing
        compiled = torch.compile(lambda x: x @ table[: x.shape[1]], backend=backend)
        for shape in shapes:
            static(tf.zeros(shape))
            relaxed(tf.zeros(shape))
            compiled(torch.zeros(shape))
            model.fit(tf.zeros(shape), tf.zeros((shape[0], 2)), shape[0], verbose=0)
    show("@tf.function", f"{static.experimental_get_tracing_count()} graphs")
    show("  with reduce_retracing", f"{relaxed.experimental_get_tracing_count()} graphs")
    show("Keras, fit()", f"Python ran {len(traced)} times, which leaves sizes open too")
    show("torch.compile", f"{len(graphs)} graphs: a size that changes is then left open")
    show("PyTorch and TensorFlow, eager", "nothing to do again")


# %% Other layers from one batch to the next


def compare_structure(calls: int = 100) -> None:
    """Leave a layer out by chance, decided in Python; count how often each mode really does."""
    tf = tensorflow()

    def sometimes(x: Any) -> Any:  # noqa: ANN401 - a tensor of either framework
        return x + 1 if random.random() < 0.5 else x

    def in_the_graph(x: tf.Tensor) -> tf.Tensor:
        return tf.cond(tf.random.uniform(()) < 0.5, lambda: x + 1, lambda: x)

    print(
        f"\n  A layer that is left out by the toss of a coin, random.random() < 0.5, {calls} times:"
    )
    static, right = tf.function(sometimes), tf.function(in_the_graph)
    with counted_graphs() as (backend, _), quiet():
        compiled = torch.compile(sometimes, backend=backend)
        ways = {
            "PyTorch, eager": lambda: sometimes(torch.zeros(())),
            "torch.compile": lambda: compiled(torch.zeros(())),
            "TensorFlow, eager": lambda: sometimes(tf.zeros(())),
            "@tf.function": lambda: static(tf.zeros(())),
            "  tossed by TensorFlow": lambda: right(tf.zeros(())),
        }
        tf.random.set_seed(0)
        used = {}
        for name, way in ways.items():
            random.seed(0)  # the same tosses for all
            used[name] = sum(int(way()) for _ in range(calls))
    for name, count in used.items():
        frozen = ", as at tracing, for ever" if count in (0, calls) else ""
        show(name, f"used {count} times{frozen}")
    fair = all(30 < count < 70 for name, count in used.items() if name != "@tf.function")
    lesson.check(
        "only Python's coin in a graph lies",
        "on one side",
        fair and used["@tf.function"] in (0, calls),
    )


# %% An error inside the network


class Lookup(nn.Module):
    """Looks up rows of a table: an error if one is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, 2))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return (samples, 2) for `rows`, (samples,) int64."""
        return self.table[rows]  # the line


def keras_lookup() -> keras.Model:
    """Return the same in Keras."""
    tf = tensorflow()
    from keras import Model

    class Lookup(Model):
        def build(self, shape: tuple) -> None:
            self.table = self.add_weight(shape=(3, 2))

        def call(self, rows: tf.Tensor) -> tf.Tensor:
            return tf.gather(self.table, rows)  # the line

    model = Lookup()
    model.compile("adam", "mse")
    return model


def traceback_of(function: Callable[[], object]) -> tuple[str, int, int | None]:
    """Return the kind of error of `function`, the lines of its traceback, and how far up ours is.

    Ours is the line of the network at fault, counted from the last line; None if it is not there.
    """
    source = Path(__file__).read_text().splitlines()
    numbers = [n for n, line in enumerate(source, start=1) if line.endswith("# the line")]
    named = re.compile(rf"line ({'|'.join(map(str, numbers))}), in ")
    try:
        with quiet():
            function()
    except Exception as error:  # each mode has its own kind, which is what is looked at
        lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
        ours = (n for n, line in enumerate(reversed(lines), start=1) if named.search(line))
        return type(error).__name__, len(lines), min(ours, default=None)
    raise lesson.CheckFailed("this should fail and does not: a row that is not in the table")


def compare_errors() -> None:
    """Look up a row that is not there, in every mode; count the lines to the line at fault."""
    tf = tensorflow()
    print("\n  A row that is not in a table, in the network; how many lines the traceback has, and")
    print("  how far from its end the line at fault is named:")
    ours, theirs = Lookup(), keras_lookup()
    compiled = torch.compile(Lookup())
    bad = torch.tensor([0, 7])
    rows = tf.constant([0, 7])
    theirs(tf.constant([0, 1]))
    static = tf.function(theirs)
    ways = {
        "PyTorch, eager": lambda: ours(bad),
        "torch.compile": lambda: compiled(bad),
        "TensorFlow, eager": lambda: theirs(rows),
        "@tf.function": lambda: static(rows),
        "Keras, fit()": lambda: theirs.fit(rows, tf.zeros((2, 2)), verbose=0),
    }
    for name, way in ways.items():
        kind, lines, up = traceback_of(way)
        where = f"line {up} from the end" if up else "it is not named"
        show(name, f"{lines:>3} lines, {where}: {kind}")


# %% The picture


def traced_nodes() -> list[str]:
    """Return the operations of the one graph that @tf.function makes of `follow`."""
    tf = tensorflow()
    with contextlib.redirect_stdout(io.StringIO()):
        concrete = tf.function(follow).get_concrete_function(tf.TensorSpec((), tf.float32))
    skipped = ("Const", "Identity")
    return [node.type for node in concrete.graph.get_operations() if node.type not in skipped]


def draw(path: Path) -> None:
    """Draw what autograd recorded for two inputs beside the one traced graph, as a PNG."""
    from matplotlib.figure import Figure

    columns = {}
    for value in (5.0, -3.0):
        with contextlib.redirect_stdout(io.StringIO()):
            result = follow(torch.tensor(value, requires_grad=True))
        names = [name.removesuffix("Backward0") for name in reversed(lesson.recorded_graph(result))]
        names[0] = "x"
        columns[f"PyTorch: x = {value:g}"] = names
    columns["@tf.function: any x"] = ["x", *traced_nodes()[1:]]
    insides = {"StatelessWhile": "abs(x) > 1:  x / 2", "StatelessIf": "x * x,  or  x * x * x"}

    figure = Figure(figsize=(12, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.5, 5.4), ylim=(-2.6, 0.6))
    axes.axis("off")
    for line, (title, names) in enumerate(columns.items()):
        color = "#cf222e" if "tf" in title else "#0969da"
        box = {"boxstyle": "round,pad=0.5", "facecolor": "#f6f8fa", "edgecolor": color}
        axes.text(-0.4, -line, title, va="center", color=color, size=12)
        place = 1.2
        for number, name in enumerate(names):
            wide = name in insides
            place += 0.25 if wide else 0
            text = f"{name}\n{insides[name]}" if wide else name
            axes.text(place, -line, text, ha="center", va="center", bbox=box)
            place += 0.25 if wide else 0
            if number + 1 < len(names):
                arrow = {"arrowstyle": "->", "color": "#6e7781"}
                axes.annotate("", (place + 0.6, -line), (place + 0.25, -line), arrowprops=arrow)
            place += 0.85
    figure.savefig(path)


# %% Running it


def compare(output: Path, no_figure: bool) -> None:
    """Run every comparison; raise CheckFailed where one does not come out as said."""
    quote = "Compare PyTorch's dynamic computation graph to TensorFlow's static approach"
    heading("Static graphs beside the dynamic one", quote)
    show("PyTorch, TensorFlow", f"{torch.__version__}, {tensorflow().__version__}")
    if not no_figure:
        output.mkdir(parents=True, exist_ok=True)  # before the work, should it not be possible
    compare_training()
    compare_graphs()
    compare_shapes()
    compare_structure()
    compare_errors()
    if not no_figure:
        draw(output / "static_graph.png")
        print()
        show("drawn", shown(output / "static_graph.png"))


def options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exit with status 2, after one sentence, where one is wrong."""
    about = "The dynamic graph beside static ones, in PyTorch and in TensorFlow, on the CPU."
    return parser("static_graph", about, "--output", "--no-figure").parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the page; return its exit status."""
    chosen = options(argv)
    return run("static_graph", lambda: compare(**vars(chosen)))


if __name__ == "__main__":
    sys.exit(main())
