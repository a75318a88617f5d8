"""What a second process gains: a training step with DistributedDataParallel.

    torchrun --standalone --nproc-per-node 2 -m real_world.benchmark.scaling wide 4096 1

trains the wide model on 4,096 samples, with one thread per process; rank 0 prints the seconds per
step.
"""

import functools
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lesson_code as lesson
from real_world.benchmark import harness

QUOTE = "thousands of A100 GPUs coordinated via torch.distributed"

STEPS = {"wide": 2, "lesson": 200}  # per measurement


class Run(NamedTuple):
    """A model, the samples of a step, and how many processes and threads share them."""

    model: str
    samples: int
    processes: int
    threads: int  # per process


RUNS = {
    "wide, 1 process": Run("wide", 4096, 1, 1),
    "wide, 1 process with 2 threads": Run("wide", 4096, 1, 2),
    "wide, 2 processes": Run("wide", 4096, 2, 1),
    "wide, 2 processes, twice the samples": Run("wide", 8192, 2, 1),
    "lesson, 1 process": Run("lesson", 100, 1, 1),
    "lesson, 2 processes": Run("lesson", 100, 2, 1),
}


# %% In each process
def train_shard(model_name: str, samples: int, threads: int) -> None:
    """Train on this rank's shard of the samples; rank 0 prints the median seconds per step."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model: nn.Module = lesson.SimpleClassifier()
    in_features, num_classes = 4, 3
    if model_name == "wide":
        in_features, num_classes = 64, 10
        model = nn.Sequential(
            nn.Linear(in_features, 1024),
            nn.ReLU(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
            nn.Linear(1024, num_classes),
        )
    X, y = lesson.make_synthetic_data(samples, in_features, num_classes)
    batch = (X.chunk(world_size)[rank], y.chunk(world_size)[rank])
    if world_size > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    steps = STEPS[model_name]

    def train() -> None:
        lesson.train(model, [batch], nn.CrossEntropyLoss(), optimizer, steps)

    times = []
    for _ in range(5):
        dist.barrier()
        times.append(harness.time_call(train) / steps)
    if rank == 0:
        print(statistics.median(times[1:]), flush=True)  # the first one is slower
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo can abort a Python that is finalizing


# %% Measure
def time_step(run: Run) -> float:
    """Return the seconds per step."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.processes}"]
    module = ["-m", "real_world.benchmark.scaling", run.model, str(run.samples), str(run.threads)]
    done = subprocess.run(
        [sys.executable, *torchrun, *module],
        cwd=harness.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(run.threads)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return float(done.stdout)


def measure(quick: bool) -> dict[str, Any]:
    """Measure all runs."""
    candidates = {name: functools.partial(time_step, run) for name, run in RUNS.items()}
    return harness.interleave_stats(candidates, 1 if quick else 3, "scaling")


# %% Show
def speedups(results: dict[str, Any]) -> dict[str, float]:
    """Return the samples per second, relative to one process with one thread."""
    speeds = {name: RUNS[name].samples / stats["median"] for name, stats in results.items()}
    baselines = {name: speeds[f"{RUNS[name].model}, 1 process"] for name in speeds}
    return {name: speeds[name] / baselines[name] for name in speeds}


def table(results: dict[str, Any]) -> str:
    """Return the time of a step by run, and its speedup."""
    header = ["model", "samples per step", "step (ms)", "speedup, in samples per second"]
    rows = []
    for name, speedup in speedups(results).items():
        step_time = harness.format_time(results[name]["median"], "ms")
        rows.append([name, f"{RUNS[name].samples:,}", step_time, f"{speedup:.2f} x"])
    return harness.markdown_table(header, rows)


def plot(results: dict[str, Any], path: Path) -> None:
    """Save a figure: the speedups as bars."""
    bars = {name: x for name, x in speedups(results).items() if not name.endswith(" 1 process")}
    figure = Figure(figsize=(8, 2.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    container = axes.barh(list(bars), list(bars.values()))
    axes.bar_label(container, [f"{speedup:.2f} x" for speedup in bars.values()], padding=4)
    axes.set(title="Speedup on two cores", xlim=(0, 2.2), xticks=(0, 0.5, 1, 1.5, 2))
    axes.set_xlabel("samples per second, relative to 1 process with 1 thread")
    axes.invert_yaxis()
    figure.savefig(path)


if __name__ == "__main__":
    train_shard(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
