"""The article's claims about production, one runnable page each: `python -m real_world.PAGE`.

Every page imports `lesson_code` and uses its network, its `train()` and its checkpoint unchanged;
no page imports another but `digits`, for its data, and `distributed`, which divides `llama`. Here
is what all of them start with.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import secrets
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import torch
    from torch import nn
    from tqdm import tqdm

    import lesson_code as lesson
except KeyboardInterrupt:  # importing torch takes seconds
    sys.exit(130)


def heading(title: str, quote: str) -> None:
    """Print the heading of a step, and what the article says there."""
    print(f'\n{title}\n{"=" * len(title)}\n  "{quote}"\n')


def show(label: str, value: object) -> None:
    """Print what it is and its value, aligned."""
    print(f"  {label:<32} {value}")


def whole_number(text: str, least: int = 0, most: int = 2**32 - 1) -> int:
    """Convert an option's text; raise ArgumentTypeError, which says what would be right."""
    if text.isdecimal() and least <= int(text) <= most:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")


def device(name: str) -> torch.device:
    """Convert an option's text; raise ArgumentTypeError, which says what this machine has."""
    try:
        return lesson.select_device(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


COMMON = {
    "--device": {
        "type": device,
        "default": "auto",
        "help": "auto, cpu, cuda, cuda:N or mps (default: auto)",
    },
    "--output": {
        "metavar": "DIR",
        "type": Path,
        "default": lesson.OUTPUT,
        "help": "the folder to write in (default: checkpoints/)",
    },
    "--seed": {
        "metavar": "N",
        "type": whole_number,
        "default": 0,
        "help": "of all that is drawn at random (default: 0)",
    },
    "--no-figure": {"action": "store_true", "help": "do not draw the picture"},
}


def parser(page: str, description: str, *common: str) -> argparse.ArgumentParser:
    """Return a parser of options, these COMMON ones first, that refuses one in one sentence."""
    prog = f"python -m real_world.{page}"
    made = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    made.error = lambda message: made.exit(2, f"{page}: {message}\n")  # no usage lines
    for name in common:
        made.add_argument(name, **COMMON[name])
    return made


def number(text: str, least: float, most: float) -> float:
    """Convert an option's text; raise ArgumentTypeError, which says what would be right."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if least <= value <= most:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most:g}")


def only_with(
    made: argparse.ArgumentParser, chosen: argparse.Namespace, switch: str, **defaults: object
) -> None:
    """Give options their defaults; refuse those that were given without the one they belong to."""
    for name, default in defaults.items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, default)
        elif getattr(chosen, switch) is None:
            made.error(f"argument --{name.replace('_', '-')}: belongs to --{switch}")


def shown(path: Path) -> Path:
    """Return `path` as a transcript shows it: from here, where it is below."""
    path, here = path.resolve(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def writable(folder: Path) -> None:
    """Make `folder` where it is not there; raise OSError where nothing can be written in it."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def lesson_checkpoint(path: Path) -> lesson.SimpleClassifier:
    """Return the network at `path` on the CPU; where there is none, train and save it first.

    Raises CheckpointError where `path` holds something else, or weights that are no numbers.
    """
    if not path.exists():
        show("no checkpoint yet", f"training one for {shown(path)}")
        print("\n  The five-line loop, 100 epochs on cpu:")
        X, y = lesson.make_synthetic_data(seed=0)
        model, optimizer = lesson.build_model(0, torch.device("cpu"))
        losses = lesson.train(model, [(X, y)], nn.CrossEntropyLoss(), optimizer, 100)
        for epoch in range(10, 101, 10):
            print(f"    epoch {epoch:>4}    loss {losses[epoch - 1]:.4f}")
        path.parent.mkdir(parents=True, exist_ok=True)
        lesson.save_checkpoint(path, model, optimizer, losses)
        print()
    with quiet():  # of a file of another kind torch warns before it is refused
        model, _, _ = lesson.load_checkpoint(path)
    if not all(weights.isfinite().all() for weights in model.parameters()):
        raise lesson.CheckpointError(f"{path} holds weights that are not finite; train it again")
    return model.float()  # what distributed.py trains is float64


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write beside `path`, and give it that name when it is done."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what a new file has here; safetensors' has less
        write(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write `tensors` to a safetensors file, whole or not at all; raise OSError where it fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    content = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:  # Hugging Face asks for the metadata
        write_whole(path, lambda beside: save_file(content, beside, metadata={"format": "pt"}))
    except SafetensorError as error:
        raise OSError(f"{shown(path)} could not be written: {error}") from None


def one_cycle(
    optimizer: torch.optim.Optimizer, lr: float, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule of the step size: up to `lr` for a tenth of the steps, then down."""
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )


class Batches:
    """on_step of train(): after each step, the next batch takes the place of the last.

    The lesson's epoch is one step on all of its data. Here it is a step on some of them: `draw`
    returns X, a tensor or a tuple of them, and y, and each new batch is copied into the first one's
    memory. `after` are called too: a schedule's step(), an average's update. Shows the progress,
    and ten losses, of which `mean` makes what all of several processes have; without a title none.
    """

    def __init__(
        self,
        title: str,
        draw: Callable[[], tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor]],
        steps: int,
        *after: Callable[[], object],
        mean: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.X, self.y = draw()
        self.draw, self.steps, self.after, self.mean = draw, steps, after, mean
        off = True if sys.stdout is None or not title else None  # None: if there is no terminal
        self.title = title
        self.bar = tqdm(total=steps, desc=title, unit="step", leave=False, disable=off)

    def __call__(self, step: int, loss: torch.Tensor) -> None:
        """Take the next batch, unless this step was the last."""
        for each in self.after:
            each()
        self.bar.update()
        # Ten times only, for it waits for the device.
        if self.title and 10 * (step + 1) // self.steps > 10 * step // self.steps:
            shown_loss = (self.mean(loss) if self.mean else loss).item()
            with self.bar.external_write_mode():
                print(f"    step {step + 1:>5}    loss {shown_loss:.4f}")
        if step + 1 == self.steps:
            self.bar.close()
            return
        X, y = self.draw()
        pairs = zip(self.X, X, strict=True) if isinstance(X, tuple) else ((self.X, X),)
        for old, new in (*pairs, (self.y, y)):
            old.copy_(new)


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Keep back what libraries say on standard error, in C++ too; yield the list of warnings."""
    sys.stderr.flush()
    kept = os.dup(2)
    said: list[str] = []
    with tempfile.TemporaryFile() as log, warnings.catch_warnings(record=True) as caught:
        os.dup2(log.fileno(), 2)  # C++ knows nothing of sys.stderr
        warnings.simplefilter("always")
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            said += dict.fromkeys(str(warning.message) for warning in caught)


def run(page: str, body: Callable[[], None]) -> int:
    """Run a page; return its exit status, and where it fails say why in one sentence."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        body()
    except BrokenPipeError:  # whoever reads the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"{page}: interrupted", file=sys.stderr)
        return 130
    except (lesson.CheckFailed, lesson.CheckpointError, OSError) as error:
        named = isinstance(error, OSError) and error.filename
        message = f"{error.filename}: {error.strerror}" if named else error
        print(f"{page}: {message}", file=sys.stderr)
        return 1
    return 0
