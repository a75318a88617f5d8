"""Answering: the network as it is, and every form in which it leaves PyTorch's eager mode."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lesson_code as lesson
from real_world import deploy
from real_world.benchmark import BLUE, Entry, alternate, drawing, markdown, scaled, worker

SIZES = {"the lesson's": (4, 16, 3), "wide": (512, 1024, 100)}  # features, hidden, classes
BATCHES = (1, 64, 1024)


def build_onnx(model: nn.Module, path: Path) -> None:
    """Export the graph to ONNX."""
    batch = torch.export.Dim("batch", min=1)
    example = (torch.zeros(2, model.fc1.in_features),)
    how = {"dynamic_shapes": ({0: batch},), "external_data": False, "verbose": False}
    torch.onnx.export(model, example, path, **how)


def load_onnx(path: Path, model: nn.Module) -> deploy.Network:
    """Load the file into ONNX Runtime, with one thread as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    return lambda X: torch.from_numpy(session.run(None, {name: X.numpy()})[0])


ONNX = deploy.Form("ONNX Runtime", "everything", "lesson.onnx", build_onnx, load_onnx)
IN_CPP = "AOTInductor, from C++"


def seconds_a_call(network: deploy.Network, batch: torch.Tensor, calls: int) -> float:
    """Return how long a call takes, over so many of them."""
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(calls):
            network(batch)
    return (time.perf_counter() - start) / calls


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep this process, and those that it starts, to one core and one thread of PyTorch's.

    ExecuTorch would take a thread a core. Where the system cannot hold it to one, it has them.
    """
    threads, pinned = torch.get_num_threads(), hasattr(os, "sched_setaffinity")
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


@one_core()
def measure(quick: bool) -> dict[str, Any]:
    """Time a call of every form, by network and batch, after holding it against the network."""
    rounds, long = (1, 0.01) if quick else (20, 0.05)
    torch._inductor.config.compile_threads = 1  # to start its processes would take longer
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as built:
        program = deploy.build_cpp(lesson.OUTPUT, "latency")
        for size, sizes in SIZES.items():
            torch.manual_seed(0)
            model = lesson.SimpleClassifier(*sizes).requires_grad_(False).eval()
            rows = torch.randn(deploy.LARGEST_BATCH, sizes[0])
            networks: dict[str, deploy.Network] = {"eager": model}
            folder = Path(built, size)
            folder.mkdir()
            with torch.inference_mode():
                for form in (*deploy.FORMS, ONNX):
                    network = deploy.make(form, model, rows, folder)
                    if network is None:
                        raise OSError(f"{form.name} is part of this entry, and cannot be built")
                    networks[form.name] = network
            results[size] = {}
            for many in BATCHES:
                for network in networks.values():  # one may have to compile again
                    seconds_a_call(network, rows[:many], 10)
                calls = max(1, round(long / seconds_a_call(model, rows[:many], 10)))
                ways = {
                    name: functools.partial(seconds_a_call, network, rows[:many], calls)
                    for name, network in networks.items()
                }
                with contextlib.ExitStack() as stack:
                    command = (program, folder / "lesson.pt2", str(many), str(calls))
                    ways[IN_CPP] = stack.enter_context(worker(IN_CPP, command))
                    for name, times in alternate(ways, rounds, f"inference, {size}").items():
                        results[size].setdefault(name, {})[str(many)] = times
    return results


def headline(results: dict[str, Any]) -> str:
    """Return what the README's table of claims says."""
    small = {name: by["1"]["median"] for name, by in results["the lesson's"].items()}
    large = {name: by["1024"]["median"] for name, by in results["wide"].items()}
    times = {name: f"{small[name] / small['eager']:.2g}" for name in small}
    script, compiled, edge = (
        times[name] for name in ("TorchScript", "torch.compile", "ExecuTorch")
    )
    one = (
        f"one row takes {script} times eager's time in TorchScript, {compiled} in `torch.compile`,"
        f" {edge} in ExecuTorch, {times[IN_CPP]} in AOTInductor called from C++"
    )
    apart = {name: seconds / large["eager"] for name, seconds in large.items() if name != "eager"}
    best, worst = min(apart, key=apart.get), max(apart, key=apart.get)
    most = f"{apart[best]:.2f} ({best}) to {apart[worst]:.2f} times ({worst})"
    return f"{one}; with much to multiply they come to {most}"


def table(results: dict[str, Any]) -> str:
    """Return the README's table: by form, what a call takes and its ratio to eager's."""
    rows = []
    for size, forms in results.items():
        eager = forms["eager"]
        for name, by in forms.items():
            cells = (
                f"{scaled(measured, eager[many]['median'])}, "
                f"{measured['median'] / eager[many]['median']:.2f} x"
                for many, measured in by.items()
            )
            rows.append((f"{size}: {name}", *cells))
    header = ("a call", *(f"{many:,} row{'s' * (many > 1)}" for many in BATCHES))
    return markdown(header, rows)


def chart(results: dict[str, Any], path: Path) -> None:
    """Draw the time of a call by the rows in it, for both networks, as a PNG."""
    from matplotlib.ticker import LogLocator

    with drawing(path, 12, 4.5, columns=2) as panels:
        for axes, (size, forms) in zip(panels, results.items(), strict=True):
            for name, by in forms.items():
                look = {"lw": 2.5, "color": BLUE, "zorder": 3} if name == "eager" else {"lw": 1}
                micro = [measured["median"] * 1e6 for measured in by.values()]
                axes.plot(BATCHES, micro, "o-", label=name, **look)
            features, hidden, classes = SIZES[size]
            title = f"{size[0].upper()}{size[1:]} network: {features}, {hidden:,}, {classes}"
            axes.set(title=title, xlabel="rows in a call", xscale="log", yscale="log")
            axes.set_xticks(BATCHES, [f"{many:,}" for many in BATCHES])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.minorticks_off()
        panels[0].set_ylabel("microseconds a call")
        panels[1].legend(frameon=False)


ENTRY = Entry(
    "a PyTorch model loaded via torch.jit.script or torch.compile",
    measure,
    headline,
    table,
    chart,
)
