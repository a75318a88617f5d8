"""Static graphs and the dynamic graph: the same computations in PyTorch, TensorFlow and Keras.

    python -m real_world.static_graph

TensorFlow 1 built a static graph and then ran it; PyTorch builds a graph while the code runs. Since
TensorFlow 2 (2019) both frameworks do both. By default, both run Python line by line (eagerly).
tf.function, Keras's fit(), torch.compile and torch.export turn it into graphs.
"""

import argparse
import importlib.util
import logging
import os
import sys
import warnings
from pathlib import Path

import torch

from real_world.common import OUTPUT, print_heading, run_cli, show


def main(argv: list[str] | None = None) -> None:
    about = "PyTorch's dynamic graph and TensorFlow's static graphs, on the CPU."
    parser = argparse.ArgumentParser("python -m real_world.static_graph", description=about)
    add = parser.add_argument
    add("--output", metavar="DIR", type=Path, default=OUTPUT, help="default: checkpoints/")
    add("--no-figure", action="store_true", help="do not plot a figure")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("tensorflow") is None:
        sys.exit(
            "error: TensorFlow is not installed. It has wheels for Python 3.10 to 3.13, and the "
            "examples need 3.11 or newer: delete .venv, then PYTHON=python3.13 ./setup.sh --all"
        )
    # Turn off oneDNN, which logs that it rounds differently, and warnings about what is intended
    # here: retracing, an export that fails, random() in torch.compile.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    torch._logging.set_logs(dynamic=logging.ERROR)
    warnings.filterwarnings("ignore", "Dynamo does not know how to trace the builtin")

    # Imported only here, after the environment is set: TensorFlow takes seconds.
    from real_world.static_graph.dynamic import compare_randomness, compare_shapes
    from real_world.static_graph.errors import compare_errors
    from real_world.static_graph.keras_copy import compare_training
    from real_world.static_graph.plot import plot_graphs
    from real_world.static_graph.tf_setup import tf
    from real_world.static_graph.tracing import compare_tracing

    print_heading(
        "Static graphs and the dynamic graph",
        "Compare PyTorch's dynamic computation graph to TensorFlow's static approach",
    )
    args.output.mkdir(parents=True, exist_ok=True)
    show("PyTorch, TensorFlow", f"{torch.__version__}, {tf.__version__}")

    print("\nTraining: the same model, weights, data and optimizer, 100 epochs")
    compare_training()
    print("\nTracing: one function with a print(), a while and an if, for 5, 0.5 and -3, twice")
    compare_tracing()
    print("\nShapes: a layer for inputs of any width, 6 batches of 5 shapes")
    compare_shapes()
    print("\nStochastic depth: a layer is applied if random.random() < 0.5, 100 calls")
    compare_randomness()
    print("\nErrors: an index is out of range in a model")
    compare_errors()

    if not args.no_figure:
        path = args.output / "static_graph.png"
        plot_graphs(path)
        print()
        show("figure saved to", path)


if __name__ == "__main__":
    run_cli(main)
