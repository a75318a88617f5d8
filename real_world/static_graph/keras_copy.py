"""The lesson's model in Keras, with the same weights, trained in three ways beside train()."""

from collections.abc import Callable

import torch
from torch import nn

import lesson_code as lesson
from real_world.common import check, show
from real_world.static_graph.tf_setup import keras, tf

LR = 0.01  # as in the lesson

# PyTorch's default for Adam; Keras's is 1e-7. They also use it differently: PyTorch adds it to
# sqrt(v) after the bias correction (Kingma and Ba 2015, Algorithm 1), Keras before it (the second
# form, at the end of section 2). The losses are still close if no gradient is as small as epsilon.
EPSILON = 1e-8


def keras_copy(model: lesson.SimpleClassifier) -> keras.Sequential:
    """Return the model in Keras, with the same weights.

    The defaults differ: Keras initializes weights with Glorot's uniform distribution and biases
    with 0, PyTorch both uniformly between -1 / sqrt(in_features) and 1 / sqrt(in_features).
    """
    copy = keras.Sequential(
        [
            keras.layers.Input((model.fc1.in_features,)),
            keras.layers.Dense(model.fc1.out_features, activation="relu"),
            keras.layers.Dense(model.fc2.out_features),  # logits
        ]
    )
    weights = []
    for layer in (model.fc1, model.fc2):
        weights.append(layer.weight.detach().numpy().T)  # (in, out) in Keras, (out, in) in PyTorch
        weights.append(layer.bias.detach().numpy())
    copy.set_weights(weights)
    return copy


def compiled_copy(model: lesson.SimpleClassifier, epsilon: float = EPSILON) -> keras.Sequential:
    """Return the model in Keras, with Adam and the criterion for fit()."""
    copy = keras_copy(model)
    copy.compile(
        optimizer=keras.optimizers.Adam(LR, epsilon=epsilon),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return copy


def fit(model: keras.Model, X: torch.Tensor, y: torch.Tensor, epochs: int) -> list[float]:
    """Train a Keras model, with one batch of all samples; return the loss of every epoch."""
    history = model.fit(
        X.numpy(), y.numpy(), batch_size=len(X), epochs=epochs, shuffle=False, verbose=0
    )
    return history.history["loss"]


def make_train_step(model: keras.Model) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Return a function that makes one training step, TensorFlow's form of the five lines."""
    criterion = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam(LR, epsilon=EPSILON)
    optimizer.build(model.trainable_variables)  # a tf.function must not create variables later

    def train_step(X: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            outputs = model(X, training=True)
            loss = criterion(y, outputs)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    return train_step


def compare_training(epochs: int = 100) -> None:
    """Train the lesson's model with train(), and Keras copies of it; compare every loss."""
    X, y = lesson.make_synthetic_data(seed=0)
    torch.manual_seed(0)
    model = lesson.SimpleClassifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    copies = [keras_copy(model) for _ in range(2)]
    compiled = [compiled_copy(model), compiled_copy(model, epsilon=1e-7)]
    losses = lesson.train(model, [(X, y)], nn.CrossEntropyLoss(), optimizer, epochs)
    show("train()", f"loss {losses[0]:.4f} to {losses[-1]:.4f}")

    def max_abs_diff(keras_losses: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(losses, keras_losses, strict=True))

    def check_losses(label: str, keras_losses: list[float]) -> None:
        difference = max_abs_diff(keras_losses)
        check(label, f"every loss within {difference:.0e}", difference <= 1e-5)

    def run(train_step: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]) -> list[float]:
        inputs, labels = tf.constant(X.numpy()), tf.constant(y.numpy())
        return [float(train_step(inputs, labels)) for _ in range(epochs)]

    check_losses("Keras, fit()", fit(compiled[0], X, y, epochs))
    check_losses("TensorFlow, @tf.function", run(tf.function(make_train_step(copies[0]))))
    check_losses("TensorFlow, eager", run(make_train_step(copies[1])))
    difference = max_abs_diff(fit(compiled[1], X, y, epochs))
    value = f"a loss differs by {difference:.0e}; PyTorch: 1e-8"
    check("fit(), Keras's epsilon of 1e-7", value, difference > 1e-5)
