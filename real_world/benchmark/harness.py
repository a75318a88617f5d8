"""How the benchmarks measure, how they format numbers, and where they write results."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from real_world.common import atomic_write

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "real_world"

README_OF = {  # entry: the example whose README shows its table
    "step": "benchmark",
    "inference": "deploy",
    "serve": "serve",
    "scaling": "distributed",
    "llama": "llama",
    "cuda": "benchmark",
    "llama_cuda": "llama",
}
PACKAGES = ["torch", "tensorflow-cpu", "tensorflow", "keras", "jax", "scikit-learn", "numpy"]
PACKAGES += ["executorch", "onnxruntime", "granian", "uvicorn", "fastapi", "transformers"]

T = TypeVar("T")
Stats = dict[str, float]  # median, min and max


# %% Measure
def interleave(
    candidates: Mapping[str, Callable[[], T]], rounds: int, title: str, pause: float = 0
) -> dict[str, list[T]]:
    """Call every candidate once per round, each after a pause; return what each returned.

    In this order, another process that runs for a while slows down all candidates, not just one.
    """
    values: dict[str, list[T]] = {name: [] for name in candidates}
    for _ in tqdm(range(rounds), title, leave=False, disable=None):
        for name, measure in candidates.items():
            time.sleep(pause)
            values[name].append(measure())
    return values


def summarize(values: Sequence[float]) -> Stats:
    """Return the median, the minimum and the maximum, with four significant digits."""
    stats = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in stats.items()}


def interleave_stats(
    candidates: Mapping[str, Callable[[], float]], rounds: int, title: str, pause: float = 0
) -> dict[str, Stats]:
    """Call every candidate as interleave() does; return the summary of what each returned."""
    values = interleave(candidates, rounds, title, pause)
    return {name: summarize(returned) for name, returned in values.items()}


def time_call(function: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@contextlib.contextmanager
def worker(command: Sequence[str | Path]) -> Iterator[Callable[[], float]]:
    """Start a process that measures on request; yield the function that requests a measurement.

    The process prints a line when it has warmed up. Then, for every line on its standard input, it
    prints a number. The frameworks run in processes of their own, because in one process their
    thread pools would compete for the cores.
    """
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,  # TensorFlow logs while it starts
        subprocess.Popen(
            command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=errors, bufsize=0
        ) as process,
    ):
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def read_line() -> bytes:
            line = stdout.readline()
            if not line:
                status = process.wait()
                errors.seek(0)
                raise RuntimeError(f"{command} ended with status {status}:\n{errors.read()}")
            return line

        def measure() -> float:
            with contextlib.suppress(BrokenPipeError):  # read_line() reports the status
                stdin.write(b"\n")
            return float(read_line())

        try:
            read_line()
            yield measure
        finally:
            process.kill()


def describe_machine() -> dict[str, Any]:
    """Return what results depend on: the processor, the system and the versions."""
    cpuinfo = Path("/proc/cpuinfo")  # on Linux
    found = cpuinfo.exists() and re.search(r"model name\s*: (.+)", cpuinfo.read_text())
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "processor": found[1] if found else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions,
    }


# %% Format
def format_number(value: float) -> str:
    """Format a positive number with three significant digits, or all digits before the point."""
    decimals = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{decimals}f}"


def format_time(seconds: float, unit: str) -> str:
    """Format a time in s, ms or µs, without the unit, which belongs into the column's header."""
    return format_number(seconds * {"s": 1, "ms": 1e3, "µs": 1e6}[unit])


def format_ratio(value: float, baseline: float) -> str:
    """Format for example `1.77 x`."""
    return f"{value / baseline:.2f} x"


def time_rows(
    results: dict[str, dict[str, Stats]], units: dict[str, str], at: str, baseline: str
) -> list[list[str]]:
    """Return a row per candidate: its median time by column, and its ratio in the column `at`."""
    rows = []
    for candidate in results[at]:
        medians = {column: results[column][candidate]["median"] for column in results}
        cells = [format_time(median, units[column]) for column, median in medians.items()]
        ratio = format_ratio(medians[at], results[at][baseline]["median"])
        rows.append([candidate, *cells, ratio])
    return rows


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is aligned left, and the others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


# %% Write
def load_results() -> dict[str, Any]:
    """Return what docs/benchmark.json contains, by entry: the machine and the results."""
    return json.loads((DOCS / "benchmark.json").read_text())


def save_results(entry: str, machine: dict[str, Any], quick: bool, results: dict[str, Any]) -> None:
    """Replace an entry of docs/benchmark.json."""
    content = load_results()
    content[entry] = {"machine": machine, "quick": quick, "results": results}
    atomic_write(DOCS / "benchmark.json", f"{json.dumps(content, indent=1)}\n".encode())


def readme_path(entry: str) -> Path:
    """Return the README that shows an entry's table."""
    return EXAMPLES / README_OF[entry] / "README.md"


def replace_table(text: str, entry: str, table: str) -> str:
    """Return a README's text with a table between the entry's two marks.

    Raises ValueError if `<!-- table ENTRY -->` ... `<!-- end -->` are not there exactly once.
    """
    pattern = rf"(<!-- table {entry} -->\n).*?(<!-- end -->)"
    text, count = re.subn(
        pattern, lambda found: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"expected one <!-- table {entry} --> ... <!-- end -->, found {count}")
    return text
