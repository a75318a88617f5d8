"""Writing on, token by token, with a cache of the keys and values of those before."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import lesson_code as lesson
from real_world.llama.model import Cache, Llama


def narrowed(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float
) -> torch.Tensor:
    """Return the logits to draw from, (batch, vocab_size): what is not to be drawn is -inf.

    The `top_k` likeliest stay, and of these the fewest whose probabilities reach `top_p` together
    (A. Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020).
    """
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        shares = ordered.softmax(dim=-1)
        beyond = shares.cumsum(dim=-1) - shares >= top_p
        beyond[:, 0] = False  # the likeliest always stays
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


@torch.no_grad()
def generate(
    model: Llama,
    prompt: torch.Tensor,
    count: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    cached: bool = True,
) -> Iterator[torch.Tensor]:
    """Yield `count` tokens, one after another, that go on from a prompt: each (batch,) int64.

    prompt: (batch, length) int64. Temperature 0 takes the likeliest; anything else draws by `seed`.
    Without a cache everything is computed again for every token: the same, and slower.
    """
    weights = model.lm_head.weight
    limit = prompt.shape[1] + count
    caches = None
    if cached:
        layers = range(model.config.num_hidden_layers)
        caches = [Cache(model.config, len(prompt), limit, weights) for _ in layers]
    generator = torch.Generator(prompt.device).manual_seed(seed)
    given = prompt
    for _ in range(count):
        logits = model.lm_head(model.model(given, caches)[:, -1])
        if not logits.isfinite().all():
            raise lesson.CheckFailed(
                "the network answers with no numbers: its weights are not finite"
            )
        if temperature == 0:
            token = logits.argmax(dim=-1)
        else:
            shares = narrowed(logits, temperature, top_k, top_p).softmax(dim=-1)
            token = torch.multinomial(shares, 1, generator=generator).squeeze(1)
        yield token
        given = token[:, None] if cached else torch.cat((given, token[:, None]), dim=1)
