"""Generation, token by token, with a KV cache."""

import math
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lesson_code import CheckpointError
from real_world.llama.model import KVCache, Llama
from real_world.llama.tokenizer import Tokenizer
from real_world.training import option


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is sampled. Every field is an option of the command line.

    The defaults are greedy: always the most likely token.
    """

    temperature: float = option(0.0, "0: greedy; below 1: more likely tokens are preferred")
    top_k: int | None = option(None, "sample from the N most likely tokens only")
    top_p: float = option(1.0, "sample from the fewest tokens with this probability together")
    min_p: float = option(0.0, "sample from tokens with this part of the largest probability")
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


GREEDY = SamplingParams()


def filter_logits(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Return logits, (batch, vocab_size), with -inf for tokens that must not be sampled.

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
        # More likely tokens have top_p already. Not cumsum - p: it rounds.
        remove = p.cumsum(dim=-1).roll(1, dims=-1) >= params.top_p
        remove[:, 0] = False
        logits = logits.masked_fill(remove.scatter(-1, order, remove), -torch.inf)
    if params.min_p > 0:
        p = logits.softmax(dim=-1)
        largest = p.max(dim=-1, keepdim=True).values  # (batch, 1)
        logits = logits.masked_fill(p < params.min_p * largest, -torch.inf)
    return logits


def sample(logits: torch.Tensor, params: SamplingParams, rng: torch.Generator) -> torch.Tensor:
    """Return the next token of each row of logits, (batch,) int64."""
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    logits = filter_logits(logits, params)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=rng).squeeze(1)


def make_caches(model: Llama, batch_size: int, max_length: int) -> list[KVCache]:
    """Return an empty KV cache for each layer."""
    weight = model.model.embed_tokens.weight
    return [KVCache(model.config, batch_size, max_length, like=weight) for _ in model.model.layers]


def pad_left(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts as one batch, (batch, length), and its attention mask, False for padding."""
    length = max(map(len, prompts))
    tokens = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    starts = torch.tensor([[length - len(prompt)] for prompt in prompts])  # (batch, 1)
    return tokens, torch.arange(length) >= starts


def prefill(
    model: Llama,
    prompt: torch.Tensor,
    caches: list[KVCache] | None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Process a whole prompt, (batch, length); return the next token's logits."""
    x = model.model(prompt, caches, attention_mask)  # (batch, length, hidden_size)
    return model.lm_head(x[:, -1])  # (batch, vocab_size): only the last position is needed


def decode_one_token(
    model: Llama,
    token: torch.Tensor,
    caches: list[KVCache],
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Process one token, (batch,), after those in the caches; return the next one's logits."""
    return model(token[:, None], caches, attention_mask)[:, 0]  # (batch, vocab_size)


@torch.no_grad()
def generate(
    model: Llama,
    prompt: torch.Tensor,
    max_new_tokens: int,
    params: SamplingParams = GREEDY,
    use_cache: bool = True,
    attention_mask: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the tokens that continue prompts, one after another, each (batch,) int64.

    After its first end-of-sequence token, a row has only such tokens. When all rows have ended,
    generation stops.

    Raises CheckpointError if the logits are not finite.

    Args:
        model: a Llama.
        prompt: (batch, length) int64; shorter prompts are padded on the left.
        max_new_tokens: the largest number of tokens to generate.
        params: how the next token is sampled.
        use_cache: if False, all tokens are processed again for every new one. Slow, for comparison.
        attention_mask: (batch, length) bool, False for padding. None: no padding.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    batch_size, length = prompt.shape
    limit = model.config.max_position_embeddings
    if length + max_new_tokens > limit:
        total = f"{length} tokens of the prompt and {max_new_tokens} new ones"
        warnings.warn(f"{total} exceed max_position_embeddings, {limit}", stacklevel=3)
    rng = torch.Generator(prompt.device).manual_seed(params.seed)
    eos = torch.tensor(model.config.eos_token_ids, device=prompt.device)
    finished = torch.zeros(batch_size, dtype=torch.bool, device=prompt.device)
    caches = make_caches(model, batch_size, length + max_new_tokens) if use_cache else None
    tokens = prompt
    for step in range(max_new_tokens):
        if caches is None or step == 0:
            logits = prefill(model, tokens, caches, attention_mask)
            if step == 0 and not logits.isfinite().all():
                raise CheckpointError("the logits are not finite: the weights are damaged")
        else:
            logits = decode_one_token(model, tokens[:, -1], caches, attention_mask)
        next_token = sample(logits, params, rng)
        if len(eos):
            next_token = next_token.where(~finished, eos[0])
            finished |= torch.isin(next_token, eos)
        yield next_token
        if len(eos) and finished.all():
            return
        tokens = torch.cat((tokens, next_token[:, None]), dim=1)  # (batch, length + step + 1)
        if attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask, (0, 1), value=True)  # as tokens


def printable(text: str) -> str:
    """Replace control characters, which could change the terminal, and invalid bytes by a dot."""
    control = {c for c in text if unicodedata.category(c) == "Cc"} - {"\n", "\t"}
    return "".join("." if c in control or c == "\ufffd" else c for c in text)


def partial_stop_length(text: str, stop: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the start of a stop string."""
    lengths = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    return max(lengths, default=0)


def stream_generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: list[int],
    max_new_tokens: int,
    params: SamplingParams,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the text that continues a prompt, in pieces.

    It ends before an end-of-sequence token, or before a stop string, which may begin in one token
    and end in another. Stop strings are searched after each token.
    """
    tokens = list(prompt)
    start = len(tokenizer.decode(prompt))
    text = ""  # all that is generated
    num_yielded = 0  # characters
    batch = torch.tensor([prompt], device=model.model.embed_tokens.weight.device)  # (1, length)
    for token in generate(model, batch, max_new_tokens, params):
        tokens.append(int(token))
        if tokens[-1] in model.config.eos_token_ids:
            break
        text = tokenizer.decode(tokens)[start:]
        found = [text.index(string) for string in stop if string in text]
        if found:
            text = text[: min(found)]
            break
        if not text.endswith("\ufffd"):  # a part of a character: wait for its other bytes
            end = len(text) - partial_stop_length(text, stop)
            yield printable(text[num_yielded:end])
            num_yielded = end
    yield printable(text[num_yielded:])


def batch_generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    params: SamplingParams,
    stop: Sequence[str] = (),
) -> list[str]:
    """Return the text that continues each prompt, of any lengths, in one batch.

    Each text ends as in `stream_generate()`, but a stop string does not end the generation: the
    text is cut afterwards.
    """
    tokens, mask = (
        tensor.to(model.model.embed_tokens.weight.device) for tensor in pad_left(prompts)
    )
    new = list(generate(model, tokens, max_new_tokens, params, attention_mask=mask))
    texts = []
    for prompt, row in zip(prompts, torch.stack(new, dim=1).tolist(), strict=True):
        ends = [i for i, token in enumerate(row) if token in model.config.eos_token_ids]
        text = tokenizer.decode(prompt + row[: min(ends, default=None)])
        text = text[len(tokenizer.decode(prompt)) :]
        found = [text.index(string) for string in stop if string in text]
        texts.append(printable(text[: min(found, default=None)]))
    return texts
