"""Llama against `transformers`' own, on the same weights: training, and cached generation."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lesson_code as lesson
from real_world import Batches, llama
from real_world.benchmark import Entry, alternate, plain_table, times
from real_world.llama import proofs, training


class Logits(nn.Module):
    """transformers' Llama, with tokens in and logits out, which is what train() takes."""

    def __init__(self, twin: nn.Module) -> None:
        super().__init__()
        self.twin = twin

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits, (batch, length, vocab_size)."""
        return self.twin(tokens).logits


def measure(quick: bool) -> dict[str, Any]:
    """Time a token, in training and in cached generation, of the Llama and of transformers'."""
    rounds = 1 if quick else 7
    torch.manual_seed(0)
    model = llama.Llama(llama.MINIATURE)
    twin = proofs.hugging_face_twin(model)
    text, steps, count = llama.library_text(), 10, 256
    prompt = training.encoded("The with statement is")

    def learning(network: nn.Module) -> float:
        network = copy.deepcopy(network)
        optimizer = torch.optim.AdamW(network.parameters())
        draw = training.windows(text, training.BATCH, training.CONTEXT, 0)
        batches = Batches("", draw, steps)
        named = {"criterion": training.next_token_loss, "optimizer": optimizer, "on_step": batches}
        start = time.perf_counter()
        lesson.train(network, [(batches.X, batches.y)], epochs=steps, **named)
        return (time.perf_counter() - start) / (steps * training.BATCH * training.CONTEXT)

    def writing(write: Callable[[], object]) -> float:
        start = time.perf_counter()
        write()
        return (time.perf_counter() - start) / count

    def ours() -> list:
        return list(llama.generate(model, prompt, count))

    def theirs() -> torch.Tensor:
        return twin.generate(prompt, max_new_tokens=count, do_sample=False)

    ways = {"llama": lambda: learning(model), "transformers": lambda: learning(Logits(twin))}
    trained = alternate(ways, rounds, "language, training")
    ways = {"llama": lambda: writing(ours), "transformers": lambda: writing(theirs)}
    return {"training": trained, "generation": alternate(ways, rounds, "language, generation")}


def headline(results: dict[str, Any]) -> str:
    """Return what the README says."""
    (trained, their_training), (wrote, their_writing) = (ways.values() for ways in results.values())
    learning = f"`transformers` takes {times(their_training, trained)} as long to train"
    return f"{learning}, and {times(their_writing, wrote)} to write"


ENTRY = Entry(
    "a 70-billion-parameter language model",
    measure,
    headline,
    functools.partial(plain_table, unit="tokens"),
)
