"""The lesson's model, with 64 inputs, 128 hidden units and 10 classes."""

import torch

from lesson_code import SimpleClassifier


def build_model(
    seed: int, device: torch.device | str = "cpu"
) -> tuple[SimpleClassifier, torch.optim.Optimizer]:
    """Return a SimpleClassifier for 8 x 8 pixels and 10 digits, and an Adam optimizer for it."""
    torch.manual_seed(seed)
    model = SimpleClassifier(in_features=64, hidden_size=128, num_classes=10).to(device)
    return model, torch.optim.Adam(model.parameters(), lr=0.01)
