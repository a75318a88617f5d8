"""Models that change from one batch to the next: layers of changing width, stochastic depth."""

import random
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch._dynamo.testing import CompileCounter

from real_world.common import check, show
from real_world.static_graph.tf_setup import keras, tf

Tensor: TypeAlias = torch.Tensor | tf.Tensor

# %% A layer whose width follows its input
SHAPES = ((8, 4), (16, 4), (32, 4), (8, 6), (8, 7), (8, 4))  # (batch, width)


class KerasLayer(keras.Model):
    """The same layer in Keras; it records the shapes for which fit() traces it."""

    def build(self, input_shape: tuple[int, int]) -> None:
        """Create the weight and the set of shapes."""
        self.weight = self.add_weight(shape=(8, 2))
        self.traced_shapes: set[tuple[int | None, ...]] = set()

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Return (batch, 2) for x, (batch, width)."""
        self.traced_shapes.add(tuple(x.shape))  # a Python side effect: while tracing only
        return x @ self.weight[: tf.shape(x)[1]]


def compare_shapes() -> None:
    """Give the layer batches of different shapes; print how many graphs every mode builds."""
    torch_weight = torch.ones(8, 2)
    tf_weight = tf.ones((8, 2))

    def torch_layer(x: torch.Tensor) -> torch.Tensor:
        return x @ torch_weight[: x.shape[1]]  # (batch, width) -> (batch, 2)

    def tf_layer(x: tf.Tensor) -> tf.Tensor:
        width = tf.shape(x)[1]  # while tracing, x.shape[1] can be None: unknown
        return x @ tf_weight[:width]  # (batch, width) -> (batch, 2)

    counter = CompileCounter()
    compiled = torch.compile(torch_layer, backend=counter)
    traced = tf.function(tf_layer)
    relaxed = tf.function(tf_layer, reduce_retracing=True)
    model = KerasLayer()
    model.compile("adam", "mse")
    for shape in SHAPES:
        compiled(torch.zeros(shape))
        traced(tf.zeros(shape))
        relaxed(tf.zeros(shape))
        model.fit(tf.zeros(shape), tf.zeros((shape[0], 2)), batch_size=shape[0], verbose=0)
    show("PyTorch, TensorFlow, eager", "no graphs to build")
    show("torch.compile", f"{counter.frame_count} graphs")
    show("@tf.function", f"{traced.experimental_get_tracing_count()} graphs")
    show("  with reduce_retracing", f"{relaxed.experimental_get_tracing_count()} graphs")
    show("Keras, fit()", f"{len(model.traced_shapes)} graphs")


# %% Stochastic depth (Huang et al. 2016, arXiv:1603.09382): a layer is skipped at random
def stochastic_depth(x: Tensor) -> Tensor:
    """Apply a layer, which adds 1, with a probability of 0.5, by Python's `random`."""
    return x + 1 if random.random() < 0.5 else x


def stochastic_depth_in_graph(x: tf.Tensor) -> tf.Tensor:
    """Apply the layer with a probability of 0.5; an operation of the graph decides."""
    return tf.cond(tf.random.uniform(()) < 0.5, lambda: x + 1, lambda: x)


def count_applied(model: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Return how many of 100 calls with x = 0 applied the layer."""
    random.seed(0)
    tf.random.set_seed(0)
    return sum(int(model(x)) for _ in range(100))


def compare_randomness() -> None:
    """Apply a layer at random in every mode; check how often it is applied."""
    torch_x = torch.zeros(())
    tf_x = tf.zeros(())
    compiled = torch.compile(stochastic_depth, backend="eager")

    eager = count_applied(stochastic_depth, torch_x)
    check("PyTorch, eager", f"{eager} times", 20 < eager < 80)
    applied = count_applied(compiled, torch_x)
    check("torch.compile", f"{applied} times", applied == eager)
    applied = count_applied(stochastic_depth, tf_x)
    check("TensorFlow, eager", f"{applied} times", applied == eager)
    applied = count_applied(tf.function(stochastic_depth), tf_x)
    check("@tf.function", f"{applied} times, decided while tracing", applied in (0, 100))
    applied = count_applied(tf.function(stochastic_depth_in_graph), tf_x)
    check("  with tf.random and tf.cond", f"{applied} times", 20 < applied < 80)
