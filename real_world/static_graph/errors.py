"""An error inside a model, and what its traceback says in each mode."""

import re
import traceback
from collections.abc import Callable

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from real_world.common import CheckFailed, show
from real_world.static_graph.tf_setup import keras, tf


class Lookup(nn.Module):
    """A table with 3 rows, which are looked up by index."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, 2))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """Return (batch, 2) for index, (batch,)."""
        return self.table[index]


class KerasLookup(keras.Model):
    """The same table in Keras."""

    def build(self, input_shape: tuple[int]) -> None:
        """Create the table."""
        self.table = self.add_weight(shape=(3, 2))

    def call(self, index: tf.Tensor) -> tf.Tensor:
        """Return (batch, 2) for index, (batch,)."""
        return tf.gather(self.table, index)


def inspect_traceback(function: Callable[[], object]) -> tuple[str, int, int | None]:
    """Call a function that fails in a lookup.

    Returns:
        The name of the exception; the number of lines of its traceback; the position in it of the
        faulty line of the model, counted from the end, or None if it is not there.
    """
    try:
        function()
    except BackendCompilerFailed as error:  # not the model's error: no C++ compiler, for example
        reason = str(error.inner_exception).splitlines()[0]
        raise CheckFailed(f"torch.compile is not available: {reason}") from None
    except (IndexError, RuntimeError, tf.errors.InvalidArgumentError) as error:
        lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
        # The faulty line is the third one of forward() or call(), after the docstring.
        numbers = [f.__code__.co_firstlineno + 2 for f in (Lookup.forward, KerasLookup.call)]
        faulty = re.compile(rf'"{re.escape(__file__)}", line ({numbers[0]}|{numbers[1]}),')
        positions = [len(lines) - i for i, line in enumerate(lines) if faulty.search(line)]
        return type(error).__name__, len(lines), min(positions, default=None)
    raise CheckFailed("check failed: an index that is out of range raised no error")


def compare_errors() -> None:
    """Look up a row that does not exist in every mode; print what the traceback says."""
    index = torch.tensor([0, 7])
    tf_index = tf.constant([0, 7])
    model = Lookup()
    compiled = torch.compile(model)
    keras_model = KerasLookup()
    keras_model.compile("adam", "mse")
    keras_model(tf.constant([0, 1]))  # creates its weights
    traced = tf.function(keras_model)
    modes = {
        "PyTorch, eager": lambda: model(index),
        "torch.compile": lambda: compiled(index),
        "TensorFlow, eager": lambda: keras_model(tf_index),
        "@tf.function": lambda: traced(tf_index),
        "Keras, fit()": lambda: keras_model.fit(tf_index, tf.zeros((2, 2)), verbose=0),
    }
    print(f"  {'':<32} traceback   faulty line      error")
    for mode, function in modes.items():
        error, length, position = inspect_traceback(function)
        where = f"{position} from the end" if position else "not named"
        show(mode, f"{length:>3} lines   {where:<16} {error}")
