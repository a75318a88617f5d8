"""Training with the lesson's train()."""

import torch
from torch import nn
from torch.utils.data import DataLoader

import lesson_code as lesson
from real_world.common import train_progress
from real_world.llama.data import RandomWindows
from real_world.llama.model import Llama

STEPS = 1000
BATCH_SIZE = 8
CONTEXT_LENGTH = 128
LEARNING_RATE = 0.003


def next_token_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of logits, (batch, length, vocab_size), in nats per token."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def make_optimizer(
    model: nn.Module, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW, and a schedule: warm-up for a tenth of the steps, then a cosine decay."""
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    return optimizer, lr_scheduler


def train_llama(model: Llama, text: torch.Tensor, steps: int, seed: int) -> list[float]:
    """Train a model in place on random windows of a text; return the loss of every step."""
    text = text.to(model.lm_head.weight.device)
    loader = DataLoader(
        RandomWindows(text, BATCH_SIZE, CONTEXT_LENGTH, steps, seed), batch_size=None
    )
    optimizer, lr_scheduler = make_optimizer(model, steps)
    show_progress = train_progress("llama", steps)

    def on_step(step: int, loss: torch.Tensor) -> None:
        lr_scheduler.step()
        show_progress(step, loss)

    return lesson.train(model, loader, next_token_loss, optimizer, epochs=1, on_step=on_step)


@torch.no_grad()
def evaluate(model: Llama, text: torch.Tensor) -> float:
    """Return the mean loss on a whole text, in nats per token, in windows of CONTEXT_LENGTH."""
    model.eval()
    text = text.to(model.lm_head.weight.device).long()
    size = (len(text) - 1) // CONTEXT_LENGTH * CONTEXT_LENGTH
    X = text[:size].view(-1, CONTEXT_LENGTH)  # (windows, context_length)
    y = text[1 : size + 1].view(-1, CONTEXT_LENGTH)
    total = torch.zeros((), device=X.device)
    for micro_X, micro_y in zip(X.split(BATCH_SIZE), y.split(BATCH_SIZE), strict=True):
        total += len(micro_X) * next_token_loss(model(micro_X), micro_y)
    return (total / len(X)).item()
