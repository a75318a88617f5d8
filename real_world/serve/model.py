"""Tensor batch -> PyTorch model -> logits -> probabilities."""

import pickle
from collections.abc import Callable

import numpy as np
import torch

from real_world.serve.codec import MAX_BATCH_ROWS


def load_and_warm_up(
    pickled: bytes, backend: str, device: str
) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """Return a function from features to probabilities, and the number of features.

    It is already warmed up: compilers and CUDA do much of their work in the first calls.
    """
    torch.set_num_threads(1)  # the workers share the cores
    model = pickle.loads(pickled).to(device).eval()
    in_features = model.fc1.in_features
    if backend == "torchscript":
        model = torch.jit.script(model)
    elif backend == "compile":
        torch._inductor.config.compile_threads = 1  # no pool of processes per worker
        model = torch.compile(model, dynamic=True)

    @torch.inference_mode()
    def predict(features: np.ndarray) -> np.ndarray:
        X = torch.from_numpy(features).to(device)  # (rows, in_features)
        logits = model(X)  # (rows, classes)
        return logits.softmax(dim=1).cpu().numpy()

    for rows in (1, 2, MAX_BATCH_ROWS):
        predict(np.zeros((rows, in_features), dtype=np.float32))
    return predict, in_features
