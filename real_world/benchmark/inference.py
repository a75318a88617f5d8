"""The latency of a model in eager mode, and in each format that it can be deployed in."""

import contextlib
import functools
import logging
import os
import tempfile
import timeit
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import lesson_code as lesson
from real_world.benchmark import harness
from real_world.common import CheckFailed
from real_world.deploy.cpp import build_cpp
from real_world.deploy.formats import (
    FORMATS,
    ExportFormat,
    Forward,
    export_and_verify,
    export_graph,
)

QUOTE = "a PyTorch model loaded via torch.jit.script or torch.compile"

LAYER_SIZES = {"lesson": (4, 16, 3), "wide": (512, 1024, 100)}
BATCH_SIZES = (1, 64, 1024)
FROM_CPP = "AOTInductor, called from C++"


# %% ONNX Runtime, which is here only to be compared with
def export_onnx(model: lesson.SimpleClassifier, path: Path) -> None:
    """Save a graph for any batch size."""
    torch.onnx.export(export_graph(model), f=path, external_data=False, verbose=False)


def load_onnx(path: Path, model: lesson.SimpleClassifier) -> Forward:
    """Load the graph, to run with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(X: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {name: X.numpy()})[0])

    return run


ONNX = ExportFormat("ONNX Runtime", "everything", "lesson.onnx", export_onnx, load_onnx)
ALL_FORMATS = (*FORMATS, ONNX)


# %% Measure
@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Use one core and one thread: ExecuTorch would use one thread per core, PyTorch as many."""
    pinned = hasattr(os, "sched_setaffinity")  # on Linux
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if pinned else set()
    torch.set_num_threads(1)
    if pinned:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if pinned:
            os.sched_setaffinity(0, cores)


def time_forward(model: Forward, batch: torch.Tensor, calls: int) -> float:
    """Return the seconds per call."""
    with torch.inference_mode():
        return timeit.timeit(lambda: model(batch), number=calls) / calls


def load_formats(
    eager: lesson.SimpleClassifier, rows: torch.Tensor, folder: Path
) -> dict[str, Forward]:
    """Export a model to every format, compare the logits with eager mode, and load it."""
    models: dict[str, Forward] = {"eager": eager}
    with torch.inference_mode():
        for export_format in ALL_FORMATS:
            model = export_and_verify(export_format, eager, rows, folder)
            if model is None:
                raise CheckFailed(f"{export_format.name} cannot be built here")
            models[export_format.name] = model
    return models


def time_formats(
    models: dict[str, Forward], rows: torch.Tensor, cpp: Sequence[str | Path], quick: bool
) -> dict[str, harness.Stats]:
    """Return the seconds per call by format, for one batch size."""
    for model in models.values():
        time_forward(model, rows, 10)  # warm up: torch.compile may compile for this batch size
    seconds_per_round = 0.01 if quick else 0.05
    calls = max(1, round(seconds_per_round / time_forward(models["eager"], rows, 10)))
    candidates: dict[str, Callable[[], float]] = {
        name: functools.partial(time_forward, model, rows, calls) for name, model in models.items()
    }
    with harness.worker([*cpp, str(len(rows)), str(calls)]) as time_cpp:
        candidates[FROM_CPP] = time_cpp
        rounds = 1 if quick else 20
        return harness.interleave_stats(candidates, rounds, f"inference, {len(rows)} rows")


@one_core()
def measure(quick: bool) -> dict[str, Any]:
    """Measure every format; if quick, of the lesson's model only."""
    torch._inductor.config.compile_threads = 1  # starting a process pool would take longer
    logging.disable(logging.WARNING)  # of the libraries that ExecuTorch imports
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        program = build_cpp(Path(temporary), "latency")
        for name, sizes in LAYER_SIZES.items():
            if quick and name != "lesson":
                continue
            folder = Path(temporary, name)
            folder.mkdir()
            torch.manual_seed(0)
            eager = lesson.SimpleClassifier(*sizes).requires_grad_(False).eval()
            rows = torch.randn(max(BATCH_SIZES), sizes[0])
            models = load_formats(eager, rows, folder)
            cpp = [program, folder / "lesson.pt2"]
            results[name] = {
                str(size): time_formats(models, rows[:size], cpp, quick) for size in BATCH_SIZES
            }
    return results


# %% Show
RATIO_AT = {"lesson": "1", "wide": "1024"}


def table(results: dict[str, Any]) -> str:
    """Return a table per model: the time of a call by format and batch size."""
    tables = []
    for name, by_size in results.items():
        layers = "-".join(str(size) for size in LAYER_SIZES[name])
        columns = [f"{int(size):,} row{'s' * (size != '1')} (µs)" for size in by_size]
        at = RATIO_AT[name]
        ratio_of = columns[list(by_size).index(at)].removesuffix(" (µs)")
        header = [f"{name} model, {layers}", *columns, f"{ratio_of}, relative to eager"]
        rows = harness.time_rows(by_size, dict.fromkeys(by_size, "µs"), at, baseline="eager")
        tables.append(harness.markdown_table(header, rows))
    return "\n\n".join(tables)


def plot(results: dict[str, Any], path: Path) -> None:
    """Save a figure: the time of a call by batch size, for each model."""
    figure = Figure(figsize=(12, 4.5), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False).flat
    for axes, (name, by_size) in zip(panels, results.items(), strict=True):
        sizes = [int(size) for size in by_size]
        for export_format in by_size["1"]:
            medians = [1e6 * by_size[size][export_format]["median"] for size in by_size]
            width = 3 if export_format == "eager" else 1
            axes.plot(sizes, medians, "o-", label=export_format, lw=width)
        layers = "-".join(str(size) for size in LAYER_SIZES[name])
        axes.set(title=f"Latency of the {name} model, {layers}", xscale="log", yscale="log")
        axes.set(xlabel="rows per call", ylabel="µs")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(path)
