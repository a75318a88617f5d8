"""The lesson's model, with 64 inputs, 128 hidden units and 10 classes."""

import torch

from lesson_code import SimpleClassifier


def build_model(seed: int, device: torch.device | str = "cpu") -> SimpleClassifier:
    """Return an untrained model for 8 x 8 pixels and 10 digits."""
    torch.manual_seed(seed)
    return SimpleClassifier(in_features=64, hidden_size=128, num_classes=10).to(device)
