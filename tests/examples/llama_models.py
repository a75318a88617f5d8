"""Llamas with seeded weights, for the tests."""

import torch

from real_world.llama import parity
from real_world.llama.config import LlamaConfig
from real_world.llama.generate import generate
from real_world.llama.model import Llama

CONFIG = parity.BASE
PROMPT = torch.tensor([[1, 2, 3]])


def build(
    config: LlamaConfig = CONFIG, std: float = 0.0, scale: float = 1.0, seed: int = 0
) -> Llama:
    """Return a model with seeded weights.

    Noise with a standard deviation of `std` is added, to the weights of the norms too. With a
    larger `scale`, earlier tokens matter more.
    """
    torch.manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * std).mul_(scale)
    return model


def generated(model: Llama, prompt: torch.Tensor, n: int, **options) -> torch.Tensor:
    """Return n new tokens of each row, (batch, n)."""
    return torch.stack(list(generate(model, prompt, n, **options)), dim=1)
