"""The speeds that `real_world/README.md` compares outside its transcripts, measured side by side.

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
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from real_world import heading, parser, run, show, shown, writable, write_whole

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
def worker(name: str, command: Sequence[str | Path]) -> Iterator[Callable[[], float]]:
    """Start a process that prints "warm", and then for every line that comes in how long it took.

    Yields what asks it once, in seconds. The threads of one framework would be in the way of
    another's in one process. Raises OSError, with the last thing that it said, where it ends.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as remarks:  # TensorFlow and XLA make many
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": remarks}
        with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:

            def answer() -> str:
                if line := process.stdout.readline():
                    return line
                process.wait()
                remarks.seek(0)
                last = (remarks.read().strip().splitlines() or ["nothing"])[-1]
                raise OSError(f"{name} ended with status {process.returncode}; it said: {last}")

            def ask() -> float:
                with contextlib.suppress(BrokenPipeError):  # answer() says why
                    process.stdin.write("\n")
                    process.stdin.flush()
                return float(answer())

            try:
                answer()
                yield ask
            finally:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()  # which ends it


# %% Showing


def scaled(seconds: dict[str, float], among: float) -> str:
    """Return a median and its spread, in the unit that suits the size of `among`."""
    units = ((0, "s"), (3, "ms"), (6, "us"), (9, "ns"))
    power, unit = next((p, u) for p, u in units if among * 10**p >= 1)
    parts = (seconds[key] * 10**power for key in ("lowest", "median", "highest"))
    low, middle, high = (f"{part:,.0f}" if part >= 1000 else f"{part:.3g}" for part in parts)
    return f"{middle} {unit} ({low} to {high})"


def times(measured: dict[str, float], first: dict[str, float]) -> str:
    """Return how many times as long as `first` it takes, and whether other rounds may say no."""
    ratio = f"{measured['median'] / first['median']:.2f} times"
    apart = measured["lowest"] > first["highest"] or first["lowest"] > measured["highest"]
    return ratio if apart else f"{ratio} (within the spread)"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table, its first columns aligned to the left and all others to the right."""
    marks = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, marks, *rows))


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
    """Return `readme` with what each entry that was measured says of itself between its marks.

    Raises OSError where the marks are not there, once each.
    """
    for name in results:
        measured = results[name]["results"]
        for mark, text in (
            (f"<!-- headline {name} -->", entry(name).headline(measured)),
            (f"<!-- table {name} -->", f"\n{entry(name).table(measured)}\n"),
        ):
            head, *rest = readme.split(mark)
            if len(rest) != 1 or "<!-- end -->" not in rest[0]:
                raise OSError(f"README.md should hold {mark}, and later <!-- end -->, once")
            readme = head + mark + text + rest[0][rest[0].index("<!-- end -->") :]
    return readme


PACKAGES = ("torch", "tensorflow-cpu", "tensorflow", "keras", "jax", "scikit-learn", "numpy")
PACKAGES += ("transformers", "diffusers", "uvicorn", "fastapi", "executorch", "onnxruntime")


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    described = Path("/proc/cpuinfo")  # of Linux
    found = described.exists() and re.search(r"model name\s*: (.+)", described.read_text())
    cpu = {"processor": found[1] if found else platform.processor(), "cores": os.cpu_count()}
    cpu |= {"torch threads": torch.get_num_threads(), "load before": round(os.getloadavg()[0], 2)}
    return {**cpu, "system": platform.platform(), "python": platform.python_version(), **versions}


# %% Running it


def kept_results() -> dict[str, Any]:
    """Return what earlier runs wrote; raise OSError where it is torn."""
    try:
        return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    except ValueError as error:
        raise OSError(f"{shown(RESULTS)} is torn ({error}); delete it") from None


def measured_by(name: str, quick: bool) -> dict[str, Any]:
    """Return what an entry measures; raise OSError where something that it needs is not there."""
    try:
        return entry(name).measure(quick)
    except ModuleNotFoundError as error:
        raise OSError(f"{name} needs {error.name}; ./setup.sh --all installs it") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode() if isinstance(error.stderr, bytes) else error.stderr or ""
        last = (said.strip().splitlines() or ["nothing"])[-1]
        raise OSError(f"{name}: a process failed; it said: {last}") from None


def benchmark(names: list[str], quick: bool, write: bool) -> None:
    """Measure the entries and print their tables; `write` down results, tables and charts."""
    if write:  # what would be lost otherwise, after minutes
        results = kept_results()
        writable(RESULTS.parent)
        with_results(README.read_text(), results)
    for name in names:
        heading(f"Benchmark: {name}", entry(name).claim)
        here = machine()
        measured = measured_by(name, quick)
        print(entry(name).table(measured))
        if write:
            results[name] = {"machine": here, "results": measured}
            written = json.dumps(results, indent=1) + "\n"
            readme = with_results(README.read_text(), {name: results[name]})
            entry(name).chart(measured, picture(name))
            write_whole(RESULTS, lambda path, text=written: path.write_text(text))
            write_whole(README, lambda path, text=readme: path.write_text(text))
            print()
            places = ", ".join(str(shown(place)) for place in (RESULTS, README))
            show("written", f"{places} and {shown(picture(name))}")


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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends the workers too
    return run("benchmark", lambda: benchmark(names, chosen.quick, chosen.write))
