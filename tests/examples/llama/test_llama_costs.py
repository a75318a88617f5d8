"""The Llama example: costs, times per token, and checks that fail."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from llama_models import CONFIG, build

from real_world.common import CheckFailed
from real_world.llama import costs, parity
from real_world.llama.config import LLAMA_CONFIGS, LLAMA_TINY
from real_world.llama.generate import generate
from real_world.llama.model import KVCache, Llama
from real_world.llama.sampling import SamplingParams

to_transformers = parity.to_transformers


def test_costs_are_those_of_real_models():
    published = [8_030_261_248, 70_553_706_496, 405_853_388_800]
    assert [costs.num_parameters(config) for config in LLAMA_CONFIGS.values()] == published
    for tied in (True, False):
        model = build(replace(CONFIG, tie_word_embeddings=tied))
        assert costs.num_parameters(model.config) == sum(p.numel() for p in model.parameters())
        assert costs.count_flops(model, 30) == 30 * costs.flops_per_token(model.config, 30)
    cache = KVCache(CONFIG, 1, 1, like=torch.empty(0, dtype=torch.bfloat16))
    size = CONFIG.num_hidden_layers * (cache.k_cache.nbytes + cache.v_cache.nbytes)
    assert costs.kv_cache_bytes_per_token(CONFIG) == size


def test_time_per_token_is_that_of_five_tokens_after_the_prompt(monkeypatch):
    clock = iter([0, 2, 10, 11, 20, 25, 30, 33, 40, 44])  # start and end: 2, 1, 5, 3, 4
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock))
    model, lengths = build(), []
    model.model.embed_tokens.register_forward_hook(lambda _, args, y: lengths.append(y.shape[1]))
    assert costs.seconds_per_token(model, 7, use_cache=True) == 3
    assert lengths == [7, 1, 1, 1, 1, 1]


def test_times_with_and_without_kv_cache(monkeypatch):
    monkeypatch.setattr(costs, "seconds_per_token", lambda _, n, use_cache: n if use_cache else -n)
    times = costs.compare_decoding(build(LLAMA_TINY), torch.tensor([[84]]))
    assert times == {
        "with KV cache": [64, 256, 1024, 4096],
        "without KV cache": [-64, -256, -1024, -4096],
    }


def different_reference(model: Llama) -> torch.nn.Module:
    reference = to_transformers(model)
    with torch.no_grad():
        reference.get_parameter("lm_head.weight").add_(torch.eye(97, 96), alpha=1e-3)
    return reference


def sampled(model: Llama, prompt: torch.Tensor, n: int) -> list[torch.Tensor]:
    return list(generate(model, prompt, n, SamplingParams(temperature=1.0)))


def other_without_cache(model, prompt, n, params, use_cache=True) -> Iterator[torch.Tensor]:
    return generate(model, prompt, n, params if use_cache else replace(params, seed=1), use_cache)


def compare_decoding() -> None:
    costs.compare_decoding(build(LLAMA_TINY), torch.tensor([[84, 104, 101]]))


def print_costs() -> None:
    costs.print_costs(build(LLAMA_TINY))


@pytest.mark.parametrize(
    ("run", "check", "module", "name", "broken"),
    [
        (
            parity.check_parity,
            "6 heads, 2 KV heads",
            parity,
            "to_transformers",
            different_reference,
        ),
        (parity.check_parity, "  greedy generation", parity, "generate", sampled),
        (compare_decoding, "200 sampled tokens", costs, "generate", other_without_cache),
        (print_costs, "parameters, counted", costs, "num_parameters", lambda _: 820_353),
        (
            print_costs,
            "FLOPs of 128 tokens, counted",
            costs,
            "flops_per_token",
            lambda *_: 1_900_545,
        ),
    ],
)
def test_broken_part_fails_its_check(run, check, module, name, broken, monkeypatch):
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(CheckFailed, match=f"check failed: {check} "):
        run()
