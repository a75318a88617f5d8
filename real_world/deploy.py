"""The lesson's checkpoint in the forms in which networks leave Python.

    python -m real_world.deploy          build four forms, hold each against the network, time them
    python -m real_world.deploy --cpp    and build the C++ program that answers from one of them

The article's "Component Architecture" names TorchScript and torch.compile; beside them stand what
TorchScript gave way to. A form is built, written to a file, read back from it and compared. What
this machine cannot build is said in one line, and the rest goes on.

The files hold code: load none that you did not build.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.utils import fresh_cache
from tqdm import tqdm  # progress, which keeps quiet where nobody watches

import lesson_code as lesson
from real_world import heading, lesson_checkpoint, parser, quiet, run, show, shown

Network = Callable[[torch.Tensor], torch.Tensor]
"""Features, (batch, in_features) float32, to logits, (batch, classes) float32."""

LARGEST_BATCH = 1024
TOLERANCE = 1e-5


# %% The forms
# Each has two functions: one writes a file from the network, the other makes a network of the file.


def build_torchscript(model: nn.Module, path: Path) -> None:
    """Compile the Python source of forward() to TorchScript, and save it with the weights."""
    torch.jit.script(model).save(path)


def load_torchscript(path: Path, model: nn.Module) -> Network:
    """Load the network alone: the class that it was written from is not needed."""
    return torch.jit.load(path)


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """Give the compiler a cache of its own: what an earlier run left would make it look fast."""
    with tempfile.TemporaryDirectory() as folder, fresh_cache(dir=folder):
        torch.compiler.reset()
        yield


def compiled(model: nn.Module) -> Network:
    """Return `model` under torch.compile, which has compiled it for one row and for any number."""
    network = torch.compile(model, dynamic=True, fullgraph=True)
    for rows in (1, 2):  # a size of 1 is its own case to the compiler
        network(torch.zeros(rows, model.fc1.in_features))
    return network


def build_compiled(model: nn.Module, path: Path) -> None:
    """Compile in this process, and save the compiler's cache: machine code without the weights."""
    with empty_cache():
        compiled(model)
        artifacts, _ = torch.compiler.save_cache_artifacts()
    path.write_bytes(artifacts)


def load_compiled(path: Path, model: nn.Module) -> Network:
    """Compile as a new process would that was given the cache."""
    with empty_cache():
        torch.compiler.load_cache_artifacts(path.read_bytes())
        return compiled(model)


def exported(model: nn.Module, most: int | None = None) -> torch.export.ExportedProgram:
    """Return the graph of `model` for a batch of 1 to `most` rows, or of any number."""
    batch = torch.export.Dim("batch", min=1, max=most)
    example = (torch.zeros(2, model.fc1.in_features),)
    return torch.export.export(model, example, dynamic_shapes=({0: batch},))


def build_aotinductor(model: nn.Module, path: Path) -> None:
    """Compile the exported graph to a shared library, packed with its weights.

    Its metadata says how wide a row is, which `cpp/predict.cpp` reads.
    """
    metadata = {"in_features": str(model.fc1.in_features)}
    with empty_cache():
        torch._inductor.aoti_compile_and_package(
            exported(model),
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": metadata},
        )


def load_aotinductor(path: Path, model: nn.Module) -> Network:
    """Load the shared library; `cpp/predict.cpp` does the same without Python."""
    return torch._inductor.aoti_load_package(str(path))


def build_executorch(model: nn.Module, path: Path) -> None:
    """Lower the exported graph to XNNPACK's kernels, its memory planned for LARGEST_BATCH rows."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = exported(model, LARGEST_BATCH)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


def load_executorch(path: Path, model: nn.Module) -> Network:
    """Load the program into the runtime that phones carry."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda X: method.execute([X])[0]


@dataclass(frozen=True)
class Form:
    """A form of the network: its name, where it runs, its file, and what writes and reads that."""

    name: str
    runs: str
    file: str
    build: Callable[[nn.Module, Path], None]
    load: Callable[[Path, nn.Module], Network]


FORMS = (
    Form("TorchScript", "C++, older phones", "lesson.ts", build_torchscript, load_torchscript),
    Form("torch.compile", "Python", "lesson.compiled", build_compiled, load_compiled),
    Form("AOTInductor", "C++, Python", "lesson.pt2", build_aotinductor, load_aotinductor),
    Form("ExecuTorch", "phones, devices", "lesson.pte", build_executorch, load_executorch),
)


# %% Building and comparing


def difference(network: Network, model: nn.Module, rows: torch.Tensor) -> float:
    """Return the largest difference of a logit, over `rows` in batches of 1 to LARGEST_BATCH.

    In units of the largest logit, where that is more than 1: float32 has seven digits, not more.
    """
    largest = torch.zeros(())
    for size in (1, 3, 10, 64, 333, 1000, LARGEST_BATCH):
        for batch in rows.split(size):
            largest = torch.maximum(largest, (network(batch) - model(batch)).abs().max())
    return (largest / model(rows).abs().max().clamp(min=1)).item()


def make(form: Form, model: nn.Module, rows: torch.Tensor, output: Path) -> Network | None:
    """Build `form` in `output`, load it back and compare; return None where it cannot be built."""
    path = output / form.file
    try:
        with quiet() as said, tempfile.TemporaryDirectory(dir=output) as folder:
            start = time.perf_counter()
            form.build(model, Path(folder, path.name))
            built = time.perf_counter() - start
            os.replace(Path(folder, path.name), path)  # whole, or not at all
            network = form.load(path, model)
    except (ImportError, BackendCompilerFailed) as error:
        reason = str(getattr(error, "inner_exception", error)).splitlines()[0]
        show(form.name, f"cannot be built here: {reason}")
        return None
    size = f"{path.stat().st_size:,} bytes"
    show(form.name, f"{form.file}, {size}, built in {built:.2f} s; for {form.runs}")
    for warning in said:
        if form.name == "TorchScript" and "torch.jit.script`" in warning:
            print(f'    it works, and warns: "{warning}"')
    largest = difference(network, model, rows)
    claim = f"{form.name}, read back"
    lesson.check(claim, f"largest difference {largest:.1e}", largest <= TOLERANCE)
    return network


def latencies(
    networks: dict[str, Network], rows: torch.Tensor, sizes: tuple[int, ...], rounds: int = 300
) -> dict[tuple[str, int], float]:
    """Return the median time of a call in seconds, by network and batch size.

    A round times every network at every size, so that what the machine does besides hits all alike.
    """
    calls = 10
    times: dict[tuple[str, int], list[float]] = {}
    for _ in tqdm(range(rounds), "timing", leave=False, disable=None):
        for size in sizes:
            batch = rows[:size]
            for name, network in networks.items():
                start = time.perf_counter()
                for _ in range(calls):
                    network(batch)
                times.setdefault((name, size), []).append((time.perf_counter() - start) / calls)
    return {key: statistics.median(measured) for key, measured in times.items()}


def print_latencies(networks: dict[str, Network], rows: torch.Tensor) -> None:
    """Print the table of latencies, and of their ratios to the first of `networks`."""
    sizes = (1, 64, LARGEST_BATCH)
    measured = latencies(networks, rows, sizes)
    eager = next(iter(networks))
    print("\n  Microseconds a call, and the ratio to eager, by rows in the batch (PyTorch has one")
    print("  thread, ExecuTorch its own):")
    print(f"    {'':<18}" + "".join(f"{size:>11,}{'':8}" for size in sizes).rstrip())
    for name in networks:
        times = ((measured[name, size], measured[eager, size]) for size in sizes)
        cells = (f"{time * 1e6:>11.1f}  {time / base:>4.2f} x" for time, base in times)
        print(f"    {name:<18}" + "".join(cells))


# %% C++


def build_cpp(output: Path, name: str = "predict") -> Path:
    """Build a program of `cpp/` against the libtorch of the installed wheel; return its path.

    Raises OSError, which says why and where to read more, where it cannot be built.
    """
    folder = output / "cpp"
    folder.mkdir(exist_ok=True)
    log = folder / "build.log"
    scripts = sysconfig.get_path("scripts")  # where pip put cmake and ninja
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"}
    source = Path(__file__).parent / "cpp"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    commands = (
        ["cmake", "--fresh", "-G", "Ninja", "-S", source, "-B", folder, prefix],
        ["cmake", "--build", folder, "--target", name],
    )
    with log.open("w") as file:
        for command in commands:
            done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            if done.returncode:
                raise OSError(f"the C++ program could not be built; {log} says why")
    return folder / name


def as_csv(rows: torch.Tensor) -> str:
    """Return `rows` as CSV, every value in the digits that read back as itself."""
    return "".join(",".join(map(repr, row)) + "\n" for row in rows.tolist())


def ask_cpp(program: Path, package: Path, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the C++ program answers to the CSV `text`.

    The classes, (rows,) int64, and the probabilities, (rows, classes) float32.
    """
    command = [program, package]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    answers = [[float(value) for value in row] for row in csv.reader(io.StringIO(done.stdout))]
    return torch.tensor(answers)[:, 1].long(), torch.tensor(answers)[:, 2:]


def answer_in_python(model: nn.Module, lines: TextIO, output: TextIO) -> None:
    """Do in Python, with the eager network, what the C++ program does: CSV in, CSV out."""
    numbers = itertools.count(1)
    reader = csv.reader(lines)
    while batch := list(itertools.islice(reader, 2000)):  # as many as the C++ program reads at once
        features = torch.tensor([[float(value) for value in row] for row in batch])
        classes, probabilities = lesson.predict(model, features)
        for label, shares in zip(classes.tolist(), probabilities.tolist(), strict=True):
            output.write(f"{next(numbers)},{label},{','.join(map(repr, shares))}\n")


def check_cpp(program: Path, package: Path, model: nn.Module) -> None:
    """Hold the C++ program's answers against `predict`, and its speed against Python's."""
    rows = torch.randn(1000, model.fc1.in_features, generator=torch.Generator().manual_seed(2))
    classes, probabilities = lesson.predict(model, rows)
    cpp_classes, cpp_probabilities = ask_cpp(program, package, as_csv(rows))
    largest = (cpp_probabilities - probabilities).abs().max().item()
    same = torch.equal(cpp_classes, classes) and largest <= 1e-6
    measured = f"same classes, largest difference {largest:.1e}"
    lesson.check("  1,000 rows, against predict", measured, same)

    text = as_csv(rows) * 300
    times: dict[str, list[float]] = {"C++": [], "Python": []}
    for _ in tqdm(range(5), "timing C++ and Python", leave=False, disable=None):
        with open(os.devnull, "w") as nowhere:
            start = time.perf_counter()
            subprocess.run([program, package], input=text, stdout=nowhere, text=True, check=True)
            times["C++"].append(time.perf_counter() - start)
            start = time.perf_counter()
            answer_in_python(model, io.StringIO(text), nowhere)
            times["Python"].append(time.perf_counter() - start)
    cpp, python = (text.count("\n") / statistics.median(seconds) for seconds in times.values())
    show("  rows a second, CSV to CSV", f"{cpp:,.0f}, with the start of the program")
    show("  the same loop in Python, eager", f"{python:,.0f}: C++ is {cpp / python:.1f} x as fast")


# %% Running it


def options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exit with status 2, after one sentence, where one is wrong."""
    made = parser("deploy", "The lesson's checkpoint in four forms that leave Python.", "--output")
    made.add_argument("--cpp", action="store_true", help="also build and check the C++ program")
    return made.parse_args(argv)


def deploy(output: Path, cpp: bool) -> None:
    """Build, check and time every form of the checkpoint `lesson.pt` in `output`.

    Raises CheckFailed where a form answers something else, OSError where C++ cannot be built.
    """
    quote = "TorchScript mode compiles models into a portable intermediate representation"
    heading("Deploy: one checkpoint, four forms", quote)
    output.mkdir(parents=True, exist_ok=True)
    model = lesson_checkpoint(output / "lesson.pt").requires_grad_(False).eval()
    torch.set_num_threads(1)  # a few rows are done before a second thread has woken up
    torch._inductor.config.compile_threads = 1  # to start its processes would take longer
    for form in FORMS:  # those of an earlier network would answer something else
        (output / form.file).unlink(missing_ok=True)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(LARGEST_BATCH, model.fc1.in_features, generator=generator)
    networks: dict[str, Network] = {"eager": model}
    with torch.inference_mode():
        with tqdm(FORMS, leave=False, disable=None) as bar:
            for form in bar:
                bar.set_description(f"building {form.name}")
                with bar.external_write_mode():
                    network = make(form, model, rows, output)
                if network is not None:
                    networks[form.name] = network
        print_latencies(networks, rows)
    if not cpp:
        return
    package = output / "lesson.pt2"
    if "AOTInductor" not in networks:
        raise OSError(f"the C++ program answers from {package}, which could not be built")
    print()
    program = build_cpp(output)
    show("C++", f"{shown(program)}, which reads lesson.pt2")
    check_cpp(program, package, model)


def main(argv: list[str] | None = None) -> int:
    """Run the page; return its exit status."""
    chosen = options(argv)
    return run("deploy", lambda: deploy(**vars(chosen)))


if __name__ == "__main__":
    sys.exit(main())
