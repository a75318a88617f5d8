"""The same model as transformers' LlamaForCausalLM: logits, gradients and generated tokens."""

import dataclasses
import logging

import torch
from torch import nn

from real_world.common import check
from real_world.llama.checkpoint import config_to_dict
from real_world.llama.config import LlamaConfig, RopeScaling
from real_world.llama.generate import generate
from real_world.llama.model import Llama
from real_world.llama.train import next_token_loss

BASE = LlamaConfig(
    vocab_size=97,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=24,
)
SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
CONFIGS = {
    "6 heads, 2 KV heads": dataclasses.replace(
        BASE, num_attention_heads=6, num_key_value_heads=2, head_dim=16
    ),
    "4 KV heads, tied embeddings": dataclasses.replace(BASE, tie_word_embeddings=True),
    "1 KV head, Llama 3.1's RoPE": dataclasses.replace(
        BASE, num_key_value_heads=1, rope_scaling=SCALING
    ),
}


def to_transformers(model: Llama) -> nn.Module:
    """Return transformers' Llama with the configuration and the weights of a model."""
    logging.disable(logging.WARNING)  # its import warns about optional packages
    from transformers import LlamaConfig as TransformersConfig
    from transformers import LlamaForCausalLM

    logging.disable(logging.NOTSET)
    config = TransformersConfig(**config_to_dict(model.config))
    reference = LlamaForCausalLM(config)
    rotary_emb = reference.model.rotary_emb
    inv_freq = rotary_emb.inv_freq
    nn.Module.to(reference, model.lm_head.weight)  # its device and dtype
    # Not in bfloat16: from_pretrained() keeps it in float32, too.
    rotary_emb.inv_freq = inv_freq.to(rotary_emb.inv_freq.device)
    reference.load_state_dict(model.state_dict())
    return reference


def loss_gradients(
    model: nn.Module, logits: torch.Tensor, tokens: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the gradients of the training loss, by the names of the parameters."""
    parameters = dict(model.named_parameters())
    loss = next_token_loss(logits[:, :-1], tokens[:, 1:])
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, grads, strict=True))


def max_abs_diff(model: Llama, reference: nn.Module, tokens: torch.Tensor) -> tuple[float, float]:
    """Return the largest differences of the logits, and of the gradients of the training loss."""
    logits, expected_logits = model(tokens), reference(tokens).logits
    grads = loss_gradients(model, logits, tokens)
    expected_grads = loss_gradients(reference, expected_logits, tokens)
    grad_diffs = [(grads[name] - expected_grads[name]).abs().max().item() for name in grads]
    return (logits - expected_logits).abs().max().item(), max(grad_diffs)


def check_parity() -> None:
    """Compare randomly initialized models with transformers'; raise CheckFailed if they differ."""
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        model = Llama(config)
        reference = to_transformers(model)
        tokens = torch.randint(config.vocab_size, (2, 50))
        logits, grads = max_abs_diff(model, reference, tokens)
        value = f"logits differ by {logits:.0e}, gradients {grads:.0e}"
        check(name, value, max(logits, grads) <= 1e-5)
        prompt = tokens[:, :10]
        generated = torch.stack(list(generate(model, prompt, 30)), dim=1)  # (2, 30)
        expected = reference.generate(prompt, max_new_tokens=30, do_sample=False)  # type: ignore[operator]
        same = generated.equal(expected[:, 10:])
        check("  greedy generation", "the same 30 tokens", same)
