"""What examples that train share: the config, its options, losses.jsonl, and the progress."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

import lesson_code as lesson
from real_world.common import CheckFailed, atomic_write, read_json, show

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
OnStep = Callable[[int, torch.Tensor], None]  # called by train() with a step and its loss


def option(default: float | None, help: str, minimum: int = 1) -> Any:  # noqa: ANN401
    """Return a field of a config: its default, what it is, and the minimum of an int."""
    return dataclasses.field(default=default, metadata={"help": help, "minimum": minimum})


def with_options(config: Config, args: argparse.Namespace) -> Config:
    """Return a config with the fields that have been given on the command line."""
    values = {name: getattr(args, name) for name in dataclasses.asdict(config)}
    given = {name: value for name, value in values.items() if value is not None}
    return dataclasses.replace(config, **given)


def as_tested(config: Config, default: Config) -> bool:
    """Return whether a config is the default, but for its seed: then, an example's checks hold."""
    return dataclasses.replace(config, seed=default.seed) == default  # type: ignore[attr-defined,call-arg]


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
        return dataclasses.replace(default, **read_json(path))
    except TypeError as error:
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
def log_losses(
    path: Path, optimizer: torch.optim.Optimizer, first_step: int = 0, every: int = 10
) -> Iterator[OnStep]:
    """Yield an on_step for train() that writes a file of losses, `every` so many steps.

    A line has the step, from 1, its loss and learning rate, and the seconds since this run started.
    Call this on_step before that of a schedule, which changes the learning rate. A resumed training
    has a `first_step`; the lines of the steps before it are kept. With torch.distributed, all ranks
    call this, and rank 0 writes the mean of their losses.
    """
    start = time.perf_counter()
    steps: list[tuple[torch.Tensor, float, float]] = []  # loss, learning rate, seconds
    num_written = first_step
    distributed = dist.is_initialized()
    if distributed and dist.get_rank() > 0:
        path = Path(os.devnull)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_text().splitlines(keepends=True)[:first_step] if path.exists() else []
        atomic_write(path, "".join(kept).encode())
    with path.open("a") as file:

        def write() -> None:
            nonlocal num_written
            if not steps:
                return
            losses = torch.stack([loss for loss, _, _ in steps])
            if distributed:
                dist.all_reduce(losses)
                losses /= dist.get_world_size()
            for loss, (_, learning_rate, seconds) in zip(losses.tolist(), steps, strict=True):
                num_written += 1
                line = {"step": num_written, "loss": loss, "learning_rate": learning_rate}
                file.write(json.dumps({**line, "seconds": round(seconds, 6)}) + "\n")
            file.flush()
            steps.clear()

        def on_step(step: int, loss: torch.Tensor) -> None:
            seconds = time.perf_counter() - start
            steps.append((loss, optimizer.param_groups[0]["lr"], seconds))
            if len(steps) == every:
                write()  # waits for the GPU

        try:
            yield on_step
        except BaseException:
            if distributed:
                steps.clear()  # other ranks may be at another step: do not wait for their losses
            raise
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


@contextlib.contextmanager
def one_cycle(
    title: str, optimizer: torch.optim.Optimizer, steps: int, log_path: Path
) -> Iterator[OnStep]:
    """Yield an on_step for train(): the progress, a file of losses, and a learning rate schedule.

    The learning rate rises to that of the optimizer for a tenth of the steps, at least two, because
    Adam's averages of the gradients are rough at first. Then it decays to nearly 0 (cosine). At the
    end, raises CheckFailed if the last loss is not finite.
    """
    lr_scheduler = OneCycleLR(
        optimizer,
        optimizer.param_groups[0]["lr"],
        steps,
        pct_start=max(0.1, 2 / steps),
        cycle_momentum=False,  # it would change Adam's betas
    )
    show_progress = train_progress(title, steps)
    with log_losses(log_path, optimizer) as log:

        def on_step(step: int, loss: torch.Tensor) -> None:
            log(step, loss)
            show_progress(step, loss)
            lr_scheduler.step()

        yield on_step
    if not math.isfinite(read_losses(log_path)[-1]):
        raise CheckFailed(f"{title}: the training diverged; choose a lower learning rate")
