"""The figures, and images as text."""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import nn

from real_world.stable_diffusion.pipeline import LatentDiffusion


def image_grid(images: torch.Tensor, columns: int) -> torch.Tensor:
    """Return images, (n, 1, 8, 8), side by side in rows, with a white pixel around each."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))  # (n, 1, 10, 10)
    rows = padded.view(-1, columns, 10, 10).transpose(1, 2)  # (rows, 10, columns, 10)
    return rows.reshape(-1, columns * 10)  # (rows * 10, columns * 10)


def to_text(images: torch.Tensor) -> str:
    """Return images, (n, 1, 8, 8) from 0 to 1, side by side, two characters per pixel."""
    shades = " .:-=+*#%@"
    lines = []
    for row in image_grid(images, columns=len(images))[1:-1]:
        line = "".join(2 * shades[int(9.99 * pixel)] for pixel in row.tolist())
        lines.append(line.rstrip())
    return "\n".join(lines)


def save_images(path: Path, images: torch.Tensor) -> None:
    """Save images, (n, 1, 8, 8) from 0 to 1, side by side as a PNG, 16 times as large."""
    grid = image_grid(images, columns=len(images))
    large = grid.repeat_interleave(16, dim=0).repeat_interleave(16, dim=1)
    imsave(path, large.tolist(), cmap="gray_r", vmin=0, vmax=1)


def show_grid(
    axes: Axes, images: torch.Tensor, row_labels: list[str], column_labels: list[str]
) -> None:
    """Show images in a grid with a label per row, and per column if `column_labels` has any."""
    columns = len(images) // len(row_labels)
    axes.imshow(image_grid(images, columns).tolist(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_xticks([10 * column + 4.5 for column in range(len(column_labels))], column_labels)
    axes.set_yticks([10 * row + 4.5 for row in range(len(row_labels))], row_labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def plot_example(
    path: Path, model: LatentDiffusion, losses: dict[str, list[float]], seed: int
) -> None:
    """Save a figure: ten images per digit, the DDIM steps of one, guidance scales, the losses."""
    device = model.scaling_factor.device
    figure = Figure(figsize=(12, 6.5), dpi=120, layout="constrained")
    axes = figure.subplot_mosaic(
        [["prompts", "steps"], ["prompts", "guidance"], ["prompts", "losses"]],
        width_ratios=(1.1, 1),
        height_ratios=(0.5, 1.2, 1.3),
    )

    digits = torch.arange(10, device=device).repeat_interleave(10)
    images = model.generate(digits, seed=seed)
    axes["prompts"].set(title="Ten images per prompt, guidance scale 3", ylabel="prompt")
    show_grid(axes["prompts"], images, [str(digit) for digit in range(10)], [])

    steps = [1, 10, 20, 25, 30, 35, 40, 45, 50]
    history: list[torch.Tensor] = []
    model.generate(torch.tensor([7], device=device), seed=seed, on_step_end=history.append)
    images = model.decode(torch.cat([history[step - 1] for step in steps]))
    axes["steps"].set(title="From noise to an image, prompt 7", xlabel="DDIM step")
    show_grid(axes["steps"], images, [""], [str(step) for step in steps])

    scales = [0, 0.5, 1, 2, 3, 5, 8, 12, 20]
    prompts = torch.tensor([2, 5, 8], device=device)
    images_by_scale = [model.generate(prompts, scale, seed=seed + 1) for scale in scales]
    images = torch.stack(images_by_scale, dim=1).flatten(0, 1)  # (3 * len(scales), 1, 8, 8)
    axes["guidance"].set(
        title="The same noise with increasing guidance", xlabel="guidance scale", ylabel="prompt"
    )
    show_grid(axes["guidance"], images, ["2", "5", "8"], [f"{scale:g}" for scale in scales])

    axes["losses"].set(title="Training loss", xlabel="step", yscale="log")
    for name, values in losses.items():
        axes["losses"].plot(values, lw=0.7, label=name)
    axes["losses"].legend(frameon=False)
    figure.savefig(path)
