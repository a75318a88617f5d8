"""Every ratio that `real_world/README.md` quotes, measured side by side in one run.

    python -m real_world.benchmark            all entries
    python -m real_world.benchmark service    one

Each module beside this one is an entry. What it compares is timed alternately, round after round,
and reported as medians: another process that wakes up then slows all alike. With `--write`, results
go to `docs/benchmark.json`, charts beside it, and headlines and tables into the README.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import lesson_code as lesson
from real_world import parser, run, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "benchmark.json"
README = ROOT / "real_world" / "README.md"

BLUE, RED, GREY = "#0969da", "#cf222e", "#6e7781"  # BLUE is this project's line in a chart
OTHERS = [f"tab:{name}" for name in ("orange", "green", "red", "purple", "brown", "pink", "cyan")]

# %% Measuring


def spread(times: Sequence[float]) -> dict[str, float]:
    """Return the median of `times`, and the lowest and the highest."""
    return {"median": statistics.median(times), "lowest": min(times), "highest": max(times)}


def alternate(ways: dict[str, Callable[[], float]], rounds: int, title: str) -> dict[str, Any]:
    """Let every way measure itself, in turn, `rounds` times; return the spread of each."""
    runs: dict[str, list[float]] = {name: [] for name in ways}
    turns = list(itertools.product(range(rounds), ways.items()))
    for _, (name, way) in tqdm(turns, title, leave=False, disable=None):
        runs[name].append(way())
    return {name: spread(times) for name, times in runs.items()}


@contextlib.contextmanager
def worker(command: Sequence[str | Path]) -> Iterator[Callable[[], float]]:
    """Start a process that prints "warm", and then for every line that comes in how long it took.

    Yields what asks it once, in seconds. The threads of one framework would be in the way of
    another's in one process.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    pipes["stderr"] = subprocess.DEVNULL  # TensorFlow's and XLA's remarks
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:

        def ask() -> float:
            process.stdin.write("\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        try:
            if process.stdout.readline() != "warm\n":
                raise OSError(f"{command[-1]} does not run")
            yield ask
        finally:
            process.stdin.close()  # which ends it


# %% Showing


def scaled(seconds: dict[str, float], among: float) -> str:
    """Return a median and its spread, in the unit that suits the size of `among`."""
    power, unit = next((p, u) for p, u in ((0, "s"), (3, "ms"), (6, "us")) if among * 10**p >= 1)
    parts = (seconds[key] * 10**power for key in ("lowest", "median", "highest"))
    low, middle, high = (f"{part:,.0f}" if part >= 1000 else f"{part:.3g}" for part in parts)
    return f"{middle} {unit} ({low} to {high})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table, its first columns aligned to the left and all others to the right."""
    marks = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, marks, *rows))


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Return, by what is done, how many times as long the last way takes as the first."""
    found = {}
    for what, ways in results.items():
        first, *_, last = (measured["median"] for measured in ways.values())
        found[what] = last / first
    return found


def named(results: dict[str, Any]) -> dict[str, tuple[dict[str, float], float]]:
    """Return every way, by what it does and its name, with the median of the first that does it."""
    return {
        name if len(results) == 1 else f"{what}: {name}": (measured, first)
        for what, ways in results.items()
        for first in (next(iter(ways.values()))["median"],)
        for name, measured in ways.items()
    }


def plain_table(results: dict[str, Any], unit: str = "") -> str:
    """Return a table of ways: their time, its ratio to that of the first, how many units a second.

    Without a unit, of what is timed, it has no column for the last.
    """
    what = next(iter(results)) if len(results) == 1 else ""
    header = (what, "takes", "against the first", *([f"{unit} a second"] if unit else []))
    rows = (
        (
            name,
            scaled(measured, first),
            f"{measured['median'] / first:.2f} x",
            f"{1 / measured['median']:,.0f}",
        )[: len(header)]
        for name, (measured, first) in named(results).items()
    )
    return markdown(header, rows)


@contextlib.contextmanager
def drawing(path: Path, width: float, height: float, columns: int = 1) -> Iterator[list[Axes]]:
    """Yield axes, beside each other, and save what is drawn in them as a PNG; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_prop_cycle(color=OTHERS)
    yield panels
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def plain_chart(results: dict[str, Any], path: Path) -> None:
    """Draw how long each way takes, against the first, as a PNG."""
    bars = {name: measured["median"] / first for name, (measured, first) in named(results).items()}
    names, values = list(bars), list(bars.values())
    with drawing(path, 8, 0.6 + 0.4 * len(bars)) as (axes,):
        drawn = axes.barh(names, values, color=[BLUE if value == 1 else GREY for value in values])
        axes.bar_label(drawn, [f"{value:.2f} x" for value in values], padding=4)
        what = next(iter(results)) if len(results) == 1 else ""
        axes.set(title=what, xlabel="times as long", xlim=(0, 1.2 * max(values)))
        axes.invert_yaxis()


# %% The entries


@dataclass(frozen=True)
class Entry:
    """What is measured, and how it is shown in the README and in a picture.

    claim: the article's words. measure: returns what goes into the JSON file; if it is told to be
    quick, after one round, which says little.
    """

    claim: str
    measure: Callable[[bool], dict[str, Any]]
    headline: Callable[[dict[str, Any]], str]
    table: Callable[[dict[str, Any]], str] = plain_table
    chart: Callable[[dict[str, Any], Path], None] = plain_chart


NAMES = ("floor", "step", "inference", "service", "scaling", "language", "pictures", "trainings")
NAMES += ("growth", "cuda")


@functools.cache
def entry(name: str) -> Entry:
    """Return an entry, whose module imports what it measures."""
    return importlib.import_module(f"real_world.benchmark.{name}").ENTRY


def picture(name: str) -> Path:
    """Return where the chart of an entry is."""
    return RESULTS.with_name(f"{name}.png")


def with_results(readme: str, results: dict[str, Any]) -> str:
    """Return `readme` with what each entry that was measured says of itself between its marks."""
    for name in results:
        measured = results[name]["results"]
        for mark, text in (
            (f"<!-- headline {name} -->", entry(name).headline(measured)),
            (f"<!-- table {name} -->", f"\n{entry(name).table(measured)}\n"),
        ):
            head, rest = readme.split(mark)
            readme = head + mark + text + rest[rest.index("<!-- end -->") :]
    return readme


PACKAGES = ("torch", "tensorflow-cpu", "keras", "jax", "scikit-learn", "numpy", "transformers")
PACKAGES += ("diffusers", "uvicorn", "fastapi", "executorch", "onnxruntime")


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    described = Path("/proc/cpuinfo")  # of Linux
    found = described.exists() and re.search(r"model name\s*: (.+)", described.read_text())
    cpu = {"processor": found[1] if found else platform.processor(), "cores": os.cpu_count()}
    return {**cpu, "system": platform.platform(), "python": platform.python_version(), **versions}


# %% Running it


def benchmark(names: list[str], quick: bool, write: bool) -> None:
    """Measure the entries and print their tables; `write` down results, tables and charts."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        lesson.heading(f"Benchmark: {name}", entry(name).claim)
        measured = entry(name).measure(quick)
        results[name] = {"machine": machine(), "results": measured}
        print(entry(name).table(measured))
        if write:
            entry(name).chart(measured, picture(name))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            README.write_text(with_results(README.read_text(), {name: results[name]}))
            written = ", ".join(str(shown(p)) for p in (RESULTS, README))
            print()
            lesson.show("written", f"{written} and {shown(picture(name))}")


def options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exit with status 2, after one sentence, where one is wrong."""
    made = parser("benchmark", "What the README quotes, measured side by side.")
    made.add_argument("names", metavar="ENTRY", nargs="*", help=f"of {', '.join(NAMES)}")
    made.add_argument("--quick", action="store_true", help="measure once, which says little")
    made.add_argument("--write", action="store_true", help="into docs/ and the README")
    chosen = made.parse_args(argv)
    if unknown := set(chosen.names) - set(NAMES):
        made.error(f"there is no entry {unknown.pop()!r}; there is {', '.join(NAMES)}")
    if chosen.quick and chosen.write:
        made.error(
            "argument --write: what is measured once is not for the README; leave out --quick"
        )
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Run the page; return its exit status."""
    chosen = options(argv)
    possible = [name for name in NAMES if name != "cuda" or torch.cuda.is_available()]
    names = chosen.names or possible
    return run("benchmark", lambda: benchmark(names, chosen.quick, chosen.write))
