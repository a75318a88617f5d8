"""Generation, token by token, with a KV cache."""

import math
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lesson_code import CheckpointError
from real_world.common import CheckFailed
from real_world.llama.model import KVCache, Llama
from real_world.llama.sampling import GREEDY, SamplingParams, sample
from real_world.llama.tokenizer import Tokenizer

CACHE_MULTIPLE = 256  # the room in the caches of a compiled step is a multiple of it


def make_caches(model: Llama, batch_size: int, max_length: int) -> list[KVCache]:
    """Return an empty KV cache for each layer. Raises CheckFailed if it cannot be allocated."""
    weight = model.model.embed_tokens.weight
    try:
        return [KVCache(model.config, batch_size, max_length, weight) for _ in model.model.layers]
    except RuntimeError as error:  # of the CPU's or the GPU's allocator
        tokens = f"{batch_size} x {max_length:,} tokens"
        raise CheckFailed(f"no memory for a KV cache of {tokens}: generate fewer") from error


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
    x = model.model(prompt, None, caches, attention_mask)  # (batch, length, hidden_size)
    return model.lm_head(x[:, -1])  # (batch, vocab_size): only the last position is needed


def decode_one_token(
    model: Llama,
    token: torch.Tensor,
    position: torch.Tensor,
    caches: list[KVCache],
    attention_mask: torch.Tensor,
) -> torch.Tensor:
    """Process one token of each row, (batch,), at position, (1,); return the next one's logits."""
    return model(token[:, None], position, caches, attention_mask)[:, 0]  # (batch, vocab_size)


def compile_decoding(device: torch.device) -> Callable[..., torch.Tensor]:
    """Return decode_one_token(), compiled; on a GPU, the model's step is one CUDA graph."""
    # The tuning fuses the conversion of int8 weights into the product of a single token.
    options: Any = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    if device.type != "cuda":
        options = None
    return torch.compile(decode_one_token, fullgraph=True, dynamic=False, options=options)


@torch.no_grad()
def generate(
    model: Llama,
    prompt: torch.Tensor,
    max_new_tokens: int,
    params: SamplingParams = GREEDY,
    use_cache: bool = True,
    attention_mask: torch.Tensor | None = None,
    compile: bool = False,
) -> Iterator[torch.Tensor]:
    """Yield the tokens that continue prompts, one after another, each (batch,) int64.

    After its first end-of-sequence token, a row is filled with such tokens. When all rows have
    ended, generation stops.

    The first token raises CheckpointError if the logits are not finite, CheckFailed if a KV cache
    is too large, ValueError if prompts are padded on the right.

    Args:
        model: a Llama.
        prompt: (batch, length) int64; shorter prompts are padded on the left.
        max_new_tokens: the largest number of tokens to generate.
        params: how the next token is sampled.
        use_cache: if False, all tokens are processed again for every new one. Slow, for comparison.
        attention_mask: (batch, length) bool, False for padding. None: no padding.
        compile: compile the decoding of a token: up to a minute before the second token, the first
            time. The prompt is not compiled, since its length varies.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ValueError("the last column of attention_mask is False: pad prompts on the left")
    batch_size, length = prompt.shape
    limit = model.config.max_position_embeddings
    if length + max_new_tokens > limit:
        message = f"{length} tokens of the prompt and {max_new_tokens} new ones"
        warnings.warn(f"{message} exceed max_position_embeddings, {limit}", stacklevel=3)
    device = prompt.device
    rng = torch.Generator(device).manual_seed(params.seed)
    eos = torch.tensor(model.config.eos_token_ids, device=device)
    finished = torch.zeros(batch_size, dtype=torch.bool, device=device)
    max_length = length + max(max_new_tokens - 1, 0)  # the last token is not stored
    if compile:  # so that prompts of other lengths can use the same step
        max_length = math.ceil(max_length / CACHE_MULTIPLE) * CACHE_MULTIPLE
    caches = make_caches(model, batch_size, max_length) if use_cache else None
    mask = torch.ones(batch_size, max_length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        mask[:, :length] = attention_mask
    decode = decode_one_token
    if compile and caches:
        decode = compile_decoding(device)
        # A compiled step reads the whole cache. The mask gives what is not written yet the weight
        # 0, but 0 * NaN is NaN.
        for cache in caches:
            cache.reset()
    position = torch.tensor([length], device=device)  # of the token to decode
    tokens, next_token = prompt, prompt[:, -1]
    counts = torch.zeros(batch_size, model.config.vocab_size, dtype=torch.int64, device=device)
    counts.scatter_add_(1, prompt, mask[:, :length].long())  # how often each token occurred
    for total in range(length, length + max_new_tokens):
        if total == length:
            logits = prefill(model, prompt, caches, attention_mask)
            if not logits.isfinite().all():
                raise CheckpointError(
                    "the logits are not finite: damaged weights, or their dtype is too small"
                )
        elif caches is None:
            tokens = torch.cat((tokens, next_token[:, None]), dim=1)  # (batch, total)
            padding = None if attention_mask is None else mask[:, :total]
            logits = prefill(model, tokens, None, padding)
        else:
            past = mask if compile else mask[:, :total]  # compiled: always of one shape
            logits = decode(model, next_token, position, caches, past)
            position += 1
        next_token = sample(logits, counts, params, rng)
        counts.scatter_add_(1, next_token[:, None], torch.ones_like(next_token[:, None]))
        if len(eos):
            next_token = next_token.where(~finished, eos[0])
            finished |= torch.isin(next_token, eos)
        yield next_token
        if len(eos) and finished.all():
            return


def printable(text: str) -> str:
    """Replace control characters, which could change the terminal, and invalid bytes with a dot."""
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
    compile: bool = False,
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
    for token in generate(model, batch, max_new_tokens, params, compile=compile):
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
    compile: bool = False,
) -> list[str]:
    """Return the text that continues each prompt, of any lengths, in one batch.

    Each text ends as in `stream_generate()`, but a stop string does not end the generation: the
    text is cut afterwards.
    """
    tokens, mask = (
        tensor.to(model.model.embed_tokens.weight.device) for tensor in pad_left(prompts)
    )
    new = list(
        generate(model, tokens, max_new_tokens, params, attention_mask=mask, compile=compile)
    )
    texts = []
    for prompt, row in zip(prompts, torch.stack(new, dim=1).tolist(), strict=True):
        ends = [i for i, token in enumerate(row) if token in model.config.eos_token_ids]
        text = tokenizer.decode(prompt + row[: min(ends, default=None)])
        text = text[len(tokenizer.decode(prompt)) :]
        found = [text.index(string) for string in stop if string in text]
        texts.append(printable(text[: min(found, default=None)]))
    return texts
