"""Where the time of a training step goes: into operators, or between them."""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import profile

import lesson_code as lesson
from real_world.common import check, show
from real_world.digits.data import Digits
from real_world.digits.model import build_model

OPERATORS = {  # the line of the loop that calls them, in this order; Adam on a GPU calls others
    "aten::select": "for X, y in batches",
    "aten::addmm": "2. Forward pass",
    "aten::clamp_min": "2. Forward pass",  # ReLU
    "aten::_log_softmax": "3. Compute loss",
    "aten::mm": "4. Backpropagation",
    "aten::threshold_backward": "4. Backpropagation",  # of ReLU
    "aten::lerp_": "5. Update weights",
    "aten::sqrt": "5. Update weights",
    "aten::addcdiv_": "5. Update weights",
    "aten::_fused_adam_": "5. Update weights",
}


class StepProfile(NamedTuple):
    """Times in microseconds, and calls, per step."""

    step_time: float  # without the profiler
    profiled_time: float  # with the profiler
    self_times: dict[str, float]  # by operator, without the operators that it calls
    calls: dict[str, int]  # by operator

    @property
    def operator_share(self) -> float:
        """The share of the profiled steps' wall-clock time that is spent in operators."""
        return sum(self.self_times.values()) / self.profiled_time


def profile_steps(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    epochs: int,
    trace_path: Path | None = None,
    fused: bool | None = None,  # None: Adam's default
) -> StepProfile:
    """Time training steps with Adam, without and with the profiler; save the fastest run's trace.

    Operators are the functions of ATen, PyTorch's library. On CUDA, their time is that of their
    kernels; elsewhere, it is their self CPU time.
    """
    # At a lower level, PyTorch 2.13 logs every start and stop of the profiler to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)

    def time_step() -> float:
        start = time.perf_counter()
        losses = lesson.train(model, batches, cross_entropy, optimizer, epochs)
        return (time.perf_counter() - start) / len(losses) * 1e6  # train() waits for the GPU

    step_times = []
    profiled_runs = []
    for _ in range(5):  # the first run includes warm-up; other processes may slow down some runs
        step_times.append(time_step())
        with profile() as prof:
            profiled_time = time_step()
        profiled_runs.append((profiled_time, prof))
    profiled_time, prof = min(profiled_runs, key=lambda run: run[0])

    steps = epochs * len(list(batches))
    on_cuda = next(model.parameters()).is_cuda
    self_times, calls = {}, {}
    for event in prof.key_averages():
        if event.key.startswith("aten::"):
            total = event.self_device_time_total if on_cuda else event.self_cpu_time_total
            self_times[event.key] = total / steps
            calls[event.key] = event.count // steps
    if trace_path is not None:
        trace_path.unlink(missing_ok=True)  # export_chrome_trace() raises no error if it fails
        prof.export_chrome_trace(str(trace_path))
    return StepProfile(min(step_times), profiled_time, self_times, calls)


def print_profiles(profiles: dict[str, StepProfile]) -> None:
    """Print the times per step: one column per profile, one row per operator."""

    def print_row(label: str, values: Iterable[float]) -> None:
        print(f"  {label:<50}", *(f"{value:>8,.0f}" for value in values))

    print(f"  {'microseconds per step':<41}max calls", *(f"{name:>8}" for name in profiles))
    columns = list(profiles.values())
    for name, line in OPERATORS.items():
        calls = max(column.calls.get(name, 0) for column in columns)
        if calls > 0:
            label = f"{line:<20}{name:<25}{calls:>5}"
            print_row(label, [column.self_times.get(name, 0) for column in columns])
    listed = [sum(column.self_times.get(name, 0) for name in OPERATORS) for column in columns]
    operators = [sum(column.self_times.values()) for column in columns]
    profiled = [column.profiled_time for column in columns]
    print_row("other operators", [a - b for a, b in zip(operators, listed, strict=True)])
    print_row("between operators", [a - b for a, b in zip(profiled, operators, strict=True)])
    print_row("step with the profiler", profiled)
    print_row("step without the profiler", [column.step_time for column in columns])


def time_of_a_step(
    digits: Digits,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    seed: int,
    trace_path: Path,
) -> None:
    """Profile 20 steps of train() with three models, with fused Adam, and with a DataLoader."""
    print("\n  8. Where does the time of a step go? torch.profiler, 20 steps. profile_steps()")
    device = digits.X_train.device
    batch_size = 128
    batches = list(
        zip(digits.X_train.split(batch_size), digits.y_train.split(batch_size), strict=True)
    )
    full_batch = [lesson.make_synthetic_data(seed=seed, device=device)]
    torch.manual_seed(seed)
    small = lesson.SimpleClassifier().to(device)
    wide = lesson.SimpleClassifier(64, 4096, 10).to(device)
    profiles = {
        "lesson: 4-16-3, 100 samples": profile_steps(small, full_batch, 20),
        "digits: 64-128-10, 128 samples": profile_steps(
            build_model(seed, device), batches, 2, trace_path
        ),
        "fused: digits, Adam(fused=True)": profile_steps(
            build_model(seed, device), batches, 2, fused=True
        ),
        "loader: digits, with DataLoader": profile_steps(build_model(seed, device), loader, 2),
        "wide: 64-4096-10, 128 samples": profile_steps(wide, batches, 2),
    }
    for label, step_profile in profiles.items():
        show(label, f"{step_profile.operator_share:.0%} of the time in operators")
    print_profiles({label.partition(":")[0]: column for label, column in profiles.items()})
    events = json.loads(trace_path.read_text(encoding="utf-8"))["traceEvents"]
    layers = sum(event["name"] == "aten::linear" for event in events)
    check("two linear layers, 20 steps", f"{layers} x aten::linear in the trace", layers == 40)
    show("trace saved to", trace_path)
