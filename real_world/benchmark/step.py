"""One training step of the lesson's model in PyTorch, Keras, TensorFlow, JAX and others."""

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from real_world.benchmark import frameworks, harness
from real_world.benchmark.frameworks import FRAMEWORKS, Size

QUOTE = "This explicit loop, as opposed to Keras's model.fit()"

SIZES = {
    "lesson": Size(100, 4, 16, 3),
    "medium": Size(1437, 64, 128, 10),
    "wide": Size(4096, 512, 1024, 100),
    "large": Size(4096, 2048, 4096, 1000),
}
UNITS = {"lesson": "µs", "medium": "ms", "wide": "ms", "large": "ms"}
BASELINE = "PyTorch, train()"
PAUSE = 0.5  # seconds: the previous process's threads keep spinning for a while


# %% Measure
def time_steps(size: Size, rounds: int, title: str) -> dict[str, harness.Stats]:
    """Return the seconds per step by framework, each in a process of its own."""
    with contextlib.ExitStack() as stack:
        candidates = {}
        for framework in FRAMEWORKS:
            numbers = [str(number) for number in size]
            command = [sys.executable, "-m", frameworks.__name__, framework, *numbers]
            candidates[framework] = stack.enter_context(harness.worker(command))
        return harness.interleave_stats(candidates, rounds, title, PAUSE)


def time_matmul(rounds: int, n: int) -> dict[str, harness.Stats]:
    """Return the FLOP/s of an (n, n) matrix product by framework: the most that it can reach."""
    from jax import numpy as jnp

    from real_world.static_graph.tf_setup import tf

    a, b = torch.randn(2, n, n)
    a_np, b_np = a.numpy(), b.numpy()
    a_tf, b_tf = tf.constant(a_np), tf.constant(b_np)
    a_jax, b_jax = jnp.asarray(a_np), jnp.asarray(b_np)
    products: dict[str, Callable[[], object]] = {
        "PyTorch": lambda: a @ b,
        "NumPy": lambda: a_np @ b_np,
        "TensorFlow": lambda: a_tf @ b_tf,
        "JAX": lambda: (a_jax @ b_jax).block_until_ready(),
    }

    def flops_per_second(product: Callable[[], object]) -> float:
        return 2 * n**3 / harness.time_call(product)

    for product in products.values():
        product()
    candidates = {
        name: functools.partial(flops_per_second, product) for name, product in products.items()
    }
    return harness.interleave_stats(candidates, rounds, "matmul", PAUSE)


def measure(quick: bool) -> dict[str, Any]:
    """Measure every framework at every size; if quick, without the large one."""
    rounds = 1 if quick else 5
    steps = {
        name: time_steps(size, rounds, f"step, {name}")
        for name, size in SIZES.items()
        if not quick or name != "large"
    }
    return {"steps": steps, "matmul": time_matmul(rounds, 512 if quick else 4096)}


# %% Show
def table(results: dict[str, Any]) -> str:
    """Return two tables: the time of a step, and the speed of a matrix product."""
    steps = results["steps"]
    header = ["", *(f"{name} ({UNITS[name]})" for name in steps), "lesson, relative to train()"]
    layers = ["-".join(str(size) for size in SIZES[name][1:]) for name in steps]
    samples = [f"{SIZES[name].samples:,}" for name in steps]
    rows = [["samples", *samples, ""], ["layer sizes", *layers, ""]]
    rows += harness.time_rows(steps, UNITS, at="lesson", baseline=BASELINE)
    speeds = results["matmul"]
    gflops = [harness.format_number(speed["median"] / 1e9) for speed in speeds.values()]
    speed_rows = [["GFLOP/s", *gflops]]
    products = harness.markdown_table(["product of two large matrices", *speeds], speed_rows)
    return f"{harness.markdown_table(header, rows)}\n\n{products}"


def plot_steps(
    left: Axes,
    right: Axes,
    steps: dict[str, dict[str, harness.Stats]],
    sizes: dict[str, Size],
    peaks: dict[str, float],
) -> None:
    """Plot times by size; and speeds, as a percentage of `peaks`, the FLOP/s of each candidate."""
    flops = [sizes[name].flops for name in steps]
    for candidate, peak in peaks.items():
        medians = [steps[name][candidate]["median"] for name in steps]
        speeds = [flop / seconds for flop, seconds in zip(flops, medians, strict=True)]
        percentages = [100 * speed / peak for speed in speeds]
        width, zorder = (3, 3) if candidate == BASELINE else (1, 2)
        milliseconds = [1000 * median for median in medians]
        left.plot(flops, milliseconds, "o-", label=candidate, lw=width, zorder=zorder)
        right.plot(flops, percentages, "o-", lw=width, zorder=zorder)
    left.set(xlabel="FLOP per step", ylabel="ms", xscale="log", yscale="log")
    right.set(xlabel="FLOP per step", ylabel="%", xscale="log", ylim=(0, 105))
    left.legend(frameon=False, fontsize="small")


def plot(results: dict[str, Any], path: Path) -> None:
    """Save a figure: the time of a step, and the percentage of the fastest matrix product."""
    figure = Figure(figsize=(12, 4.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    speeds = {name: speed["median"] for name, speed in results["matmul"].items()}
    peak = max(speeds.values())
    plot_steps(left, right, results["steps"], SIZES, dict.fromkeys(FRAMEWORKS, peak))
    left.set_title("Time of a training step")
    right.set_title("Speed, relative to the fastest matrix product")
    limit = 100 * speeds["PyTorch"] / peak
    right.axhline(limit, color="grey", ls=":", lw=1)
    right.text(2 * right.get_xlim()[0], limit + 1, "PyTorch's matrix product", color="grey")
    figure.savefig(path)
