"""What several examples share: options, output, progress, and how they end."""

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import lesson_code as lesson

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


def device(name: str) -> torch.device:
    """Argparse type: a device of this computer, by name."""
    try:
        return lesson.select_device(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_parser(example: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that examples share."""
    parser = argparse.ArgumentParser(f"python -m real_world.{example}", description=description)
    add = parser.add_argument
    add(
        "--device", type=device, default="auto", help="auto, cpu, cuda, cuda:N, mps (default: auto)"
    )
    add("--seed", metavar="N", type=bounded_int(0), default=0, help="random seed (default: 0)")
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
        if error.filename is None and error.errno != errno.ENOSPC:  # a bug, not a wrong path
            raise
        sys.exit(f"error: {error}")


def train_progress(title: str, steps: int) -> Callable[[int, torch.Tensor], None]:
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
