"""The figure: the time of a step and the efficiency, by the number of workers."""

from pathlib import Path

from matplotlib.figure import Figure

from real_world.distributed.scaling import StepCost, efficiency, ring_all_reduce_time


def plot_scaling(path: Path, costs: list[StepCost], bandwidth: float, latency: float) -> None:
    """Save the figure as a PNG: from 1 to 10,000 workers."""
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    workers = sorted({round(10 ** (tenth / 10)) for tenth in range(41)})
    for index, cost in enumerate(costs):
        times = [
            1000 * ring_all_reduce_time(cost.gradient_bytes, n, bandwidth, latency)
            for n in workers[1:]
        ]
        computing = [100 * efficiency(cost, n, bandwidth, latency) for n in workers]
        color = f"C{index}"
        left.plot(workers[1:], times, color=color, label=f"{cost.name}: all-reduce")
        left.axhline(1000 * cost.step_time, color=color, ls=":", label=f"{cost.name}: compute")
        right.plot(workers, computing, color=color, label=cost.name)
    left.set(title="Time of a step", ylabel="ms", yscale="log")
    right.set(title="Efficiency", ylabel="% of the time spent computing", ylim=(0, 105))
    for axes in (left, right):
        axes.set(xlabel="workers", xscale="log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(frameon=False)
    figure.savefig(path)
