"""Import TensorFlow and Keras in the one order that is safe beside PyTorch.

PyTorch's builds for CUDA install triton, and torch.compile imports it. TensorFlow 2.20 and later
load their libraries with RTLD_GLOBAL: if triton is imported after TensorFlow, it calls TensorFlow's
copy of LLVM and crashes (https://github.com/tensorflow/tensorflow/issues/124205). So triton comes
first, and other modules import `tf` and `keras` from here.
"""

# ruff: noqa: I001 - the order of these lines is their purpose
import contextlib
import os

os.environ["KERAS_BACKEND"] = "tensorflow"  # instead of the one in ~/.keras/keras.json
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only

with contextlib.suppress(ImportError):
    import triton  # noqa: F401
import tensorflow as tf
import keras

__all__ = ["keras", "tf"]
