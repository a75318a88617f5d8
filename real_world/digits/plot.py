"""The figure: losses by epoch, the confusion matrix, and the misclassified digits."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

from real_world.digits.data import Digits


def plot_digits(
    path: Path,
    digits: Digits,
    predicted: torch.Tensor,
    train_losses: list[float],
    validation_losses: list[float],
) -> None:
    """Save the figure as a PNG; `predicted` are the classes of the test set."""
    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 1.05, 1), squeeze=False).flat

    axes = left.subplots()
    axes.set(title="Loss", xlabel="epoch", ylabel="cross-entropy", yscale="log")
    epochs = range(1, len(train_losses) + 1)
    axes.plot(epochs, train_losses, label="training")
    axes.plot(epochs, validation_losses, label="validation")
    best = min(epochs, key=lambda epoch: validation_losses[epoch - 1])
    axes.axvline(best, color="grey", ls=":", label="lowest validation loss")
    axes.legend(frameon=False)

    matrix = confusion_matrix(digits.y_test.tolist(), predicted.tolist())  # (10, 10)
    axes = middle.subplots()
    axes.set(title="Test set", xlabel="predicted", ylabel="label")
    axes.set(xticks=range(10), yticks=range(10))
    axes.imshow(matrix, cmap="Blues")
    for row, counts in enumerate(matrix):
        for column, count in enumerate(counts):
            if count:
                color = "white" if row == column else "tab:red"
                axes.text(column, row, count, ha="center", va="center", color=color)

    wrong = (predicted != digits.y_test).nonzero().flatten().tolist()
    right.suptitle(f"{min(len(wrong), 12)} of {len(wrong)} errors: label, predicted")
    for axes in right.subplots(3, 4).flat:
        axes.axis("off")
        if wrong:
            index = wrong.pop(0)
            axes.imshow(digits.X_test[index].reshape(8, 8).tolist(), cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(f"{digits.y_test[index]}, {predicted[index]}", size=10)
    figure.savefig(path)
