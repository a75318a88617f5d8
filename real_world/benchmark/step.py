"""One training step of the article's network, in every framework."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

import lesson_code as lesson
from real_world import quiet
from real_world.benchmark import BLUE, GREY, Entry, alternate, drawing, markdown, scaled, worker

if TYPE_CHECKING:
    import keras
    import tensorflow as tf
    from matplotlib.axes import Axes

LR = 0.01


class Size(NamedTuple):
    """How much there is to multiply."""

    samples: int
    features: int
    hidden: int
    classes: int

    @property
    def flops(self) -> int:
        """The operations of a step's matrix products; the input needs no gradient."""
        return 2 * self.samples * self.hidden * (2 * self.features + 3 * self.classes)


SIZES = {
    "the lesson's": Size(100, 4, 16, 3),
    "the digits'": Size(1437, 64, 128, 10),
    "wide": Size(4096, 512, 1024, 100),
    "all matrix product": Size(4096, 2048, 4096, 1000),
}


# %% The ways: each takes a network and its data, and trains it for so many steps


Training = Callable[[int], list[float]]
"""Goes on training for so many steps; returns the loss of each."""


def by_train(model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor) -> Training:
    """Train by the lesson's train()."""
    optimizer = torch.optim.Adam(model.parameters(), LR)
    return lambda steps: lesson.train(model, [(X, y)], nn.CrossEntropyLoss(), optimizer, steps)


def by_compiled_train(model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor) -> Training:
    """Train by the lesson's train() too, whose network, criterion and optimizer are compiled."""
    optimizer = torch.optim.Adam(model.parameters(), LR)
    optimizer.step = torch.compile(optimizer.step)
    criterion, compiled = torch.compile(nn.functional.cross_entropy), torch.compile(model)
    named = {"criterion": criterion, "optimizer": optimizer}
    return lambda steps: lesson.train(compiled, [(X, y)], **named, epochs=steps)


def by_keras(model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor) -> Training:
    """Train by Keras's fit(), as the lesson does: an epoch a step."""
    twin, inputs, labels = keras_network(model, X, y)
    whole = {"batch_size": len(X), "shuffle": False, "verbose": 0}
    return lambda steps: twin.fit(inputs, labels, epochs=steps, **whole).history["loss"]


def by_keras_at_length(
    model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor
) -> Training:
    """Train by Keras's fit(), all steps in one epoch, of which it returns the mean loss alone."""
    from real_world import static_graph

    twin, *data = keras_network(model, X, y)
    again = static_graph.tensorflow().data.Dataset.from_tensors(tuple(data)).repeat()
    quietly = {"shuffle": False, "verbose": 0}
    return lambda steps: twin.fit(again, steps_per_epoch=steps, **quietly).history["loss"]


def keras_network(
    model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor
) -> tuple[keras.Model, tf.Tensor, tf.Tensor]:
    """Return the same network in Keras, ready to train, and the data."""
    from real_world import static_graph

    tf = static_graph.tensorflow()
    from keras import losses, optimizers

    twin = static_graph.keras_twin(model)
    criterion = losses.SparseCategoricalCrossentropy(from_logits=True)
    twin.compile(optimizers.Adam(LR, epsilon=static_graph.EPSILON), criterion)
    return twin, tf.constant(X.numpy()), tf.constant(y.numpy())


def by_tensorflow(model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor) -> Training:
    """Train by a @tf.function, with Keras's layers and optimizer."""
    from real_world import static_graph

    tf = static_graph.tensorflow()
    step = tf.function(static_graph.keras_step(static_graph.keras_twin(model)))
    inputs, labels = tf.constant(X.numpy()), tf.constant(y.numpy())
    return lambda steps: [step(inputs, labels) for _ in range(steps)]


def by_jax(model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor) -> Training:
    """Train by JAX, gradient and Adam compiled together by jit."""
    import jax
    from jax import numpy as jnp

    parameters = [jnp.asarray(w.detach().numpy()) for w in model.parameters()]
    inputs, labels = jnp.asarray(X.numpy()), jnp.asarray(y.numpy())

    def criterion(parameters: list) -> jax.Array:
        W1, b1, W2, b2 = parameters
        logits = jax.nn.relu(inputs @ W1.T + b1) @ W2.T + b2
        return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()

    @jax.jit
    def update(parameters: list, averages: list, squares: list, t: int) -> tuple:
        loss, gradients = jax.value_and_grad(criterion)(parameters)
        averages = [0.9 * m + 0.1 * g for m, g in zip(averages, gradients, strict=True)]
        squares = [0.999 * v + 0.001 * g**2 for v, g in zip(squares, gradients, strict=True)]
        parameters = [
            w - LR / (1 - 0.9**t) * m / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
            for w, m, v in zip(parameters, averages, squares, strict=True)
        ]
        return parameters, averages, squares, loss

    zeros = [jnp.zeros_like(w) for w in parameters]
    state, times = [parameters, zeros, zeros], itertools.count(1)

    def step() -> jax.Array:
        *state[:], loss = update(*state, next(times))
        return loss.block_until_ready()

    return lambda steps: [step() for _ in range(steps)]


def by_scikit_learn(model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor) -> Training:
    """Train scikit-learn's own network of the same sizes, from weights of its own."""
    from sklearn.neural_network import MLPClassifier

    def fit(steps: int) -> list[float]:
        same = {"batch_size": len(X), "shuffle": False, "alpha": 0, "learning_rate_init": LR}
        never = {"tol": 0.0, "n_iter_no_change": steps + 1}
        sizes = (model.fc1.out_features,)
        network = MLPClassifier(sizes, max_iter=steps, **same, **never)
        with quiet():  # it warns that it has not converged
            return network.fit(X.numpy(), y.numpy()).loss_curve_

    return fit


def by_hand(model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor) -> Training:
    """Train without any framework: NumPy, the gradients by hand, Adam by hand."""
    W1, b1, W2, b2 = parameters = [w.detach().numpy().copy() for w in model.parameters()]
    averages, squares = ([np.zeros_like(w) for w in parameters] for _ in range(2))
    inputs, labels, rows = X.numpy(), y.numpy(), np.arange(len(y))
    truth = np.eye(len(b2), dtype=np.float32)[labels]
    times = itertools.count(1)

    def step() -> float:
        hidden = inputs @ W1.T + b1
        active = np.maximum(hidden, 0)
        logits = active @ W2.T + b2
        logits -= logits.max(axis=1, keepdims=True)
        shares = np.exp(logits)
        shares /= shares.sum(axis=1, keepdims=True)
        slope = (shares - truth) / len(labels)
        back = slope @ W2
        back[hidden <= 0] = 0
        gradients = (back.T @ inputs, back.sum(axis=0), slope.T @ active, slope.sum(axis=0))
        t = next(times)
        for w, gradient, average, square in zip(
            parameters, gradients, averages, squares, strict=True
        ):
            average += 0.1 * (gradient - average)
            square += 0.001 * (gradient**2 - square)
            scale = (square / (1 - 0.999**t)) ** 0.5 + 1e-8
            w -= LR / (1 - 0.9**t) * average / scale
        return -np.log(shares[rows, labels]).mean().item()

    return lambda steps: [step() for _ in range(steps)]


WAYS = {
    "train()": by_train,
    "train(), torch.compile": by_compiled_train,
    "Keras, fit()": by_keras,
    "Keras, fit(), in one epoch": by_keras_at_length,
    "TensorFlow, @tf.function": by_tensorflow,
    "JAX, jit": by_jax,
    "scikit-learn, MLPClassifier": by_scikit_learn,
    "NumPy, by hand": by_hand,
}


def training(way: str, size: Size) -> Training:
    """Return what trains the same network on the same data in that way."""
    X, y = lesson.make_synthetic_data(size.samples, size.features, size.classes)
    torch.manual_seed(0)
    model = lesson.SimpleClassifier(size.features, size.hidden, size.classes)
    return WAYS[way](model, X / size.features**0.5, y)


# %% Timing them


def process(way: str, *size: int) -> None:
    """Say when `way` is warm; then, for every line that comes in, print the seconds of a step."""
    train = training(way, Size(*size))
    train(2)  # to trace, to compile
    start = time.perf_counter()
    train(2)
    # Half a second at least: the threads of a process that has slept share a core at first.
    steps = max(2, round(1 / (time.perf_counter() - start)))
    print("warm", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        train(steps)
        print((time.perf_counter() - start) / steps, flush=True)


def steps_by_way(
    ways: tuple[str, ...], sizes: dict[str, Size], rounds: int, title: str
) -> dict[str, dict[str, Any]]:
    """Time a step at every size, in every way, each in a process of its own."""
    results = {}
    for name, size in sizes.items():
        with contextlib.ExitStack() as stack:
            asks = {}
            for way in ways:
                call = f"from {__name__} import process; process({way!r}, *{tuple(size)})"
                asks[way] = stack.enter_context(worker(way, [sys.executable, "-c", call]))

            def seconds(ask: Callable[[], float]) -> float:
                time.sleep(0.5)  # OpenBLAS's threads go on spinning for a while
                return ask()

            asked = {way: functools.partial(seconds, ask) for way, ask in asks.items()}
            results[name] = alternate(asked, rounds, f"{title}, {name}")
    return results


def matrix_products(rounds: int, size: int = 4096) -> dict[str, Any]:
    """Time a product of two square matrices in every framework: the most that each can do here."""
    from jax import numpy as jnp

    from real_world import static_graph

    tf = static_graph.tensorflow()
    pair = torch.randn(2, size, size)
    in_tf, in_jax = ([make(m.numpy()) for m in pair] for make in (tf.constant, jnp.asarray))
    a, b = pair
    ways = {
        "PyTorch": lambda: a @ b,
        "NumPy": lambda: a.numpy() @ b.numpy(),
        "TensorFlow": lambda: tf.matmul(*in_tf),  # on a CPU, done when it returns
        "JAX": lambda: jnp.matmul(*in_jax).block_until_ready(),
    }

    def seconds(way: Callable[[], object]) -> float:
        time.sleep(0.5)  # the threads of the one before
        start = time.perf_counter()
        way()
        return time.perf_counter() - start

    timed = {name: functools.partial(seconds, way) for name, way in ways.items()}
    for way in ways.values():
        way()
    return alternate(timed, rounds, "products")


def measure(quick: bool) -> dict[str, Any]:
    """Time a training step of the article's network; if it is to be quick, without the largest."""
    *fewer, _ = SIZES.items()
    sizes, rounds = (dict(fewer), 1) if quick else (SIZES, 5)
    results: dict[str, Any] = steps_by_way(tuple(WAYS), sizes, rounds, "step")
    return results | {"products": matrix_products(rounds)}


# %% Showing them


def peaks(results: dict[str, Any]) -> dict[str, float]:
    """Return the operations a second of a matrix product, by framework."""
    products = results["products"].items()
    return {name: 2 * 4096**3 / measured["median"] for name, measured in products}


def of_peak(results: dict[str, Any], size: str, way: str, peak: float) -> float:
    """Return what share of `peak` the matrix products of a step reach."""
    return SIZES[size].flops / results[size][way]["median"] / peak


def headline(results: dict[str, Any]) -> str:
    """Return what the README's table of claims says."""
    small, peak = results["the lesson's"], peaks(results)
    ours = small["train()"]["median"]
    keras, at_length, traced = (
        small[name]["median"] / ours
        for name in ("Keras, fit()", "Keras, fit(), in one epoch", "TensorFlow, @tf.function")
    )
    own, best = (
        of_peak(results, "all matrix product", "train()", most)
        for most in (peak["PyTorch"], max(peak.values()))
    )
    speed = (
        f"At the lesson's size {keras:.0f} times as fast as `fit()` with an epoch a step, as the"
        f" lesson has them, {at_length:.1f} times as `fit()` with all steps in one,"
        f" {traced:.1f} times as"
    )
    large = (
        f"{own:.0%} of what PyTorch's own matrix product reaches, {best:.0%} of the fastest one's"
    )
    return f"{speed} `@tf.function`; at the largest {large}"


def table(results: dict[str, Any]) -> str:
    """Return the README's tables: the steps by size, and what a matrix product reaches."""
    names, best = [name for name in SIZES if name in results], max(peaks(results).values())
    rows = [["samples x features x hidden x classes"]]
    rows[0] += (" x ".join(f"{part:,}" for part in SIZES[name]) for name in names)
    for way in WAYS:
        cells = []
        for name in names:
            measured, ours = (results[name][which] for which in (way, "train()"))
            ratio = f"{measured['median'] / ours['median']:.2f} x"
            share = of_peak(results, name, way, best)
            cells.append(f"{scaled(measured, measured['median'])}, {ratio}, {share:.0%}")
        rows.append([way, *cells])
    rates = (f"{rate / 1e9:,.0f}" for rate in peaks(results).values())
    products = markdown(
        ("a 4,096 x 4,096 matrix product", *peaks(results)),
        [("billion operations a second", *rates)],
    )
    return f"{markdown(('a training step', *names), rows)}\n\n{products}"


def plot_ways(
    panels: Sequence[Axes],
    results: dict[str, Any],
    sizes: dict[str, Size],
    ways: Iterable[str],
    share: Callable[[str, str], float],
) -> None:
    """Draw the time of a step by the operations in it, and what `share` says of a size and way."""
    times, shares = panels
    flops = [size.flops / 1e9 for size in sizes.values()]
    for way in ways:
        look = {"lw": 2.5, "color": BLUE, "zorder": 3} if way == "train()" else {"lw": 1}
        medians = [results[name][way]["median"] * 1000 for name in sizes]
        times.plot(flops, medians, "o-", label=way, **look)
        shares.plot(flops, [100 * share(name, way) for name in sizes], "o-", **look)
    times.set(ylabel="ms", yscale="log")
    shares.set(ylabel="%", ylim=(0, 105))
    for axes in panels:
        axes.set(xlabel="billion operations in a step", xscale="log")
    times.legend(frameon=False, loc="lower right", fontsize="small")


def chart(results: dict[str, Any], path: Path) -> None:
    """Draw the time of a step, and its share of the fastest matrix product, as a PNG."""
    peak = peaks(results)
    best = max(peak.values())
    with drawing(path, 12, 4.5, columns=2) as (times, shares):
        share = functools.partial(of_peak, results, peak=best)
        plot_ways((times, shares), results, SIZES, WAYS, share)
        own = 100 * peak["PyTorch"] / best
        shares.axhline(own, color=GREY, ls=":", lw=1)
        start = shares.get_xlim()[0] * 2
        shares.text(start, own + 1, "PyTorch's own matrix product", color=GREY)
        times.set_title("A training step")
        shares.set_title("Share of the fastest matrix product")


ENTRY = Entry(
    "This explicit loop, as opposed to Keras's model.fit()", measure, headline, table, chart
)
