"""What a second process gains: the scaling of `distributed`."""

from __future__ import annotations

import functools
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
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lesson_code as lesson
from real_world import distributed
from real_world.benchmark import BLUE, GREY, RED, ROOT, Entry, alternate, drawing, markdown


def process(network: str, samples: int, steps: int, threads: int) -> None:
    """Train on this process's share of `samples`; print the seconds of a step.

    Only rank 0 is heard: distributed.join() closes the others' standard output.
    """
    torch.set_num_threads(threads)
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
        lesson.train(copy, [(X[own], y[own])], nn.CrossEntropyLoss(), optimizer, steps)
        times.append((time.perf_counter() - start) / steps)
    print(json.dumps(statistics.median(times[1:])), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    distributed.leave(0)


SCALES = {  # network, samples, steps, processes, threads of each
    "wide network, 4,096 samples": ("wide", 4096, 2, 1, 1),
    "  the same, with a thread a core": ("wide", 4096, 2, 1, 2),
    "the same work on 2 processes": ("wide", 4096, 2, 2, 1),
    "twice the work on 2 processes": ("wide", 8192, 2, 2, 1),
    "the lesson's, 100 samples": ("lesson", 100, 200, 1, 1),
    "the lesson's on 2 processes": ("lesson", 100, 200, 2, 1),
}


def seconds_of_a_step(
    network: str, samples: int, steps: int, processes: int, threads: int = 1
) -> float:
    """Return how long a training step takes on so many processes, of so many threads."""
    call = f"from {__name__} import process; process({network!r}, {samples}, {steps}, {threads})"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *torchrun, "--no-python", sys.executable, "-c", call]
    limited = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=limited, capture_output=True, check=True)
    return json.loads(done.stdout)


def measure(quick: bool) -> dict[str, Any]:
    """Time a training step on one process and on two, in turn."""
    ways = {name: functools.partial(seconds_of_a_step, *work) for name, work in SCALES.items()}
    return alternate(ways, 1 if quick else 3, "scaling")


def gains(results: dict[str, Any]) -> tuple[float, float, float]:
    """Return what two processes gain on the same work, on twice the work, and on the lesson's."""
    one, _, strong, weak, small, small_two = (measured["median"] for measured in results.values())
    return one / strong, 2 * one / weak, small / small_two


def headline(results: dict[str, Any]) -> str:
    """Return what the README's table of claims says."""
    strong, weak, small = gains(results)
    grown = f"{strong:.2f} times the speed on the same work, {weak:.2f} times on twice the work"
    return f"{grown}; at the lesson's own size {small:.2f} times: there it loses"


def table(results: dict[str, Any]) -> str:
    """Return the README's table."""
    strong, weak, small = gains(results)
    one, threads, *_ = (measured["median"] for measured in results.values())
    gained = ("", *(f"{gain:.2f} x" for gain in (one / threads, strong, weak)), "")
    gained += (f"{small:.2f} x",)
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
        for bar, gain in zip(bars, gained, strict=True):
            inside = {"x": gain / 2, "ha": "center", "color": "white"}
            beside = {"x": gain + 0.03, "ha": "left"}
            middle = bar.get_y() + bar.get_height() / 2
            axes.text(y=middle, s=f"{gain:.2f} x", va="center", **(inside if gain > 1 else beside))
        for speed, name in ((1, "one process"), (2, "two cores could")):
            axes.axvline(speed, color=GREY, lw=1, ls=":", zorder=0)
            axes.text(speed + 0.02, -0.45, name, color=GREY, size=8, va="bottom")
        axes.set(title="Two processes against one", xlabel="times the speed", xlim=(0, 2.4))
        axes.invert_yaxis()


ENTRY = Entry(
    "thousands of A100 GPUs coordinated via torch.distributed", measure, headline, table, chart
)
