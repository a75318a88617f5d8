"""The Llama of the example and that of transformers, with the same weights."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lesson_code as lesson
from real_world.benchmark.harness import (
    Stats,
    format_ratio,
    format_time,
    interleave_stats,
    markdown_table,
    time_call,
)
from real_world.llama.config import LLAMA_TINY
from real_world.llama.data import RandomWindows, load_corpus
from real_world.llama.generate import generate
from real_world.llama.model import Llama
from real_world.llama.parity import to_transformers
from real_world.llama.train import BATCH_SIZE, CONTEXT_LENGTH, next_token_loss

QUOTE = "a 70-billion-parameter language model"

STEPS = 10
NEW_TOKENS = 256


# %% Measure
class Logits(nn.Module):
    """transformers' Llama with the interface that train() expects: tokens in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits, (batch, length, vocab_size)."""
        return self.model(tokens).logits


def time_training(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the seconds per token of training a copy of the model by the lesson's train()."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters())

    def train() -> None:
        lesson.train(model, batches, next_token_loss, optimizer, epochs=1)

    return time_call(train) / sum(y.numel() for _, y in batches)


def time_generation(generate_tokens: Callable[[], object]) -> float:
    """Return the seconds per token."""
    return time_call(generate_tokens) / NEW_TOKENS


def measure(quick: bool) -> dict[str, dict[str, Stats]]:
    """Measure training, and greedy generation with a KV cache."""
    rounds = 1 if quick else 7
    torch.manual_seed(0)
    model = Llama(LLAMA_TINY)
    reference: Any = to_transformers(model)
    text = load_corpus()
    batches = list(RandomWindows(text, BATCH_SIZE, CONTEXT_LENGTH, STEPS, seed=0))
    prompt = text[None, :20].long()  # (1, 20)

    def generate_here() -> list[torch.Tensor]:
        return list(generate(model, prompt, NEW_TOKENS))

    def generate_transformers() -> torch.Tensor:
        return reference.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)

    training = {
        "this example": functools.partial(time_training, model, batches),
        "transformers": functools.partial(time_training, Logits(reference), batches),
    }
    generation = {
        "this example": functools.partial(time_generation, generate_here),
        "transformers": functools.partial(time_generation, generate_transformers),
    }
    return {
        "training": interleave_stats(training, rounds, "llama, training"),
        "generation": interleave_stats(generation, rounds, "llama, generation"),
    }


# %% Show
def table(results: dict[str, dict[str, Stats]]) -> str:
    """Return the time per token; a ratio below the spread of the rounds means no difference."""
    rows = []
    for task, by_model in results.items():
        here, reference = by_model["this example"], by_model["transformers"]
        spread = max((s["max"] - s["min"]) / s["median"] for s in by_model.values())
        times = [format_time(stats["median"], "µs") for stats in (here, reference)]
        ratio = format_ratio(reference["median"], here["median"])
        rows.append([task, *times, ratio, f"{spread:.0%}"])
    header = [
        "time per token",
        "this example (µs)",
        "transformers (µs)",
        "transformers / this",
        "spread",
    ]
    return markdown_table(header, rows)
