"""Tensor batch -> PyTorch model -> logits -> probabilities."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import lesson_code as lesson
from real_world.serve.codec import MAX_BATCH_ROWS

BACKENDS: dict[str, Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]]] = {
    "eager": lambda model: model,
    "torchscript": torch.jit.script,
    "compile": lambda model: torch.compile(model, dynamic=True),
}


@dataclass(frozen=True)
class ServerConfig:
    """What every worker gets, also one that replaces another: the same model."""

    model: lesson.SimpleClassifier
    backend: str  # of BACKENDS
    device: torch.device
    batch_timeout: float  # seconds that a batch waits for more requests


def load_and_warm_up(config: ServerConfig) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from features, (rows, in_features), to probabilities, (rows, classes).

    It has been called already: compilers and CUDA do much of their work in the first calls.
    Raises BackendCompilerFailed if torch.compile finds no compiler.
    """
    torch.set_num_threads(1)  # the workers share the cores
    if config.backend == "compile":
        torch._inductor.config.compile_threads = 1  # no pool of processes per worker
    model = BACKENDS[config.backend](config.model.to(config.device).eval())

    @torch.inference_mode()
    def predict(features: np.ndarray) -> np.ndarray:
        X = torch.from_numpy(features).to(config.device)  # (rows, in_features)
        logits = model(X)  # (rows, classes)
        return logits.softmax(dim=1).cpu().numpy()

    for rows in (1, 2, MAX_BATCH_ROWS):
        predict(np.zeros((rows, config.model.fc1.in_features), dtype=np.float32))
    return predict
