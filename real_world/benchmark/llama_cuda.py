"""Llama on a GPU: generation beside the memory bandwidth, training beside a matrix product.

The shapes are those of Llama 3.2 1B and Llama 3.1 8B, the weights random, in bfloat16.
"""

import functools
import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import lesson_code as lesson
from real_world.benchmark import harness
from real_world.benchmark.cuda import matmul_speed
from real_world.benchmark.llama import (
    Generate,
    Logits,
    generate_transformers,
    measure_generation,
)
from real_world.llama.config import LLAMA_3_1_8B, LLAMA_3_2_1B, LlamaConfig
from real_world.llama.costs import flops_per_token, matmul_parameters
from real_world.llama.generate import generate
from real_world.llama.model import Llama
from real_world.llama.parity import to_transformers
from real_world.llama.train import next_token_loss

QUOTE = "a 70-billion-parameter language model"

GENERATED = {"1B": LLAMA_3_2_1B, "8B": LLAMA_3_1_8B}
TRAINED = LLAMA_3_2_1B
PROMPT_LENGTH = 256
ANSWER_LENGTH = 64
TRAINING_SHAPE = (4, 2048)  # batch size, context length
STEPS = 5


def build(config: LlamaConfig, device: torch.device) -> Llama:
    """Return a Llama with random weights in bfloat16, without end-of-sequence tokens."""
    with device:
        model = Llama(replace(config, eos_token_ids=()))
    return model.to(device, torch.bfloat16)


# %% Measure
def copy_bandwidth(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the bytes per second that ten copies of x to y read and write."""

    def copy() -> None:
        for _ in range(10):
            y.copy_(x)
        y[0].item()  # wait for the GPU

    return 10 * 2 * x.nbytes / harness.time_call(copy)


def generation_candidates(
    model: Llama, reference: nn.Module, prompt: torch.Tensor
) -> dict[str, Generate]:
    """Return four ways to continue a prompt with the same weights."""

    def generate_here(compiled: bool, count: int) -> object:
        return torch.stack(list(generate(model, prompt, count, compile=compiled))).tolist()

    return {
        "this example": functools.partial(generate_here, False),
        "this example, compiled": functools.partial(generate_here, True),
        "transformers": generate_transformers(reference, prompt, static=False),
        "transformers, static cache, compiled": generate_transformers(
            reference, prompt, static=True
        ),
    }


def training_candidates(
    model: Llama, reference: nn.Module, tokens: torch.Tensor
) -> dict[str, Callable[[], float]]:
    """Return three ways to train on tokens, (batch, length + 1); each returns tokens per second."""
    X, y = tokens[:, :-1], tokens[:, 1:]

    def train(forward: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        batches = [(X, y)] * STEPS
        seconds = harness.time_call(
            lambda: lesson.train(forward, batches, next_token_loss, optimizer, epochs=1)
        )
        return STEPS * y.numel() / seconds

    fused = functools.partial(torch.optim.AdamW, fused=True)
    forwards: dict[str, tuple[Any, nn.Module]] = {
        "this example": (model, model),
        "this example, compiled": (torch.compile(model, dynamic=False), model),
        "transformers": (Logits(reference), reference),
    }
    return {
        name: functools.partial(train, forward, fused(trained.parameters()))
        for name, (forward, trained) in forwards.items()
    }


def measure_size(
    config: LlamaConfig, device: torch.device, rounds: int
) -> dict[str, dict[str, harness.Stats]]:
    """Measure generation with one configuration; free its models, and the CUDA graphs."""
    model = build(config, device)
    with device:
        reference = to_transformers(model)
    prompt = torch.randint(config.vocab_size, (1, PROMPT_LENGTH), device=device)
    candidates = generation_candidates(model, reference, prompt)
    speeds = measure_generation(candidates, ANSWER_LENGTH, rounds)
    del model, reference, candidates
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return speeds


def measure(quick: bool) -> dict[str, Any]:
    """Measure generation at both sizes, training at the smaller, and what the GPU can do."""
    if not torch.cuda.is_available():
        sys.exit("error: the entry llama_cuda needs an NVIDIA GPU, and a PyTorch with CUDA")
    device, rounds = torch.device("cuda"), 1 if quick else 3
    x = torch.ones(2**29, dtype=torch.bfloat16, device=device)  # 1 GiB
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    peaks = {
        "bandwidth": functools.partial(copy_bandwidth, x, torch.empty_like(x)),
        "matmul": functools.partial(matmul_speed, matrix),
    }
    for peak in peaks.values():
        peak()  # warm up
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}
    results["peaks"] = harness.interleave_stats(peaks, rounds, "llama_cuda, peaks")
    results["generation"] = {
        size: measure_size(config, device, rounds) for size, config in GENERATED.items()
    }
    model = build(TRAINED, device)
    with device:
        reference = to_transformers(model)
    batch_size, length = TRAINING_SHAPE
    tokens = torch.randint(TRAINED.vocab_size, (batch_size, length + 1), device=device)
    training = training_candidates(model, reference, tokens)
    for train in training.values():
        train()  # warm up, compile
    results["training"] = harness.interleave_stats(training, rounds, "llama_cuda, training")
    return results


# %% Show
def table(results: dict[str, Any]) -> str:
    """Return two tables: generation beside the bandwidth, training beside a matrix product."""
    rows = []
    for size, speeds in results["generation"].items():
        weights = 2 * matmul_parameters(GENERATED[size])  # bytes, all read once per token
        for name, stats in speeds.items():
            speed = 1 / stats["next"]["median"]
            used = weights * speed / results["peaks"]["bandwidth"]["median"]
            first = harness.format_time(stats["first"]["median"], "ms")
            rows.append([f"{size}, {name}", first, harness.format_number(speed), f"{used:.0%}"])
    header = [
        results["gpu"],
        "first token (ms)",
        "tokens per second",
        "share of the copy bandwidth",
    ]
    generation = harness.markdown_table(header, rows)
    flops = 3 * flops_per_token(TRAINED, TRAINING_SHAPE[1])
    rows = []
    for name, stats in results["training"].items():
        used = flops * stats["median"] / results["peaks"]["matmul"]["median"]
        rows.append([name, harness.format_number(stats["median"]), f"{used:.0%}"])
    header = ["training 1B", "tokens per second", "share of a matrix product"]
    return f"{generation}\n\n{harness.markdown_table(header, rows)}"
