"""A model for two tasks."""

from collections.abc import Callable

import torch
from torch import nn

from lesson_code import SimpleClassifier
from real_world.digits.model import build_model


def build(
    seed: int,
    device: torch.device | str = "cpu",
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    lr: float = 0.01,
) -> tuple[SimpleClassifier, torch.optim.Optimizer]:
    """Return the digits' model, untrained, and an optimizer for it."""
    model = build_model(seed, device)
    return model, optimizer(model.parameters(), lr=lr)


class MultiTaskModel(nn.Module):
    """A layer that both tasks share, and a head for each: the digit, and its ink.

    R. Caruana, "Multitask Learning", 1997.
    """

    def __init__(self, hidden_size: int = 128) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, hidden_size)
        self.relu = nn.ReLU()
        self.digit_head = nn.Linear(hidden_size, 10)
        self.ink_head = nn.Linear(hidden_size, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of the digit, and the ink."""
        features = self.relu(self.fc1(x))  # (batch, 64) -> (batch, hidden_size)
        logits = self.digit_head(features)  # (batch, 10)
        ink = self.ink_head(features).squeeze(1)  # (batch,)
        return logits, ink
