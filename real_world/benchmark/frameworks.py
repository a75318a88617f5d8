"""The training of the lesson's model in eight implementations, all from the same weights.

Each function takes a model and its data, and returns a function that trains for a number of steps
and returns their losses. All use full batches and Adam, and have the same loss at every step,
except scikit-learn, which draws its own initial weights.
"""

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import lesson_code as lesson
from real_world.benchmark.harness import time_call

LR = 0.01
Train = Callable[[int], Sequence[float]]


class Size(NamedTuple):
    """The number of samples, and the sizes of a SimpleClassifier."""

    samples: int
    in_features: int
    hidden_size: int
    num_classes: int

    @property
    def flops(self) -> int:
        """The operations of a step's five matrix products; the input needs no gradient."""
        return 2 * self.samples * self.hidden_size * (2 * self.in_features + 3 * self.num_classes)


# %% PyTorch
def pytorch(model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor) -> Train:
    """Call the lesson's train()."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    return functools.partial(lesson.train, model, [(X, y)], nn.CrossEntropyLoss(), optimizer)


def pytorch_compiled(model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor) -> Train:
    """Compile all that train() calls: the model, the criterion and the optimizer's step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
    criterion = torch.compile(nn.CrossEntropyLoss())
    compiled: Any = torch.compile(model)
    return functools.partial(lesson.train, compiled, [(X, y)], criterion, optimizer)


# %% TensorFlow
def keras_fit(model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor) -> Train:
    """Call fit() as the lesson calls train(): an epoch is one step."""
    from real_world.static_graph.keras_copy import compiled_copy, fit

    return functools.partial(fit, compiled_copy(model), X, y)


def keras_fit_one_epoch(model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor) -> Train:
    """Call fit() for one epoch of all steps; it returns only their mean loss."""
    from real_world.static_graph.keras_copy import compiled_copy, tf

    keras_model = compiled_copy(model)
    dataset = tf.data.Dataset.from_tensors((X.numpy(), y.numpy())).repeat()

    def train(steps: int) -> list[float]:
        history = keras_model.fit(dataset, steps_per_epoch=steps, shuffle=False, verbose=0)
        return history.history["loss"]

    return train


def tf_function(model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor) -> Train:
    """Trace the five lines, with a GradientTape, to a graph."""
    from real_world.static_graph.keras_copy import keras_copy, make_train_step, tf

    step = tf.function(make_train_step(keras_copy(model)))
    inputs, labels = tf.constant(X.numpy()), tf.constant(y.numpy())

    def train(steps: int) -> list[float]:
        return [step(inputs, labels) for _ in range(steps)]

    return train


# %% JAX
def jax_jit(model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor) -> Train:
    """Compile the gradients and Adam's update together."""
    import jax
    from jax import numpy as jnp
    from jax.example_libraries import optimizers

    init, update, get_params = optimizers.adam(LR)
    inputs, labels = jnp.asarray(X.numpy()), jnp.asarray(y.numpy())

    def loss_fn(params: list) -> jax.Array:
        W1, b1, W2, b2 = params
        logits = jax.nn.relu(inputs @ W1.T + b1) @ W2.T + b2  # (samples, num_classes)
        return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()

    @jax.jit
    def step(t: int, state: Any) -> tuple:  # noqa: ANN401
        loss, grads = jax.value_and_grad(loss_fn)(get_params(state))
        return update(t, grads, state), loss

    state = init([jnp.asarray(parameter.detach().numpy()) for parameter in model.parameters()])
    t = 0

    def train(steps: int) -> list[float]:
        nonlocal state, t
        losses = []
        for _ in range(steps):
            state, loss = step(t, state)
            losses.append(loss.block_until_ready())
            t += 1
        return losses

    return train


# %% Without autograd
def scikit_learn(model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor) -> Train:
    """Train an MLPClassifier of the same sizes."""
    from sklearn.neural_network import MLPClassifier

    def train(steps: int) -> list[float]:
        classifier = MLPClassifier(
            hidden_layer_sizes=(model.fc1.out_features,),
            alpha=0,
            batch_size=len(X),
            learning_rate_init=LR,
            max_iter=steps,
            shuffle=False,
            tol=0,
            n_iter_no_change=steps + 1,
        )
        with warnings.catch_warnings(action="ignore"):  # that it has not converged
            return classifier.fit(X.numpy(), y.numpy()).loss_curve_

    return train


def numpy_by_hand(model: lesson.SimpleClassifier, X: torch.Tensor, y: torch.Tensor) -> Train:
    """Compute the gradients and Adam's update without any framework."""
    params = [parameter.detach().numpy().copy() for parameter in model.parameters()]
    W1, b1, W2, b2 = params
    ms = [np.zeros_like(p) for p in params]
    vs = [np.zeros_like(p) for p in params]
    inputs, labels, rows = X.numpy(), y.numpy(), np.arange(len(y))
    one_hot = np.eye(len(b2), dtype=np.float32)[labels]
    t = 0

    def step() -> float:
        nonlocal t
        t += 1
        pre_relu = inputs @ W1.T + b1  # (samples, hidden_size)
        hidden = np.maximum(pre_relu, 0)
        logits = hidden @ W2.T + b2  # (samples, num_classes)
        logits -= logits.max(axis=1, keepdims=True)
        probabilities = np.exp(logits)
        probabilities /= probabilities.sum(axis=1, keepdims=True)

        d_logits = (probabilities - one_hot) / len(labels)
        d_hidden = d_logits @ W2
        d_hidden[pre_relu <= 0] = 0
        grads = (d_hidden.T @ inputs, d_hidden.sum(0), d_logits.T @ hidden, d_logits.sum(0))
        for p, g, m, v in zip(params, grads, ms, vs, strict=True):  # in place
            m += 0.1 * (g - m)
            v += 0.001 * (g**2 - v)
            p -= LR / (1 - 0.9**t) * m / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
        return -np.log(probabilities[rows, labels]).mean().item()

    def train(steps: int) -> list[float]:
        return [step() for _ in range(steps)]

    return train


# %% Run
FRAMEWORKS = {
    "PyTorch, train()": pytorch,
    "PyTorch, train() and torch.compile": pytorch_compiled,
    "Keras, fit(): 1 step per epoch": keras_fit,
    "Keras, fit(): all steps in 1 epoch": keras_fit_one_epoch,
    "TensorFlow, @tf.function": tf_function,
    "JAX, jit": jax_jit,
    "scikit-learn, MLPClassifier": scikit_learn,
    "NumPy, by hand": numpy_by_hand,
}


def build_training(framework: str, size: Size) -> Train:
    """Return the training of a framework, with the weights and the data that all of them get."""
    X, y = lesson.make_synthetic_data(size.samples, size.in_features, size.num_classes)
    torch.manual_seed(0)
    model = lesson.SimpleClassifier(size.in_features, size.hidden_size, size.num_classes)
    return FRAMEWORKS[framework](model, X / size.in_features**0.5, y)


def main(framework: str, size: Size) -> None:
    """Measure on request; see harness.worker()."""
    train = build_training(framework, size)
    train(2)  # trace and compile
    # At least half a second: after a pause, the threads of a process share a core at first.
    steps = max(2, round(1 / time_call(lambda: train(2))))
    print("ready", flush=True)
    for _ in sys.stdin:
        print(time_call(lambda: train(steps)) / steps, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Size(*map(int, sys.argv[2:])))
