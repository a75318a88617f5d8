"""A training step on a GPU: eager, compiled, as a CUDA graph, and in bfloat16."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lesson_code as lesson
from real_world.benchmark import Entry, alternate, drawing, markdown, step
from real_world.benchmark.step import LR, Size, Training

SIZES = {**step.SIZES, "all matrix product": Size(16_384, 8_192, 8_192, 8_192)}


def plain(model: lesson.SimpleClassifier, X: torch.Tensor) -> torch.nn.Module:
    """Return the network as it is."""
    return model


def compiled(model: lesson.SimpleClassifier, X: torch.Tensor) -> torch.nn.Module:
    """Return the network under torch.compile, whose kernels Triton writes."""
    return torch.compile(model, dynamic=False)


def graphed(model: lesson.SimpleClassifier, X: torch.Tensor) -> torch.nn.Module:
    """Return the network whose forward and backward pass are each one CUDA graph for this X."""
    return torch.cuda.make_graphed_callables(model, (X,))


WAYS = {  # what becomes of the network, and the type of its products: float32 is not TF32 here
    "train()": (plain, torch.float32),
    "train(), torch.compile": (compiled, torch.float32),
    "train(), CUDA graphs": (graphed, torch.float32),
    "train(), bfloat16": (plain, torch.bfloat16),
    "train(), bfloat16, torch.compile": (compiled, torch.bfloat16),
}


def training(way: str, size: Size, device: torch.device) -> Training:
    """Return what trains the same network on the same data in that way."""
    change, dtype = WAYS[way]
    X, y = lesson.make_synthetic_data(size.samples, size.features, size.classes, device=device)
    X = X / size.features**0.5
    torch.manual_seed(0)
    model = lesson.SimpleClassifier(size.features, size.hidden, size.classes).to(device)
    optimizer = torch.optim.Adam(model.parameters(), LR, fused=True)
    changed = change(model, X)

    def train(steps: int) -> list[float]:
        half = {"dtype": torch.bfloat16, "enabled": dtype == torch.bfloat16}
        # Its cache of weights in bfloat16 would outlive the step that changes them.
        with torch.autocast(device.type, **half, cache_enabled=False):
            return lesson.train(changed, [(X, y)], nn.CrossEntropyLoss(), optimizer, steps)

    return train


def seconds_a_step(train: Training, steps: int) -> float:
    """Return how long a step takes; train() waits for the device once, at its end."""
    start = time.perf_counter()
    train(steps)
    return (time.perf_counter() - start) / steps


def seconds_a_product(matrix: torch.Tensor) -> float:
    """Return how long a product of `matrix` with itself takes, over ten of them."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        matrix @ matrix
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 10


def measure(quick: bool) -> dict[str, Any]:
    """Time a step at every size, in every way; raise OSError where there is no GPU."""
    if not torch.cuda.is_available():
        raise OSError("this entry needs an NVIDIA GPU, and PyTorch finds none here")
    device, rounds = torch.device("cuda"), 1 if quick else 7
    results: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for name, size in SIZES.items():
        torch.compiler.reset()  # for it compiles a function for eight kinds of input and no more
        ways: dict[str, Callable[[], float]] = {}
        for way in WAYS:
            train = training(way, size, device)
            train(5)  # to compile
            steps = max(5, round(0.2 / seconds_a_step(train, 5)))
            ways[way] = functools.partial(seconds_a_step, train, steps)
        results[name] = alternate(ways, rounds, f"cuda, {name}")
    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(8192, 8192, device=device, dtype=dtype)
        seconds_a_product(matrix)
        products[str(dtype)] = functools.partial(seconds_a_product, matrix)
    results["products"] = alternate(products, rounds, "cuda, products")
    return results


def of_peak(results: dict[str, Any], size: str, way: str) -> float:
    """Return what share of a matrix product of the same type a step's products reach."""
    peak = 2 * 8192**3 / results["products"][str(WAYS[way][1])]["median"]
    return SIZES[size].flops / results[size][way]["median"] / peak


def headline(results: dict[str, Any]) -> str:
    """Return what the README says."""
    small, large = (results[name] for name in ("the lesson's", "all matrix product"))
    _, *others = WAYS
    gains = {way: small["train()"]["median"] / small[way]["median"] for way in others}
    best = max(gains, key=gains.get)
    half = large["train()"]["median"] / large["train(), bfloat16"]["median"]
    shares = (
        of_peak(results, "all matrix product", way) for way in ("train()", "train(), bfloat16")
    )
    float32, bfloat16 = (f"{share:.0%}" for share in shares)
    speed = (
        f"On {results['device']}, at the lesson's size {best} is {gains[best]:.1f} times as fast"
    )
    most = (
        f"at the largest bfloat16 {half:.1f} times, {float32} and {bfloat16} of their types' peaks"
    )
    return f"{speed} as eager; {most}"


def table(results: dict[str, Any]) -> str:
    """Return the README's table: by size, a step, its ratio to eager's, and its share of peak."""
    rows = []
    for way in WAYS:
        cells = []
        for name in SIZES:
            median, eager = (results[name][which]["median"] for which in (way, "train()"))
            share = of_peak(results, name, way)
            cells.append(f"{median * 1000:,.3g} ms, {median / eager:.2f} x, {share:.0%}")
        rows.append((way, *cells))
    return markdown((f"a step on {results['device']}", *SIZES), rows)


def chart(results: dict[str, Any], path: Path) -> None:
    """Draw the time of a step by the operations in it, and its share of the peak, as a PNG."""
    with drawing(path, 12, 4.5, columns=2) as (times, shares):
        share = functools.partial(of_peak, results)
        step.plot_ways((times, shares), results, SIZES, WAYS, share)
        times.set_title(f"A training step on {results['device']}")
        shares.set_title("Share of a matrix product of the same type")


ENTRY = Entry(
    "every operation on it executes on the GPU transparently", measure, headline, table, chart
)
