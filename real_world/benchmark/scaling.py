"""What a second process gains: the scaling of `distributed`."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import lesson_code as lesson
from real_world import distributed
from real_world.benchmark import BLUE, GREY, RED, ROOT, Entry, drawing, markdown, spread


def process(network: str, samples: int, steps: int) -> None:
    """Train on this process's share of `samples`; rank 0 prints the seconds of a step."""
    torch.set_num_threads(1)
    group = distributed.join({}, "gloo", torch.device("cpu"), seconds=60)
    model = distributed.wide_network(0) if network == "wide" else lesson.SimpleClassifier()
    width = next(model.parameters()).shape[1]
    X, y = lesson.make_synthetic_data(samples, width, 3)
    own = distributed.share(samples, group.rank, group.world)
    copy = DistributedDataParallel(model) if group.world > 1 else model
    optimizer = torch.optim.Adam(copy.parameters(), lr=0.001)
    times = []
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        lesson.train(copy, X[own], y[own], optimizer=optimizer, epochs=steps)
        times.append((time.perf_counter() - start) / steps)
    print(json.dumps(statistics.median(times[1:])), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    distributed.leave(0)


SCALES = {  # network, samples, steps, processes
    "wide network, 4,096 samples": ("wide", 4096, 2, 1),
    "the same work on 2 processes": ("wide", 4096, 2, 2),
    "twice the work on 2 processes": ("wide", 8192, 2, 2),
    "the lesson's, 100 samples": ("lesson", 100, 200, 1),
    "the lesson's on 2 processes": ("lesson", 100, 200, 2),
}


def seconds_of_a_step(network: str, samples: int, steps: int, processes: int) -> float:
    """Return how long a training step takes on so many processes, a thread each."""
    call = f"from {__name__} import process; process({network!r}, {samples}, {steps})"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *torchrun, "--no-python", sys.executable, "-c", call]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, check=True)
    return json.loads(done.stdout)


def measure(quick: bool) -> dict[str, Any]:
    """Time a training step on one process and on two, in turn."""
    runs: dict[str, list[float]] = {}
    turns = list(itertools.product(range(1 if quick else 3), SCALES.items()))
    for _, (name, work) in tqdm(turns, "scaling", leave=False, disable=None):
        runs.setdefault(name, []).append(seconds_of_a_step(*work))
    return {name: spread(times) for name, times in runs.items()}


def gains(results: dict[str, Any]) -> tuple[float, float, float]:
    """Return what two processes gain on the same work, on twice the work, and on the lesson's."""
    one, strong, weak, small, small_two = (measured["median"] for measured in results.values())
    return one / strong, 2 * one / weak, small / small_two


def headline(results: dict[str, Any]) -> str:
    """Return what the README's table of claims says."""
    strong, weak, small = gains(results)
    grown = f"{strong:.2f} times the speed on the same work, {weak:.2f} times on twice the work"
    return f"{grown}; at the lesson's own size {small:.2f} times: there it loses"


def table(results: dict[str, Any]) -> str:
    """Return the README's table."""
    strong, weak, small = gains(results)
    gained = ("", f"{strong:.2f} x", f"{weak:.2f} x", "", f"{small:.2f} x")
    rows = []
    for (name, measured), gain in zip(results.items(), gained, strict=True):
        low, middle, high = (
            f"{measured[key] * 1000:,.2f}" for key in ("lowest", "median", "highest")
        )
        rows.append((name, f"{middle} ms ({low} to {high})", gain))
    header = ("a training step of", "takes", "work done in the time, against one process")
    return markdown(header, rows)


def chart(results: dict[str, Any], path: Path) -> None:
    """Draw what two processes gain, beside what two cores could give, as a PNG."""
    names = ("wide, the same work", "wide, twice the work", "the lesson's size")
    gained = gains(results)
    with drawing(path, 8, 2.6) as (axes,):
        bars = axes.barh(names, gained, color=[BLUE if gain > 1 else RED for gain in gained])
        labels = [f"{gain:.2f} x" for gain in gained]
        axes.bar_label(bars, labels, padding=4)
        for speed, name in ((1, "one process"), (2, "two cores could")):
            axes.axvline(speed, color=GREY, lw=1, ls=":", zorder=0)
            axes.text(speed + 0.02, -0.45, name, color=GREY, size=8, va="bottom")
        axes.set(title="Two processes against one", xlabel="times the speed", xlim=(0, 2.4))
        axes.invert_yaxis()


ENTRY = Entry(
    "thousands of A100 GPUs coordinated via torch.distributed", measure, headline, table, chart
)
