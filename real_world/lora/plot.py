"""The figure: one row per model."""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from real_world.lora.llama import LlamaResult
from real_world.lora.stable_diffusion import DIGIT, NUM_IMAGES, DigitsResult
from real_world.stable_diffusion.plot import show_grid


def show_text(axes: Axes, title: str, text: str) -> None:
    """Show a text in a frame, with the font of a terminal."""
    axes.set(title=title, xticks=[], yticks=[])
    axes.text(0.02, 0.94, text, va="top", family="monospace", size=7.5, transform=axes.transAxes)


def plot_llama(figure: SubFigure, result: LlamaResult) -> None:
    """Plot losses, and a text before and after training."""
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2), squeeze=False).flat
    loss = left.subplots()
    steps = len(result.losses)
    loss.set(title="Llama", xlabel="step", ylabel="nats per token")
    loss.plot(range(1, steps + 1), result.losses, lw=0.8, label="training loss")
    loss.plot((0, steps), (result.loss_before, result.loss_after), "s", label="validation loss")
    loss.legend(frameon=False)
    before, after = right.subplots(2, 1)
    show_text(before, "Generated before training", result.sample_before)
    show_text(after, "Generated after training", result.sample_after)


def plot_digits(figure: SubFigure, result: DigitsResult) -> None:
    """Plot losses, the training images, and digits before and after training."""
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2), squeeze=False).flat
    loss = left.subplots()
    loss.set(title="Diffusion model on digits", xlabel="step", ylabel="mean squared error")
    loss.plot(range(1, len(result.losses) + 1), result.losses, lw=0.8, label="training loss")
    loss.legend(frameon=False)
    train_images, prompts = right.subplots(1, 2, width_ratios=(1, 1.9))
    train_images.set(title=f"The {NUM_IMAGES} training images")
    show_grid(train_images, result.train_images, [""] * 4, [])

    # Two images per prompt and model, from the same noise.
    rows = [
        images.unflatten(0, (10, -1))[:, sample]  # (10, 1, 8, 8)
        for images in (result.images_before, result.images_after)
        for sample in range(2)
    ]
    prompts.set(title="Generated before and after training, from the same noise", xlabel="prompt")
    labels = ["before", "before", "after", "after"]
    show_grid(prompts, torch.cat(rows), labels, [str(digit) for digit in range(10)])
    prompts.get_xticklabels()[DIGIT].set(color="C1", weight="bold")


def plot_lora(path: Path, llama: LlamaResult | None, digits: DigitsResult | None) -> None:
    """Save the figure as a PNG, with a row for each of the results."""
    num_rows = (llama is not None) + (digits is not None)
    figure = Figure(figsize=(12, 3.4 * num_rows), dpi=120, layout="constrained")
    rows = figure.subfigures(num_rows, 1, squeeze=False)[:, 0]
    if llama is not None:
        plot_llama(rows[0], llama)
    if digits is not None:
        plot_digits(rows[-1], digits)
    figure.savefig(path)
