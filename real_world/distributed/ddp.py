"""Data parallel training: each process has the whole model and a shard of the batch.

DistributedDataParallel averages the gradients of all processes while loss.backward() computes them,
so every process makes the same update (S. Li et al., "PyTorch Distributed", 2020). `# NEW` marks
what differs from training with one process.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lesson_code as lesson
from real_world.digits.model import build_model
from real_world.distributed.process_group import (
    mean_over_ranks,
    run_on_rank_0,
    scale_loss_by_shard,
    shard_slice,
)
from real_world.training import log_losses, option


@dataclass(frozen=True)
class TrainConfig:
    """What can be changed about the training. Every field is an option of the command line."""

    learning_rate: float = option(0.01, "of Adam")
    epochs: int = option(200, "over the digits, with DDP; each is one step, on all samples")
    save_every: int = option(20, "epochs between two checkpoints, with DDP")
    seed: int = option(0, "of the weights and the data", minimum=0)


def build(
    config: TrainConfig, device: torch.device
) -> tuple[lesson.SimpleClassifier, torch.optim.Adam]:
    """Return the digits' model and an optimizer for it, in float64.

    In float32, the order in which gradients are summed shows in the last digits, and Adam amplifies
    the difference in every step.
    """
    model = build_model(config.seed, device).double()
    return model, torch.optim.Adam(model.parameters(), config.learning_rate)


def build_or_load(
    path: Path, config: TrainConfig, device: torch.device
) -> tuple[lesson.SimpleClassifier, torch.optim.Adam, list[float]]:
    """Return model, optimizer and losses: those of an interrupted run's checkpoint, or new ones."""
    if path.exists():
        model, optimizer, losses = lesson.load_checkpoint(path, device)
        if len(losses) < config.epochs:
            return model, optimizer, losses
    model, optimizer = build(config, device)
    return model, optimizer, []


def train_ddp(
    model: lesson.SimpleClassifier,
    optimizer: torch.optim.Adam,
    losses: list[float],
    X: torch.Tensor,
    y: torch.Tensor,
    config: TrainConfig,
    path: Path,
) -> None:
    """Train on all processes, in place; save checkpoints, and losses.jsonl beside them.

    Args:
        model: the model; all processes have the same weights.
        optimizer: its optimizer.
        losses: the losses of earlier epochs; those of all later epochs are appended.
        X: the samples of all processes.
        y: their labels.
        config: its epochs include those of earlier runs; the last epoch is always saved.
        path: the file of the checkpoint.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()  # NEW
    shard = shard_slice(len(y), rank, world_size)  # NEW
    X_shard, y_shard = X[shard], y[shard]  # NEW
    mean_loss = nn.CrossEntropyLoss()
    criterion = scale_loss_by_shard(mean_loss, len(y_shard), len(y), world_size)  # NEW
    ddp_model = DistributedDataParallel(model)  # NEW: it trains the weights of `model`
    batches = [(X_shard, y_shard)]
    # Losses are written at every save, too, so that the file has all those of the checkpoint.
    every = math.gcd(10, config.save_every, config.epochs - len(losses))
    log_path = path.with_name("losses.jsonl")
    with log_losses(log_path, optimizer, len(losses), every) as log:
        while len(losses) < config.epochs:
            until_save = min(config.save_every, config.epochs - len(losses))
            shard_losses = lesson.train(ddp_model, batches, criterion, optimizer, until_save, log)
            losses += mean_over_ranks(shard_losses, X.device)  # NEW
            run_on_rank_0(lesson.save_checkpoint, path, model, optimizer, losses)  # NEW


def train_on_one_process(
    X: torch.Tensor, y: torch.Tensor, config: TrainConfig
) -> tuple[lesson.SimpleClassifier, list[float]]:
    """Train without torch.distributed, for comparison."""
    model, optimizer = build(config, X.device)
    return model, lesson.train(model, [(X, y)], nn.CrossEntropyLoss(), optimizer, config.epochs)
