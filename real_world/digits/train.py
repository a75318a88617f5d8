"""Training with the lesson's train(), an epoch at a time, and validation after each."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lesson_code as lesson
from real_world.digits.data import Digits
from real_world.training import log_losses, option


@dataclass(frozen=True)
class TrainConfig:
    """What can be changed about the training. Every field is an option of the command line."""

    learning_rate: float = option(0.01, "of Adam")
    batch_size: int = option(64, "images per step")
    epochs: int = option(50, "passes over the training images")
    seed: int = option(0, "of the split, the weights and the shuffling", minimum=0)


def train_digits(
    model: lesson.SimpleClassifier, digits: Digits, config: TrainConfig, folder: Path
) -> tuple[list[float], list[float]]:
    """Train a model in place; print and return the mean training and validation loss by epoch.

    The losses of all steps are written to losses.jsonl in `folder`, while it trains.
    """
    train_set = TensorDataset(digits.X_train, digits.y_train)
    # In another order in each epoch; with its own generator, so that the order does not depend on
    # how many random numbers the weights took.
    generator = torch.Generator().manual_seed(config.seed)
    loader = DataLoader(train_set, config.batch_size, shuffle=True, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)
    print("\n  epoch    training loss    validation loss    validation accuracy")
    train_losses: list[float] = []
    validation_losses: list[float] = []
    with log_losses(folder / "losses.jsonl", optimizer) as log:
        for epoch in range(1, config.epochs + 1):
            losses = lesson.train(model, loader, nn.CrossEntropyLoss(), optimizer, 1, log)
            # evaluate() sets eval mode; train() sets train mode again.
            loss, accuracy = lesson.evaluate(model, digits.X_validation, digits.y_validation)
            train_losses.append(sum(losses) / len(losses))
            validation_losses.append(loss)
            if epoch <= 5 or epoch % 5 == 0 or epoch == config.epochs:
                row = f"  {epoch:>5}    {train_losses[-1]:>13.4f}    {loss:>15.4f}"
                print(f"{row}    {accuracy:>19.1%}")
    return train_losses, validation_losses
