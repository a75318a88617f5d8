"""The latency of a call, by model and batch size."""

import statistics
import time

import torch
from tqdm import tqdm

from real_world.deploy.formats import MAX_BATCH, Forward

BATCH_SIZES = (1, 64, MAX_BATCH)


def measure_latency(
    models: dict[str, Forward], X: torch.Tensor, rounds: int = 300, calls: int = 10
) -> dict[tuple[str, int], float]:
    """Return the median time of a call in seconds, by name and batch size.

    Every round times all models, so that other work of the machine affects all of them.
    """
    times: dict[tuple[str, int], list[float]] = {}
    for _ in tqdm(range(rounds), "timing", leave=False, disable=None):
        for batch_size in BATCH_SIZES:
            batch = X[:batch_size]
            for name, forward in models.items():
                start = time.perf_counter()
                for _ in range(calls):
                    forward(batch)
                seconds = (time.perf_counter() - start) / calls
                times.setdefault((name, batch_size), []).append(seconds)
    return {key: statistics.median(values) for key, values in times.items()}


def print_latency(latency: dict[tuple[str, int], float]) -> None:
    """Print a row per model, with its latencies and their ratios to those of "eager"."""
    print("\n  Microseconds per call, and the ratio to eager, by batch size")
    print("  (PyTorch uses one thread, ExecuTorch its own thread pool):")
    print(" " * 22 + "".join(f"{batch_size:>11,}{'':8}" for batch_size in BATCH_SIZES).rstrip())
    for name in dict.fromkeys(name for name, _ in latency):
        line = f"    {name:<18}"
        for batch_size in BATCH_SIZES:
            seconds = latency[name, batch_size]
            ratio = seconds / latency["eager", batch_size]
            line += f"{seconds * 1e6:>11.1f}  {ratio:>4.2f} x"
        print(line)
