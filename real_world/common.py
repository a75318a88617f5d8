"""What several examples share: options, output, files, and how they end."""

import argparse
import dataclasses
import errno
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import lesson_code as lesson

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

OUTPUT = Path(lesson.__file__).parent / "checkpoints"


class CheckFailed(Exception):
    """A check of an example did not pass."""


def check(label: str, value: object, passed: bool | torch.Tensor, as_tested: bool = True) -> None:
    """Print a label, a value and `ok`; raise CheckFailed if the check did not pass.

    If it does not pass, but the training had other options than the tested ones (not `as_tested`),
    print label and value only.
    """
    if not passed and not as_tested:
        show(label, value)
        return
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


def make_parser(
    example: str, description: str, *configs: "DataclassInstance"
) -> argparse.ArgumentParser:
    """Return a parser with the options that examples share.

    `configs` are dataclasses whose fields, int or float, are from `training.option()`. Each becomes
    an option, None if it is not given: see `training.with_options()`.
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
            kind: Callable[[str], float]
            if field.type is float:
                kind, metavar = nonnegative_float, "X"
            else:
                kind, metavar = bounded_int(field.metadata["minimum"]), "N"
            values = [getattr(config, name) for config in configs if hasattr(config, name)]
            defaults = " or ".join(dict.fromkeys(str(value) for value in values))
            text = f"{field.metadata['help']} (default: {defaults.replace('None', 'off')})"
            add(f"--{name}".replace("_", "-"), metavar=metavar, type=kind, help=text)
    add("--output", metavar="DIR", type=Path, default=OUTPUT, help="default: checkpoints/")
    add("--no-figure", action="store_true", help="do not plot a figure")
    return parser


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
        # Without a path, it is a bug, or a disk or quota that is full.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"error: {error}")


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file. A crash while writing leaves the old file as it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises CheckpointError if it is damaged, OSError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # with or without a BOM
    except ValueError as error:  # also if it is not UTF-8
        raise lesson.CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise lesson.CheckpointError(f"{path} is not a JSON object")
    return content


def load_lesson_model(path: Path) -> lesson.SimpleClassifier:
    """Return the model of a lesson's checkpoint, in float32; if there is none, train and save one.

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
    model = lesson.load_checkpoint(path)[0].float()
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise lesson.CheckpointError(f"the weights in {path} are not finite; train the model again")
    return model
