"""One training step on a GPU: eager, with torch.compile, with CUDA graphs, and in bfloat16."""

import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn

import lesson_code as lesson
from real_world.benchmark import harness, step
from real_world.benchmark.frameworks import LR, Size, Train

QUOTE = "every operation on it executes on the GPU transparently"

SIZES = step.SIZES | {"large": Size(16_384, 8_192, 8_192, 8_192)}
UNITS = {"lesson": "µs", "medium": "µs", "wide": "ms", "large": "ms"}


class Variant(NamedTuple):
    """How train() runs; float32 does not mean TF32 here."""

    compiled: bool = False
    cuda_graphs: bool = False
    dtype: torch.dtype = torch.float32


VARIANTS = {
    step.BASELINE: Variant(),
    "torch.compile": Variant(compiled=True),
    "CUDA graphs": Variant(cuda_graphs=True),
    "bfloat16": Variant(dtype=torch.bfloat16),
    "bfloat16, torch.compile": Variant(compiled=True, dtype=torch.bfloat16),
}


# %% Measure
def build_training(variant: Variant, size: Size, device: torch.device) -> Train:
    """Return the training of a variant; the weights and the data are those of frameworks.py."""
    X, y = lesson.make_synthetic_data(
        size.samples, size.in_features, size.num_classes, device=device
    )
    X = X / size.in_features**0.5
    torch.manual_seed(0)
    model = lesson.SimpleClassifier(size.in_features, size.hidden_size, size.num_classes).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    forward: Any = model
    if variant.compiled:
        forward = torch.compile(model, dynamic=False)
    if variant.cuda_graphs:
        forward = torch.cuda.make_graphed_callables(model, (X,))  # one forward, one backward graph

    def train(steps: int) -> list[float]:
        # Without the cache, which would keep the bfloat16 weights of the first step.
        with torch.autocast(
            device.type,
            torch.bfloat16,
            enabled=variant.dtype == torch.bfloat16,
            cache_enabled=False,
        ):
            return lesson.train(forward, [(X, y)], nn.CrossEntropyLoss(), optimizer, steps)

    return train


def time_step(train: Train, steps: int) -> float:
    """Return the seconds per step; train() waits for the GPU once, at its end."""
    return harness.time_call(lambda: train(steps)) / steps


def matmul_speed(matrix: torch.Tensor) -> float:
    """Return the FLOP/s of ten products of a square matrix with itself."""

    def multiply() -> None:
        for _ in range(10):
            matrix @ matrix
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return 10 * 2 * len(matrix) ** 3 / harness.time_call(multiply)


def measure(quick: bool) -> dict[str, Any]:
    """Measure every variant at every size."""
    if not torch.cuda.is_available():
        sys.exit("error: the entry cuda needs an NVIDIA GPU, and a PyTorch with CUDA")
    device, rounds = torch.device("cuda"), 1 if quick else 7
    steps = {}
    for name, size in SIZES.items():
        torch.compiler.reset()  # it compiles a function for at most eight kinds of input
        candidates = {}
        for variant_name, variant in VARIANTS.items():
            train = build_training(variant, size, device)
            train(5)  # compile
            count = max(5, round(0.2 / time_step(train, 5)))
            candidates[variant_name] = functools.partial(time_step, train, count)
        steps[name] = harness.interleave_stats(candidates, rounds, f"cuda, {name}")
    speeds = {}
    for dtype in ("float32", "bfloat16"):
        matrix = torch.randn(8192, 8192, device=device, dtype=getattr(torch, dtype))
        matmul_speed(matrix)  # warm up
        speeds[dtype] = functools.partial(matmul_speed, matrix)
    matmul = harness.interleave_stats(speeds, rounds, "cuda, matmul")
    return {"gpu": torch.cuda.get_device_name(), "steps": steps, "matmul": matmul}


# %% Show
def table(results: dict[str, Any]) -> str:
    """Return the time of a step by variant and size."""
    steps = results["steps"]
    header = [results["gpu"], *(f"{name} ({UNITS[name]})" for name in steps)]
    header.append("large, relative to train()")
    rows = harness.time_rows(steps, UNITS, at="large", baseline=step.BASELINE)
    return harness.markdown_table(header, rows)


def plot(results: dict[str, Any], path: Path) -> None:
    """Save a figure: the time of a step, and the percentage of a matrix product of its dtype."""
    figure = Figure(figsize=(12, 4.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    peaks = {
        name: results["matmul"][str(variant.dtype).removeprefix("torch.")]["median"]
        for name, variant in VARIANTS.items()
    }
    step.plot_steps(left, right, results["steps"], SIZES, peaks)
    left.set_title(f"Time of a training step on {results['gpu']}")
    right.set_title("Speed, relative to a matrix product of the same dtype")
    figure.savefig(path)
