"""The C++ program cpp/predict.cpp: build it, compare its answers and its speed with Python's."""

import csv
import io
import itertools
import os
import statistics
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from tqdm import tqdm

import lesson_code as lesson
from real_world.common import CheckFailed, check, show
from real_world.deploy.formats import first_error

SOURCE = Path(__file__).parent / "cpp"
REPEATS = 300  # of 1,000 samples, which are timed


def run_build(command: list[str]) -> None:
    """Run a command of a build. Raises CheckFailed, with the first error, if it fails."""
    scripts = sysconfig.get_path("scripts")  # where pip installed cmake and ninja
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise CheckFailed(f"cannot build the C++ program: {first_error(done.stdout)}")


def build_cpp(output: Path, target: str = "predict") -> Path:
    """Build a program of cpp/ with the libtorch of the installed wheel; return its path.

    Raises CheckFailed if it cannot be built.
    """
    folder = output / "cpp"
    folder.mkdir(exist_ok=True)
    torch_dir = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as build:
        configure = ["cmake", "-G", "Ninja", f"-S{SOURCE}", f"-B{build}", f"-DTORCH={torch_dir}"]
        run_build(configure)
        run_build(["cmake", "--build", build, "--target", target])
        os.replace(Path(build, target), folder / target)  # atomic: the old one may be running
    return folder / target


def to_csv(X: torch.Tensor) -> str:
    """Format X as CSV, with all digits of every value."""
    return "".join(",".join(map(repr, row)) + "\n" for row in X.tolist())


def predict_in_python(model: torch.nn.Module, lines: TextIO, output: TextIO) -> None:
    """Do what the C++ program does, from CSV to CSV, with the eager model."""
    reader = csv.reader(lines)
    number = 0
    while rows := list(itertools.islice(reader, 2000)):  # about the batches of the C++ program
        X = torch.tensor([[float(value) for value in row] for row in rows])
        classes, probabilities = lesson.predict(model, X)
        for label, row in zip(classes.tolist(), probabilities.numpy(), strict=True):
            number += 1
            output.write(f"{number},{label},{','.join(map(str, row))}\n")


def check_cpp(program: Path, package: Path, model: lesson.SimpleClassifier) -> None:
    """Compare the answers of the C++ program with those of predict()."""
    X = torch.randn(1000, model.fc1.in_features, generator=torch.Generator().manual_seed(2))
    classes, probabilities = lesson.predict(model, X)
    command = [program, package]
    done = subprocess.run(command, input=to_csv(X), stdout=subprocess.PIPE, text=True, check=True)
    answers = torch.from_numpy(np.loadtxt(io.StringIO(done.stdout), delimiter=","))
    max_error = (answers[:, 2:] - probabilities).abs().max().item()
    same = answers[:, 1].equal(classes.double()) and max_error <= 1e-6
    check("  1,000 samples", f"predict()'s classes, max error {max_error:.1e}", same)


def measure_cpp(program: Path, package: Path, model: lesson.SimpleClassifier) -> None:
    """Time the C++ program and the same loop in Python, alternately; print the medians."""
    text = REPEATS * to_csv(torch.randn(1000, model.fc1.in_features))
    cpp_times, python_times = [], []
    with open(os.devnull, "w") as devnull:
        for _ in tqdm(range(5), "timing C++ and Python", leave=False, disable=None):
            start = time.perf_counter()
            subprocess.run([program, package], input=text, stdout=devnull, text=True, check=True)
            cpp_times.append(time.perf_counter() - start)
            start = time.perf_counter()
            predict_in_python(model, io.StringIO(text), devnull)
            python_times.append(time.perf_counter() - start)
    cpp_time = statistics.median(cpp_times)
    python_time = statistics.median(python_times)
    samples = text.count("\n")
    show("  samples per second, C++", f"{samples / cpp_time:,.0f}, CSV to CSV, with start-up")
    show("  the same in Python, eager", f"{samples / python_time:,.0f}")
    show("  C++ compared with Python", f"{python_time / cpp_time:.1f} x as fast")
