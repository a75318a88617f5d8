"""Parameters, FLOPs and memory of a Llama; the time per token with and without KV cache."""

import statistics
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from real_world.common import check
from real_world.llama.config import LLAMA_CONFIGS, LLAMA_TINY, LlamaConfig
from real_world.llama.generate import generate
from real_world.llama.model import Llama
from real_world.llama.sampling import SamplingParams
from real_world.llama.train import TrainConfig

LENGTHS = (64, 256, 1024, 4096)


def matmul_parameters(config: LlamaConfig) -> int:
    """Return the number of weights that a token is multiplied with: all linear layers."""
    heads = config.num_attention_heads + config.num_key_value_heads
    attention = 2 * config.hidden_size * heads * config.head_dim  # q and o, k and v
    mlp = 3 * config.hidden_size * config.intermediate_size  # gate, up, down
    lm_head = config.vocab_size * config.hidden_size
    return config.num_hidden_layers * (attention + mlp) + lm_head


def num_parameters(config: LlamaConfig) -> int:
    """Return the number of parameters."""
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    embedding = config.vocab_size * config.hidden_size
    if config.tie_word_embeddings:
        embedding = 0  # lm_head's are counted
    return matmul_parameters(config) + norms + embedding


def flops_per_token(config: LlamaConfig, context_length: int) -> int:
    """Return the floating-point operations per token of a forward pass.

    2 per weight, and 4 per query feature and token of the context (A. Chowdhery et al., "PaLM",
    2022, appendix B). A training step has three times as many.
    """
    attention = 4 * config.num_attention_heads * config.head_dim * context_length
    return 2 * matmul_parameters(config) + config.num_hidden_layers * attention


def kv_cache_bytes_per_token(config: LlamaConfig) -> int:
    """Return the size of a token's keys and values in bfloat16."""
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def print_costs(model: Llama) -> None:
    """Print the costs of the tiny model and of Llama 3.1; check them against what PyTorch counts.

    Training takes 16 bytes per parameter: float32 weights, gradients, and Adam's two averages.
    """
    print("                       parameters   GFLOPs    weights   training   KV cache")
    print("                                 per token   bfloat16    float32  per token")
    configs = {"this model": LLAMA_TINY, **LLAMA_CONFIGS}
    for name, config in configs.items():
        parameters = num_parameters(config)
        context_length, unit, scale = 8192, "GB", 1e9
        if config is LLAMA_TINY:
            context_length, unit, scale = TrainConfig.context_length, "MB", 1e6
        print(
            f"  {name:<14}{parameters:>17,}"
            f"{flops_per_token(config, context_length) / 1e9:>9,.3g}"
            f"{2 * parameters / scale:>8,.1f} {unit}"
            f"{16 * parameters / scale:>8,.1f} {unit}"
            f"{kv_cache_bytes_per_token(config):>9,} B"
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    check("parameters, counted", f"{count:,}", count == num_parameters(model.config))
    flops = count_flops(model, TrainConfig.context_length)
    expected = TrainConfig.context_length * flops_per_token(
        model.config, TrainConfig.context_length
    )
    check(f"FLOPs of {TrainConfig.context_length} tokens, counted", f"{flops:,}", flops == expected)


@torch.no_grad()
def count_flops(model: Llama, length: int) -> int:
    """Count the floating-point operations of a forward pass with FlopCounterMode."""
    tokens = torch.zeros(
        1, length, dtype=torch.int64, device=model.model.embed_tokens.weight.device
    )
    # The counter does not know the CPU's fused attention: use the math backend.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens)
    return counter.get_total_flops()


def seconds_per_token(model: Llama, length: int, use_cache: bool) -> float:
    """Return the median time of a new token after `length` tokens."""
    prompt = torch.zeros(
        1, length, dtype=torch.int64, device=model.model.embed_tokens.weight.device
    )
    tokens = generate(model, prompt, 6, use_cache=use_cache)
    next(tokens).item()  # processes the prompt
    times = []
    for _ in range(5):
        start = time.perf_counter()
        next(tokens).item()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare_decoding(model: Llama, prompt: torch.Tensor) -> dict[str, list[float]]:
    """Generate with and without KV cache; return both times per token, for each of LENGTHS."""
    params = SamplingParams(temperature=0.8)
    cached = torch.cat(list(generate(model, prompt, 200, params)))
    recomputed = torch.cat(list(generate(model, prompt, 200, params, use_cache=False)))
    check("200 sampled tokens", "the same with and without", cached.equal(recomputed))
    seconds_per_token(model, 64, use_cache=True)  # warm-up
    times = {
        "with KV cache": [seconds_per_token(model, n, use_cache=True) for n in LENGTHS],
        "without KV cache": [seconds_per_token(model, n, use_cache=False) for n in LENGTHS],
    }
    print(f"  {'ms per token, after':<32}" + "".join(f"{length:>10,}" for length in LENGTHS))
    for name, seconds in times.items():
        print(f"    {name:<30}" + "".join(f"{1000 * s:>10.2f}" for s in seconds))
    return times
