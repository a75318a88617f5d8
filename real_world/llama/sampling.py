"""How the next token is chosen from the logits."""

import math
from dataclasses import dataclass

import torch

from real_world.training import option


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is sampled. Every field is an option of the command line.

    The defaults are greedy: always the most likely token.
    """

    temperature: float = option(0.0, "0: greedy; below 1: more likely tokens are preferred")
    top_k: int | None = option(None, "sample from the N most likely tokens only")
    top_p: float = option(
        1.0, "sample from the fewest tokens whose probabilities sum to at least this"
    )
    min_p: float = option(0.0, "leave out tokens less likely than this fraction of the likeliest")
    repetition_penalty: float = option(1.0, "above 1: what occurred before is less likely")
    seed: int = option(0, "of the sampling", minimum=0)

    def __post_init__(self) -> None:
        """Raise ValueError, whose message begins with the field, if a value is out of range."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")


GREEDY = SamplingParams()


def filter_logits(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Return float32 logits, divided by the temperature, with -inf where nothing is sampled.

    Both are (batch, vocab_size).

    Top-p (nucleus) sampling: A. Holtzman et al., "The Curious Case of Neural Text Degeneration",
    2020. Min-p: M. Nguyen et al., "Turning Up the Heat", 2024.
    """
    logits = logits.float() / max(params.temperature, 1e-5)
    if params.top_k is not None:
        kth_largest = logits.topk(min(params.top_k, logits.shape[-1])).values[:, -1:]  # (batch, 1)
        logits = logits.masked_fill(logits < kth_largest, -torch.inf)
    if params.top_p < 1:
        sorted_logits, order = logits.sort(descending=True)
        p = sorted_logits.softmax(dim=-1)
        # Remove a token if those before it sum to top_p. Not by cumsum - p, which rounds.
        remove = p.cumsum(dim=-1).roll(1, dims=-1) >= params.top_p
        remove[:, 0] = False
        logits = logits.masked_fill(remove.scatter(-1, order, remove), -torch.inf)
    if params.min_p > 0:
        p = logits.softmax(dim=-1)
        largest = p.max(dim=-1, keepdim=True).values  # (batch, 1)
        logits = logits.masked_fill(p < params.min_p * largest, -torch.inf)
    return logits


def penalize_repetition(logits: torch.Tensor, counts: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return logits, (batch, vocab_size), that are lower for tokens whose count is above 0.

    N. Keskar et al., "CTRL", 2019, section 4.1. As in transformers, negative logits are multiplied.
    """
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(counts > 0, penalized, logits)


def sample(
    logits: torch.Tensor, counts: torch.Tensor, params: SamplingParams, rng: torch.Generator
) -> torch.Tensor:
    """Return the next token of each row of logits, (batch,) int64.

    `counts`, (batch, vocab_size), says how often each token occurred in a row.
    """
    if params.repetition_penalty != 1:
        logits = penalize_repetition(logits, counts, params.repetition_penalty)
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    logits = filter_logits(logits, params)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=rng).squeeze(1)
