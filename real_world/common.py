"""What several examples share: options, output, progress, losses.jsonl, and how they end."""

import argparse
import contextlib
import dataclasses
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

import lesson_code as lesson

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
OnStep = Callable[[int, torch.Tensor], None]  # called by train() with a step and its loss
OUTPUT = Path(lesson.__file__).parent / "checkpoints"


class CheckFailed(Exception):
    """A check of an example did not pass."""


def check(label: str, value: object, passed: bool | torch.Tensor) -> None:
    """Print a label, a value and `ok`; raise CheckFailed if the check did not pass."""
    print(f"  {label:<32} {value!s:<42} {'ok' if passed else 'FAILED'}")
    if not passed:
        raise CheckFailed(f"check failed: {label} (got {value})")


def print_heading(title: str, quote: str) -> None:
    """Print a title and the article's words that the example is about."""
    print(f'\n{title}\n{"=" * len(title)}\n  "{quote}"\n')


def show(label: str, value: object) -> None:
    """Print a label and a value, aligned with check()."""
    print(f"  {label:<32} {value}")


def bounded_int(minimum: int, maximum: int = 2**32 - 1) -> Callable[[str], int]:
    """Return an argparse type: an integer from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        if text.isdecimal() and minimum <= int(text) <= maximum:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {minimum} to {maximum}")

    return parse


def nonnegative_float(text: str) -> float:
    """Argparse type: a finite number, at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if 0 <= value < math.inf:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")


def device(name: str) -> torch.device:
    """Argparse type: a device of this computer, by name."""
    try:
        return lesson.select_device(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def option(default: float | str | None, help: str, minimum: int = 1) -> Any:  # noqa: ANN401
    """Return a field of a config: its default, what it is, and the minimum of an int."""
    return dataclasses.field(default=default, metadata={"help": help, "minimum": minimum})


def make_parser(
    example: str, description: str, *configs: "DataclassInstance"
) -> argparse.ArgumentParser:
    """Return a parser with the options that examples share.

    Each field of `configs`, which are dataclasses with fields from `option()`, becomes an option
    whose default is None: see `with_options()`. Fields are int, float or str.
    """
    parser = argparse.ArgumentParser(f"python -m real_world.{example}", description=description)
    add = parser.add_argument
    add(
        "--device", type=device, default="auto", help="auto, cpu, cuda, cuda:N, mps (default: auto)"
    )
    if not configs:
        add("--seed", metavar="N", type=bounded_int(0), default=0, help="random seed (default: 0)")
    else:
        fields = {field.name: field for config in configs for field in dataclasses.fields(config)}
        for name, field in fields.items():
            kind: Callable[[str], object]
            if field.type is float:
                kind, metavar = nonnegative_float, "X"
            elif field.type is str:
                kind, metavar = str, "TEXT"
            else:
                kind, metavar = bounded_int(field.metadata["minimum"]), "N"
            values = [getattr(config, name) for config in configs if hasattr(config, name)]
            defaults = " or ".join(dict.fromkeys(str(value) for value in values))
            text = f"{field.metadata['help']} (default: {defaults})"
            add(f"--{name}".replace("_", "-"), metavar=metavar, type=kind, help=text)
    add("--output", metavar="DIR", type=Path, default=OUTPUT, help="default: checkpoints/")
    add("--no-figure", action="store_true", help="do not plot a figure")
    return parser


def with_options(config: Config, args: argparse.Namespace) -> Config:
    """Return a config with the fields that have been given on the command line."""
    values = {name: getattr(args, name) for name in dataclasses.asdict(config)}
    given = {name: value for name, value in values.items() if value is not None}
    return dataclasses.replace(config, **given)


def run_cli(main: Callable[[], None]) -> None:
    """Run an example's main(), then exit; a user's mistake gets one line, a bug its traceback."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (None if it is closed, by `>&-`)
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discard what is still buffered
        sys.exit(130)
    except (CheckFailed, lesson.CheckpointError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:  # a bug, not a wrong path
            raise
        sys.exit(f"error: {error}")


def show_config(config: Config) -> None:
    """Print the fields of a config."""
    for name, value in dataclasses.asdict(config).items():
        show(name, value)


def save_config(folder: Path, config: Config) -> None:
    """Save a config as train_config.json, in a folder that is created."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(config), indent=2)
    atomic_write(folder / "train_config.json", f"{text}\n".encode())


def load_config(folder: Path, default: Config) -> Config:
    """Return the config that was saved in a folder, or the default. Raises CheckpointError."""
    path = folder / "train_config.json"
    if not path.exists():
        return default
    try:
        return dataclasses.replace(default, **json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise lesson.CheckpointError(f"{path} is not a config: {error}") from None


def check_config(folder: Path, config: Config, *may_differ: str) -> None:
    """Compare a config with the one that was saved in a folder, if there is one.

    Raises CheckpointError if a field that is not in `may_differ` has another value.
    """
    saved = dataclasses.asdict(load_config(folder, config))
    for name, value in dataclasses.asdict(config).items():
        if name not in may_differ and saved[name] != value:
            message = f"{folder} was trained with {name} {saved[name]}, not {value}"
            raise lesson.CheckpointError(f"{message}; delete it, or choose another --output")


@contextlib.contextmanager
def log_losses(path: Path, optimizer: torch.optim.Optimizer) -> Iterator[OnStep]:
    """Yield an on_step for train() that writes a file of losses while a model is trained.

    A line has the step, from 1, its loss and learning rate, and the seconds since the start. Call
    this on_step before that of a schedule, which changes the learning rate.
    """
    start = time.perf_counter()
    steps: list[tuple[torch.Tensor, float, float]] = []  # loss, learning rate, seconds
    num_written = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:

        def write() -> None:
            nonlocal num_written
            if not steps:
                return
            losses = torch.stack([loss for loss, _, _ in steps]).tolist()  # waits for the GPU
            for loss, (_, learning_rate, seconds) in zip(losses, steps, strict=True):
                num_written += 1
                line = {"step": num_written, "loss": loss, "learning_rate": learning_rate}
                file.write(json.dumps({**line, "seconds": round(seconds, 6)}) + "\n")
            file.flush()
            steps.clear()

        def on_step(step: int, loss: torch.Tensor) -> None:
            seconds = time.perf_counter() - start
            steps.append((loss, optimizer.param_groups[0]["lr"], seconds))
            if len(steps) == 10:
                write()

        try:
            yield on_step
        finally:
            write()


def read_losses(path: Path) -> list[float]:
    """Return the loss of every step in a file that `log_losses()` wrote."""
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def train_progress(title: str, steps: int) -> OnStep:
    """Return an on_step for train(): a progress bar, and the loss ten times."""
    bar = tqdm(total=steps, desc=title, unit="step", leave=False, disable=None)

    def on_step(step: int, loss: torch.Tensor) -> None:
        bar.update()
        if 10 * (step + 1) // steps > 10 * step // steps:  # .item() waits for the GPU
            bar.write(f"    step {step + 1:>5}    loss {loss.item():.4f}")
        if step + 1 == steps:
            bar.close()

    return on_step


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file. A crash while writing leaves the old file as it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_lesson_model(path: Path) -> lesson.SimpleClassifier:
    """Return the model of a lesson's checkpoint; if there is none yet, train and save one.

    Raises CheckpointError if the file is damaged or its weights are not finite.
    """
    if not path.exists():
        show("no checkpoint yet", f"training a model for {path}")
        torch.manual_seed(0)  # as in section 5 of the lesson, with its rule
        model = lesson.SimpleClassifier()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        X, _ = lesson.make_synthetic_data()
        batches = [(X, X[:, :3].argmax(dim=1))]
        losses = lesson.train(model, batches, nn.CrossEntropyLoss(), optimizer)
        path.parent.mkdir(parents=True, exist_ok=True)
        lesson.save_checkpoint(path, model, optimizer, losses)
    model, _, _ = lesson.load_checkpoint(path)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise lesson.CheckpointError(f"the weights in {path} are not finite; train the model again")
    return model
