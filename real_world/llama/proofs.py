"""The same network as everybody's; what its cache saves; what it costs; a picture."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import msgspec
import torch
from torch import nn

import lesson_code as lesson
from real_world import quiet
from real_world.llama.generation import generate
from real_world.llama.model import Llama
from real_world.llama.sizes import (
    HERD,
    MINIATURE,
    LlamaConfig,
    RopeScaling,
    flops_a_token,
    parameter_count,
)
from real_world.llama.training import CONTEXT, encoded, entropies, next_token_loss

# %% The same network as everybody's


PROOFS = {  # what the random networks that are compared have
    "6 heads, 2 of keys": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "tied, 4 heads of each": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "3.1's scaling, 1 of keys": {
        "num_key_value_heads": 1,
        "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 16),
    },
}


def proof_config(**changes: object) -> LlamaConfig:
    """Return the sizes of a small network to compare, with `changes`."""
    sizes = {"vocab_size": 97, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaConfig(**(sizes | heads | changes))


def hugging_face_twin(model: Llama) -> nn.Module:
    """Return transformers' LlamaForCausalLM of the same sizes, with the same weights."""
    with quiet():  # its import warns of packages that it does not need
        from transformers import LlamaConfig as TheirConfig
        from transformers import LlamaForCausalLM

    sizes = msgspec.to_builtins(model.config)
    scaling = sizes.pop("rope_scaling") or {"rope_type": "default"}
    rope = scaling | {"rope_theta": sizes.pop("rope_theta")}
    ours = TheirConfig(**sizes, rope_parameters=rope, bos_token_id=None)
    twin = LlamaForCausalLM(ours).to(model.lm_head.weight)
    twin.load_state_dict(model.state_dict())
    return twin


def differences(model: Llama, twin: nn.Module, tokens: torch.Tensor) -> tuple[float, float]:
    """Return by how much two networks differ: their logits, and their gradients, at the most."""
    logits, theirs = model(tokens), twin(tokens).logits
    for each in (logits, theirs):
        next_token_loss(each[:, :-1], tokens[:, 1:]).backward()
    found = {name: weights.grad for name, weights in twin.named_parameters()}
    apart = [(weights.grad - found[name]).abs().max() for name, weights in model.named_parameters()]
    return (logits - theirs).abs().max().item(), max(apart).item()


def compare_with_transformers() -> None:
    """Hold random networks against transformers' with the same weights."""
    print("\n  Against transformers' LlamaForCausalLM, with the same random weights:")
    for seed, (name, changes) in enumerate(PROOFS.items()):
        torch.manual_seed(seed)
        model = Llama(proof_config(**changes))
        tokens = torch.randint(97, (2, 50))
        twin = hugging_face_twin(model)
        logits, gradients = differences(model, twin, tokens)
        measured = f"logits differ by {logits:.0e}, gradients {gradients:.0e}"
        lesson.check(name, measured, max(logits, gradients) <= 1e-5)
        ours = torch.stack(list(generate(model, tokens[:, :10], 30)), dim=1)
        theirs = twin.generate(tokens[:, :10], max_new_tokens=30, do_sample=False)[:, 10:]
        lesson.check("  greedy generation", "the same 30 tokens", torch.equal(ours, theirs))


# %% What the cache saves, and what a Llama costs


LENGTHS = (64, 256, 1024, 4096)


def seconds_a_token(model: Llama, length: int, cached: bool) -> float:
    """Return the time of the token after `length` others, the median of five, in seconds."""
    prompt = torch.zeros(1, length, dtype=torch.int64, device=model.lm_head.weight.device)
    tokens = generate(model, prompt, 6, cached=cached)
    next(tokens).item()  # with a cache, it takes in the whole prompt
    times = []
    for _ in range(5):
        start = time.perf_counter()
        next(tokens).item()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare_cache(model: Llama) -> dict[str, list[float]]:
    """Generate with and without a cache; return the seconds a token, by LENGTHS, of both."""
    print("\n  Generation, with the keys and values of earlier tokens kept, and without:")
    prompt = encoded("The ").to(model.lm_head.weight.device)
    kept, again = (
        torch.cat(list(generate(model, prompt, 200, temperature=0.8, cached=cached)))
        for cached in (True, False)
    )
    lesson.check("200 tokens, drawn", "the same ones", torch.equal(kept, again))
    seconds_a_token(model, 64, cached=True)  # the first is slower
    times = {
        name: [seconds_a_token(model, length, cached) for length in LENGTHS]
        for name, cached in (("cached", True), ("computed again", False))
    }
    print(f"  {'ms for the token after':<32}" + "".join(f"{length:>10,}" for length in LENGTHS))
    for name, seconds in times.items():
        print(f"    {name:<30}" + "".join(f"{each * 1000:>10.2f}" for each in seconds))
    return times


def compare_sizes(model: Llama) -> None:
    """Print what this network costs, and what the herd does, from their configurations alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    print("\n  What a Llama costs, by its configuration; context 8,192, this one's 128:")
    for line in (
        ("", "parameters", "GFLOPs", "weights", "training", "cache a token"),
        ("", "", "a token", "bfloat16", "16 bytes", "bfloat16"),
    ):
        print("  {:<14}{:>17}{:>9}{:>11}{:>11}{:>15}".format(*line))
    for name, config in {"this one": MINIATURE, **HERD}.items():
        parameters = parameter_count(config)
        flops = flops_a_token(config, 8192 if name in HERD else CONTEXT) / 1e9
        cache = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_size
        unit, power = ("GB", 1e9) if name in HERD else ("MB", 1e6)
        weights, training = (f"{parameters * size / power:,.1f} {unit}" for size in (2, 16))
        row = f"{flops:>9,.3g}{weights:>11}{training:>11}{cache:>13,} B"
        print(f"  {name:<14}{parameters:>17,}{row}")

    real = sum(weights.numel() for weights in model.parameters())
    lesson.check(
        "this one's, counted: parameters", f"{real:,}", real == parameter_count(model.config)
    )
    tokens = torch.zeros(1, CONTEXT, dtype=torch.int64, device=model.lm_head.weight.device)
    plainly = sdpa_kernel(SDPBackend.MATH)  # the counter does not know a CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plainly:
        model(tokens)
    flops = counter.get_total_flops()
    same = flops == CONTEXT * flops_a_token(model.config, CONTEXT)
    lesson.check(f"operations for {CONTEXT} tokens", f"{flops:,}", same)


def draw(
    path: Path, text: torch.Tensor, losses: list[float], times: dict[str, list[float]]
) -> None:
    """Draw the loss beside the text's entropies, and the time a token with and without a cache."""
    from matplotlib.figure import Figure

    blue, red, grey = "#0969da", "#cf222e", "#6e7781"
    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    curve, growth = figure.subplots(1, 2)
    curve.set(title="Training on Python's language reference", xlabel="step", ylabel="nats a byte")
    curve.plot(range(1, len(losses) + 1), losses, color=blue, lw=0.8)
    for entropy, name in zip(
        entropies(text), ("a byte", "a byte, after the one before"), strict=True
    ):
        curve.axhline(entropy, color=grey, ls=":")
        curve.text(len(losses), entropy, f"entropy of {name}", color=grey, ha="right", va="bottom")
    curve.set_ylim(0)
    growth.set(title="One more token", xlabel="tokens before it", ylabel="ms")
    growth.set(xscale="log", yscale="log")
    for (name, seconds), color in zip(times.items(), (blue, red), strict=True):
        growth.plot(LENGTHS, [each * 1000 for each in seconds], "o-", color=color, label=name)
    growth.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    growth.yaxis.set_major_formatter("{x:g}")
    growth.minorticks_off()
    growth.legend(frameon=False)
    for axes in (curve, growth):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
