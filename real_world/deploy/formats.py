"""Four formats of a trained model: each is exported, loaded back and compared with the eager model.

The files contain executable code: load only files that you trust.
"""

import contextlib
import itertools
import os
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.utils import fresh_cache

import lesson_code as lesson
from real_world.common import check, show

Forward = Callable[[torch.Tensor], torch.Tensor]
"""From features, (batch, in_features) float32, to logits, (batch, num_classes) float32."""

MAX_BATCH = 1024
TOLERANCE = 1e-5


class CannotExport(Exception):
    """A format is not available on this machine."""


# %% TorchScript, which is deprecated
def export_torchscript(model: lesson.SimpleClassifier, path: Path) -> None:
    """Compile the source of forward() to TorchScript, and save it with the weights."""
    path.write_bytes(torch.jit.script(model).save_to_buffer())  # save() aborts on a full disk


def load_torchscript(path: Path, model: lesson.SimpleClassifier) -> Forward:
    """Load a model, for which its class is not needed."""
    return torch.jit.load(path)


# %% torch.compile: its cache saves other processes the compilation
@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """Compile with an empty cache: the cache of earlier runs would hide the time that it takes.

    Raises CannotExport if a path has a space: PyTorch does not quote the folders of libraries and
    of its cache in the compiler's command.
    """
    for path in (sys.prefix, sys.base_prefix, tempfile.gettempdir()):
        if " " in path:
            raise CannotExport(
                f"the compiler needs paths without spaces, rename a folder of {path}"
            )
    with fresh_cache():
        torch.compiler.reset()
        yield


def compile_model(model: lesson.SimpleClassifier) -> Forward:
    """Compile a model for any batch size."""
    # dynamic: one compilation for all batch sizes; fullgraph: an error instead of a part in Python.
    compiled = torch.compile(model, dynamic=True, fullgraph=True)
    for batch_size in (1, 2):  # torch.compile specializes on a size of 1
        compiled(torch.zeros(batch_size, model.fc1.in_features))
    return compiled


def export_compiled(model: lesson.SimpleClassifier, path: Path) -> None:
    """Save the compiler's cache: machine code, without the weights."""
    with empty_cache():
        compile_model(model)
        saved = torch.compiler.save_cache_artifacts()
    assert saved is not None  # the cache is not empty
    path.write_bytes(saved[0])


def load_compiled(path: Path, model: lesson.SimpleClassifier) -> Forward:
    """Compile with a warm cache, as a new process does."""
    with empty_cache():
        torch.compiler.load_cache_artifacts(path.read_bytes())
        return compile_model(model)


# %% AOTInductor: torch.export for C++ services
def export_graph(
    model: lesson.SimpleClassifier, max_batch: int | None = None
) -> torch.export.ExportedProgram:
    """Export the graph of a model for batches of 1 to `max_batch` samples, or of any size."""
    example = torch.zeros(2, model.fc1.in_features)
    # Without it, the graph would take batches of the example's size only.
    batch = torch.export.Dim("batch", min=1, max=max_batch)
    return torch.export.export(model, (example,), dynamic_shapes=({0: batch},))


def target_processor() -> dict[str, object]:
    """Return the compiler's options for x86-64 processors with AVX2, since about 2013.

    By default, it compiles for the processor that it runs on. `cpp.march` is new in torch 2.13.
    """
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return {"cpp.march": "x86-64-v3", "cpp.simdlen": 256}
    return {}


def export_aotinductor(model: lesson.SimpleClassifier, path: Path) -> None:
    """Compile the exported graph to a shared library, in a package with the weights."""
    graph = export_graph(model)
    metadata = {"in_features": str(model.fc1.in_features)}
    options = {**target_processor(), "aot_inductor.metadata": metadata}
    with empty_cache():
        torch._inductor.aoti_compile_and_package(
            graph, package_path=str(path), inductor_configs=options
        )


def load_aotinductor(path: Path, model: lesson.SimpleClassifier) -> Forward:
    """Load the shared library of a package, as cpp/predict.cpp does without Python.

    Raises BadZipFile if the package is damaged: its code could crash Python.
    """
    with zipfile.ZipFile(path) as archive:  # PyTorch does not verify the checksums
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{path}: the record {damaged} is damaged")
    with torch._inductor.config.patch(target_processor()):  # no warning of another processor
        return torch._inductor.aoti_load_package(str(path))


# %% ExecuTorch: torch.export for phones and other devices
def export_executorch(model: lesson.SimpleClassifier, path: Path) -> None:
    """Lower the exported graph to XNNPACK's kernels, and plan its memory."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    graph = export_graph(model, MAX_BATCH)
    lowered = to_edge_transform_and_lower(graph, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


def load_executorch(path: Path, model: lesson.SimpleClassifier) -> Forward:
    """Load a program into ExecuTorch's runtime."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda X: method.execute([X])[0]


# %% All formats
class ExportFormat(NamedTuple):
    """A file format: where it runs, and the functions that write and load its file."""

    name: str
    runs_on: str
    filename: str
    export: Callable[[lesson.SimpleClassifier, Path], None]
    load: Callable[[Path, lesson.SimpleClassifier], Forward]


FORMATS = (
    ExportFormat(
        "TorchScript", "C++, older phones", "lesson.ts", export_torchscript, load_torchscript
    ),
    ExportFormat("torch.compile", "Python", "lesson.compiled", export_compiled, load_compiled),
    ExportFormat("AOTInductor", "C++, Python", "lesson.pt2", export_aotinductor, load_aotinductor),
    ExportFormat("ExecuTorch", "phones, devices", "lesson.pte", export_executorch, load_executorch),
)


def first_error(output: str) -> str:
    """Return the first error in the output of a compiler or of CMake."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    compiler = [line for line in lines if "error: " in line]
    cmake = [f"{a} {b}" for a, b in itertools.pairwise(lines) if a.startswith("CMake Error")]
    return [*compiler, *cmake, *lines, "it printed nothing"][0]


def max_abs_error(forward: Forward, model: Forward, X: torch.Tensor) -> float:
    """Return the largest error of a logit, over X in batches of 1 to MAX_BATCH samples.

    The error is divided by the largest logit if that is above 1: float32 has seven digits.
    """
    error = torch.zeros(())
    for batch_size in (1, 3, 10, 64, 333, 1000, MAX_BATCH):
        for batch in X.split(batch_size):
            error = torch.maximum(error, (forward(batch) - model(batch)).abs().max())
    return (error / model(X).abs().max().clamp(min=1)).item()


def export_and_verify(
    fmt: ExportFormat, model: lesson.SimpleClassifier, X: torch.Tensor, output: Path
) -> Forward | None:
    """Export a model to a file in `output`, load it back and compare it with the eager model.

    Returns:
        The loaded model, or None if the format is not available on this machine.

    Raises:
        CheckFailed: The loaded model's logits are not those of the eager model.
    """
    path = output / fmt.filename
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(record=True, action="always") as caught,
    ):
        temporary = Path(folder, fmt.filename)
        start = time.perf_counter()
        try:
            fmt.export(model, temporary)
        except (ImportError, BackendCompilerFailed, CannotExport) as error:
            path.unlink(missing_ok=True)  # the file of an earlier model
            cause = getattr(error, "inner_exception", error)
            reason = first_error(getattr(cause, "output", str(cause)))  # a compiler's output
            show(fmt.name, f"not available: {reason}")
            return None
        seconds = time.perf_counter() - start
        forward = fmt.load(temporary, model)
        size = temporary.stat().st_size
        show(fmt.name, f"{fmt.filename}, {size:,} bytes, {seconds:.2f} s; for {fmt.runs_on}")
        for message in {str(warning.message) for warning in caught}:
            if "`torch.jit.script` is deprecated" in message:
                print(f"    {message}")
        max_error = max_abs_error(forward, model, X)
        check("  loaded, against eager", f"max error {max_error:.1e}", max_error <= TOLERANCE)
        os.replace(temporary, path)  # atomic, and only if the check passed
    return forward
