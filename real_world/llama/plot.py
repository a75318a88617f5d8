"""The figure: the loss by step, and the time per token with and without KV cache."""

from pathlib import Path

from matplotlib.figure import Figure

from real_world.llama.costs import LENGTHS


def plot_llama(
    path: Path,
    losses: list[float],
    validation_loss: float,
    unigram: float,
    bigram: float,
    times: dict[str, list[float]],
) -> None:
    """Save the figure as a PNG; `unigram` and `bigram` are the entropies of the validation text."""
    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)

    left.set(title="Training on Python's language reference", ylim=(0, 6))
    left.set(xlabel="step", ylabel="nats per byte")
    left.plot(range(1, len(losses) + 1), losses, lw=0.8, label="training loss")
    left.plot(len(losses), validation_loss, "s", color="C1", label="validation loss, at the end")
    for name, value in (("unigram", unigram), ("bigram", bigram)):
        left.axhline(value, color="grey", ls=":")
        left.text(len(losses), value, f"best {name} model", color="grey", ha="right", va="bottom")
    left.legend(frameon=False)

    right.set(title="Time per token", xlabel="previous tokens", ylabel="ms")
    right.set(xscale="log", yscale="log")
    for name, seconds in times.items():
        right.plot(LENGTHS, [1000 * s for s in seconds], "o-", label=name)
    right.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    right.yaxis.set_major_formatter("{x:g}")
    right.minorticks_off()
    right.legend(frameon=False)
    figure.savefig(path)
