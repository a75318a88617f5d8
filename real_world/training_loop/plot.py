"""The figure: one panel per change of the loop."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def plot_losses(axes: Axes, title: str, xlabel: str, losses: dict[str, list[float]]) -> None:
    """Plot losses on a logarithmic scale; the first is x = 1."""
    axes.set(title=title, xlabel=xlabel, ylabel="loss", yscale="log")
    for (label, values), style in zip(losses.items(), ("-", "--", ":"), strict=False):
        axes.plot(range(1, len(values) + 1), values, style, label=label)


def plot_training_loop(
    path: Path,
    shares: dict[str, list[float]],
    clipping: dict[str, list[float]],
    precision: dict[str, list[float]],
    tasks: dict[str, list[float]],
    schedule: dict[str, list[float]],
    stopping: dict[str, list[float]],
) -> None:
    """Save the figure as a PNG."""
    figure = Figure(figsize=(12, 7), dpi=120, layout="constrained")
    (loss, clip, amp), (multi, rate, stop) = figure.subplots(2, 3)

    loss.set(title="Custom loss", ylabel="share of the loss, %")
    loss.set(xlabel="share of the samples, hardest first, %")
    for label, values in shares.items():
        percent = [100 * (index + 1) / len(values) for index in range(len(values))]
        loss.plot(percent, [100 * value for value in values], label=label)

    plot_losses(clip, "Gradient clipping", "step", clipping)
    plot_losses(amp, "Mixed precision", "epoch", precision)
    plot_losses(multi, "Multi-task learning", "epoch", tasks)

    learning_rates = schedule["learning rate"]
    losses = {label: schedule[label] for label in ("constant", "scheduled")}
    plot_losses(rate, "Learning rate scheduler", "epoch", losses)
    right = rate.twinx()
    right.set(ylabel="scheduled learning rate", yticks=[0, 0.1, 0.2])
    right.fill_between(range(1, len(learning_rates) + 1), learning_rates, color="grey", alpha=0.15)

    plot_losses(stop, "Early stopping", "epoch", stopping)
    validation = stopping["validation"]
    lowest = min(validation)
    stop.plot(validation.index(lowest) + 1, lowest, "o", color="C1", label="restored weights")

    for axes in (loss, clip, amp, multi, rate, stop):
        axes.legend(frameon=False)
    figure.savefig(path)
