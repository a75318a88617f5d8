"""How data parallel training scales: an estimate from the time of one step on one process."""

import time
from dataclasses import dataclass

import torch
from torch import nn

import lesson_code as lesson
from real_world.digits.data import load_digits
from real_world.digits.model import build_model
from real_world.distributed.process_group import Criterion
from real_world.llama.config import LLAMA_TINY
from real_world.llama.data import RandomWindows, load_corpus
from real_world.llama.model import Llama
from real_world.llama.train import TrainConfig, next_token_loss


@dataclass(frozen=True)
class StepCost:
    """What a training step of a model costs on one process."""

    name: str
    step_time: float  # seconds to compute the gradients and update the weights
    gradient_bytes: int  # what processes have to average


def ring_all_reduce_time(num_bytes: float, workers: int, bandwidth: float, latency: float) -> float:
    """Return the seconds in which `workers` in a ring sum up `num_bytes` of gradients.

    Each sends 2 (workers - 1) messages of num_bytes / workers, one after the other (P. Patarasuk
    and X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).

    Args:
        num_bytes: size of the gradients.
        workers: number of processes.
        bandwidth: bytes per second between two neighbours.
        latency: seconds per message.
    """
    return 2 * (workers - 1) * (latency + num_bytes / workers / bandwidth)


def efficiency(cost: StepCost, workers: int, bandwidth: float, latency: float) -> float:
    """Return the compute fraction of a step.

    Every worker has a batch of its own, as large as the one measured. It is the worst case, without
    overlap: DistributedDataParallel averages gradients while backward() computes the next ones.
    """
    all_reduce_time = ring_all_reduce_time(cost.gradient_bytes, workers, bandwidth, latency)
    return cost.step_time / (cost.step_time + all_reduce_time)


def measure_step(
    name: str, model: nn.Module, X: torch.Tensor, y: torch.Tensor, criterion: Criterion
) -> StepCost:
    """Time a training step of a model: the fastest of 10 rounds of 4 steps."""
    optimizer = torch.optim.Adam(model.parameters())
    times = []
    for _ in range(10):
        start = time.perf_counter()
        lesson.train(model, [(X, y)], criterion, optimizer, epochs=4)
        times.append((time.perf_counter() - start) / 4)
    return StepCost(name, min(times), sum(p.nbytes for p in model.parameters()))


def measure_steps(seed: int, device: torch.device) -> list[StepCost]:
    """Time a training step of the digits' model and of a small Llama."""
    digits = load_digits(seed, device)
    model = build_model(seed, device)
    criterion = nn.CrossEntropyLoss()
    digits_cost = measure_step("digits' model", model, digits.X_train, digits.y_train, criterion)
    llama = Llama(LLAMA_TINY).to(device)
    text = load_corpus().to(device)
    windows = RandomWindows(text, TrainConfig.batch_size, TrainConfig.context_length, 1, seed)
    X, y = next(iter(windows))
    llama_cost = measure_step("small Llama", llama, X, y, next_token_loss)
    return [digits_cost, llama_cost]
