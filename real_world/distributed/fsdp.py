"""Fully sharded training: each process has a shard of the model and a shard of the batch.

fully_shard() (FSDP2) divides every parameter by rows. A layer's parameters are gathered from all
processes before its forward and its backward pass, and freed afterwards. Each process receives the
averaged gradients of its own rows only, so gradients and optimizer state are sharded, too (Y. Zhao
et al., "PyTorch FSDP", 2023). `# NEW` marks what differs from training with one process.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lesson_code as lesson
from real_world.distributed.process_group import (
    mean_over_ranks,
    run_on_rank_0,
    scale_loss_by_shard,
    shard_slice,
)
from real_world.llama.config import LLAMA_TINY
from real_world.llama.data import RandomWindows, load_corpus, train_val_split
from real_world.llama.model import Llama
from real_world.llama.train import TrainConfig as LlamaTrainConfig
from real_world.llama.train import next_token_loss
from real_world.training import log_losses, option

BATCH_SIZE = LlamaTrainConfig.batch_size


@dataclass(frozen=True)
class TrainConfig:
    """What can be changed about the training. Every field is an option of the command line."""

    learning_rate: float = option(0.001, "of Adam, or of AdamW with --fsdp")
    steps: int = option(10, "training steps of the Llama, with --fsdp")
    seed: int = option(0, "of the weights and the data", minimum=0)


def build_llama(seed: int, device: torch.device) -> Llama:
    """Return an untrained Llama, in float64 so that its losses can be compared."""
    torch.manual_seed(seed)
    return Llama(LLAMA_TINY).double().to(device)


def make_optimizer(model: Llama, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW with a constant learning rate, so that a finished run can be continued."""
    return torch.optim.AdamW(model.parameters(), config.learning_rate)


def load_batches(config: TrainConfig, device: torch.device) -> RandomWindows:
    """Return the batches (X, y) of all steps."""
    text, _ = train_val_split(load_corpus())
    return RandomWindows(
        text.to(device), BATCH_SIZE, LlamaTrainConfig.context_length, config.steps, config.seed
    )


def shard_llama(model: Llama, device: torch.device) -> None:
    """Shard the parameters of a model, in place: a decoder layer at a time, then the rest."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)  # NEW: its parameters are gathered and freed together
    fully_shard(model, mesh=mesh)  # NEW


def shard_sizes(model: Llama) -> list[int]:
    """Return how many bytes of the parameters each process has."""
    own = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[attr-defined]
    sizes = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, own)
    return sizes


def train_fsdp(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    first_step: int,
    folder: Path,
) -> list[float]:
    """Train a sharded model in place, from `first_step` to the last; return the losses.

    They are also written to losses.jsonl in `folder`, while it trains.
    """
    device = model.model.embed_tokens.weight.device
    rank, world_size = dist.get_rank(), dist.get_world_size()  # NEW
    shard = shard_slice(BATCH_SIZE, rank, world_size)  # NEW
    shard_size = shard.stop - shard.start  # NEW
    criterion = scale_loss_by_shard(next_token_loss, shard_size, BATCH_SIZE, world_size)  # NEW
    batches = itertools.islice(load_batches(config, device), first_step, None)
    shards = ((X[shard], y[shard]) for X, y in batches)  # NEW
    with log_losses(folder / "losses.jsonl", optimizer, first_step) as log:
        losses = lesson.train(model, shards, criterion, optimizer, epochs=1, on_step=log)
    return mean_over_ranks(losses, device)  # NEW


def train_on_one_process(config: TrainConfig, device: torch.device) -> tuple[Llama, list[float]]:
    """Train the same model on the same batches without torch.distributed, for comparison."""
    model = build_llama(config.seed, device)
    optimizer = make_optimizer(model, config)
    batches = load_batches(config, device)
    return model, lesson.train(model, batches, next_token_loss, optimizer, epochs=1)


def latest_step(folder: Path, before: int) -> int:
    """Return the step of the latest checkpoint before a step, or 0 if there is none."""
    saved = [0]
    for metadata in folder.glob("step-*/.metadata"):  # written last: the checkpoint is complete
        step = metadata.parent.name.removeprefix("step-")
        if step.isdecimal():  # not the copy "step-2-backup"
            saved.append(int(step))
    return max(step for step in saved if step < before)


@contextlib.contextmanager
def one_line_errors(action: str, path: Path) -> Iterator[None]:
    """Raise CheckpointError, with the first cause, if a rank fails to read or write its shards."""
    try:
        yield
    except dcp.api.CheckpointException as error:  # has the tracebacks of all ranks
        cause, _ = next(iter(error.failures.values()))
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        raise lesson.CheckpointError(f"cannot {action} {path} ({reason})") from None


def save_sharded(path: Path, model: Llama, optimizer: torch.optim.Optimizer) -> None:
    """Save a checkpoint: every process writes its shards to a file of its own."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    unlink = functools.partial((path / ".metadata").unlink, missing_ok=True)
    run_on_rank_0(unlink)  # incomplete until all is written
    with one_line_errors("save", path):
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)


def load_sharded(path: Path, model: Llama, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint in place. Another number of processes may have saved it (resharding)."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    # Each process reads the parts of the files that its own shards consist of.
    with one_line_errors("load", path):
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
