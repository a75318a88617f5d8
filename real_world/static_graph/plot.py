"""The figure: two graphs that autograd recorded, and the one that @tf.function traced."""

import itertools
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lesson_code import recorded_graph
from real_world.static_graph.tracing import count_python_calls, data_dependent, traced_operations

# What the operations of the traced graph compute.
DETAILS = {
    "StatelessWhile": "while abs(x) > 1:\nx = x / 2",
    "Greater": "x > 0",
    "StatelessIf": "if: x * x\nelse: x * x * x",
}


def autograd_nodes(value: float) -> list[str]:
    """Return the nodes that autograd records for data_dependent(value), in order of execution."""
    x = torch.tensor(value, requires_grad=True)
    results, _ = count_python_calls(data_dependent, [x])
    return recorded_graph(results[0])[-2::-1]  # without AccumulateGrad, the node of x itself


def plot_chain(axes: Axes, y: float, title: str, labels: list[str], color: str) -> None:
    """Plot a row of boxes that are connected by arrows."""
    axes.text(-0.1, y, title, va="center", color=color, size=12)
    box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": color}
    boxes = [
        axes.text(1.9 + 1.25 * column, y, label, ha="center", va="center", bbox=box, zorder=2)
        for column, label in enumerate(["x", *labels])
    ]
    for left, right in itertools.pairwise(boxes):
        patches = {"patchA": left.get_bbox_patch(), "patchB": right.get_bbox_patch()}
        arrow = {"arrowstyle": "->", "color": "grey", **patches}
        axes.annotate("", right.get_position(), left.get_position(), arrowprops=arrow)


def plot_graphs(path: Path) -> None:
    """Save the figure as a PNG."""
    figure = Figure(figsize=(11, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    axes.set(xlim=(-0.2, 7.6), ylim=(-2.6, 0.5))
    plot_chain(axes, 0, "PyTorch, x = 5", autograd_nodes(5.0), "tab:blue")
    plot_chain(axes, -1, "PyTorch, x = -3", autograd_nodes(-3.0), "tab:blue")
    operations = [f"{name}\n{DETAILS.get(name, '')}" for name in traced_operations()]
    plot_chain(axes, -2.1, "@tf.function, any x", operations, "tab:red")
    figure.savefig(path)
