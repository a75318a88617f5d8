"""Training with the lesson's train()."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

import lesson_code as lesson
from real_world.llama.data import RandomWindows
from real_world.llama.model import Llama
from real_world.training import one_cycle, option


@dataclass(frozen=True)
class TrainConfig:
    """What can be changed about the training. Every field is an option of the command line."""

    learning_rate: float = option(0.003, "of AdamW, after the warm-up")
    batch_size: int = option(8, "windows per step")
    context_length: int = option(128, "tokens per window")
    steps: int = option(1000, "training steps", minimum=20)
    seed: int = option(0, "of the weights, the windows and the sampling", minimum=0)


def next_token_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of logits, (batch, length, vocab_size), in nats per token."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def train_llama(model: Llama, text: torch.Tensor, config: TrainConfig, folder: Path) -> list[float]:
    """Train a model in place on random windows of a text; return the loss of every step.

    The losses are also written to losses.jsonl in `folder`, while it trains.
    """
    text = text.to(model.model.embed_tokens.weight.device)
    windows = RandomWindows(
        text, config.batch_size, config.context_length, config.steps, config.seed
    )
    loader = DataLoader(windows, batch_size=None)  # the dataset yields whole mini-batches
    # With LoRA, most parameters are frozen: they have no gradient, so they are not updated.
    # GPT-3's betas and weight decay (T. Brown et al., "Language Models are Few-Shot Learners",
    # 2020, appendix B).
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    with one_cycle("llama", optimizer, config.steps, folder / "losses.jsonl") as on_step:
        return lesson.train(model, loader, next_token_loss, optimizer, epochs=1, on_step=on_step)


@torch.no_grad()
def evaluate(model: Llama, text: torch.Tensor, config: TrainConfig) -> float:
    """Return the mean loss on a text, in nats per token, in windows of context_length.

    The context of a token begins with its window. The last window is left out if it is shorter.
    """
    model.eval()
    text = text.to(model.model.embed_tokens.weight.device).long()
    size = (len(text) - 1) // config.context_length * config.context_length
    X = text[:size].view(-1, config.context_length)  # (windows, context_length)
    y = text[1 : size + 1].view(-1, config.context_length)  # the next token of each
    total = torch.zeros((), device=X.device)
    batches = zip(X.split(config.batch_size), y.split(config.batch_size), strict=True)
    for batch_X, batch_y in batches:
        total += len(batch_X) * next_token_loss(model(batch_X).float(), batch_y)
    return (total / len(X)).item()
