"""Generation, token by token, with a KV cache."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from real_world.llama.model import KVCache, Llama
from real_world.llama.tokenizer import Tokenizer


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is sampled. The defaults are greedy: always the most likely token."""

    temperature: float = 0.0  # 0: greedy; below 1: more likely tokens are preferred
    top_k: int | None = None  # sample from the k most likely tokens only
    top_p: float = 1.0  # sample from the fewest tokens that have this probability together
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of range."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


GREEDY = SamplingParams()


def filter_logits(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float
) -> torch.Tensor:
    """Return logits, (batch, vocab_size), with -inf for tokens that must not be sampled.

    Top-p (nucleus) sampling: A. Holtzman et al., "The Curious Case of Neural Text Degeneration",
    2020.
    """
    logits = logits.float() / max(temperature, 1e-5)
    if top_k is not None:
        kth_largest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (batch, 1)
        logits = logits.masked_fill(logits < kth_largest, -torch.inf)
    if top_p < 1:
        sorted_logits, order = logits.sort(descending=True)
        p = sorted_logits.softmax(dim=-1)
        remove = p.cumsum(dim=-1) - p >= top_p  # more likely tokens have top_p already
        logits = logits.masked_fill(remove.scatter(-1, order, remove), -torch.inf)
    return logits


def sample(logits: torch.Tensor, params: SamplingParams, rng: torch.Generator) -> torch.Tensor:
    """Return the next token of each row of logits, (batch,) int64."""
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    logits = filter_logits(logits, params.temperature, params.top_k, params.top_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=rng).squeeze(1)


def make_caches(model: Llama, batch_size: int, max_length: int) -> list[KVCache]:
    """Return an empty KV cache for each layer."""
    weight = model.lm_head.weight
    return [KVCache(model.config, batch_size, max_length, like=weight) for _ in model.model.layers]


def prefill(model: Llama, prompt: torch.Tensor, caches: list[KVCache] | None) -> torch.Tensor:
    """Process a whole prompt, (batch, length); return the next token's logits."""
    x = model.model(prompt, caches)  # (batch, length, hidden_size)
    return model.lm_head(x[:, -1])  # (batch, vocab_size): only the last position is needed


def decode_one_token(model: Llama, token: torch.Tensor, caches: list[KVCache]) -> torch.Tensor:
    """Process one token, (batch,), after those in the caches; return the next one's logits."""
    return model(token[:, None], caches)[:, 0]  # (batch, vocab_size)


@torch.no_grad()
def generate(
    model: Llama,
    prompt: torch.Tensor,
    max_new_tokens: int,
    params: SamplingParams = GREEDY,
    use_cache: bool = True,
) -> Iterator[torch.Tensor]:
    """Yield the tokens that continue a prompt, one after another, each (batch,) int64.

    Args:
        model: a Llama.
        prompt: (batch, length) int64.
        max_new_tokens: the number of tokens to generate.
        params: temperature, top_k, top_p, and the seed.
        use_cache: if False, all tokens are processed again for every new one. Slow, for comparison.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    rng = torch.Generator(prompt.device).manual_seed(params.seed)
    batch_size, length = prompt.shape
    caches = make_caches(model, batch_size, length + max_new_tokens) if use_cache else None
    tokens = prompt
    for step in range(max_new_tokens):
        if caches is None or step == 0:
            logits = prefill(model, tokens, caches)
        else:
            logits = decode_one_token(model, tokens[:, -1], caches)
        next_token = sample(logits, params, rng)
        yield next_token
        tokens = torch.cat((tokens, next_token[:, None]), dim=1)  # (batch, length + step + 1)


def printable(text: str) -> str:
    """Replace control characters, which could change the terminal, and invalid bytes by a dot."""
    text = text.replace("\ufffd", ".")
    return "".join(c if c == "\n" or c.isprintable() else "." for c in text)


def stream_generate(
    model: Llama, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, params: SamplingParams
) -> Iterator[str]:
    """Yield a prompt and the text that continues it, in pieces, until an end-of-sequence token."""
    tokens = tokenizer.encode(prompt)
    text = tokenizer.decode(tokens)
    yield printable(text)
    position = len(text)
    batch = torch.tensor([tokens], device=model.lm_head.weight.device)  # (1, length)
    for token in generate(model, batch, max_new_tokens, params):
        tokens.append(int(token))
        if tokens[-1] in model.config.eos_token_ids:
            break
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # a part of a character: wait for its other bytes
            yield printable(text[position:])
            position = len(text)
    yield printable(text[position:])
