"""The lesson's network, the Llama and the denoiser, trained by one train()."""

from __future__ import annotations

import ast
import inspect
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lesson_code as lesson
from real_world import llama, stable_diffusion
from real_world.benchmark import BLUE, Entry, drawing, markdown
from real_world.digits import load_digits
from real_world.llama import training
from real_world.stable_diffusion.networks import as_images


def call_of_train(function: Callable) -> str:
    """Return the line with which `function` calls train(), as it stands in its source."""
    tree = ast.parse(inspect.getsource(inspect.unwrap(function)))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    named = (call for call in calls if ast.unparse(call.func).split(".")[-1] == "train")
    return ast.unparse(next(named))


def train_lesson() -> list[float]:
    """Train the lesson's network as the lesson does; return the loss of every epoch."""
    X, y = lesson.make_synthetic_data(seed=0)
    model, optimizer = lesson.build_model(0, torch.device("cpu"))
    return lesson.train(model, [(X, y)], nn.CrossEntropyLoss(), optimizer, epochs=100)


def measure(quick: bool) -> dict[str, Any]:
    """Train each once; if it is to be quick, for a fiftieth of the steps."""
    part = 50 if quick else 1
    digits, text = load_digits(), llama.library_text()
    text = text[: len(text) * 9 // 10]
    torch.manual_seed(0)
    small, model, diffusion = (
        lesson.SimpleClassifier(),
        llama.Llama(llama.MINIATURE),
        stable_diffusion.Diffusion(),
    )
    stable_diffusion.train_autoencoder(diffusion.autoencoder, digits.X, 600 // part)
    with torch.no_grad():
        latents, _ = diffusion.autoencoder.encode(as_images(digits.X))
    latents /= latents.std()
    schedule = diffusion.schedule
    runs = {
        "SimpleClassifier": (
            small,
            train_lesson,
            train_lesson,
        ),
        "Llama": (
            model,
            llama.train_llama,
            lambda: llama.train_llama(model, text, training.STEPS // part, seed=0),
        ),
        "Denoiser, of Stable Diffusion": (
            diffusion.denoiser,
            stable_diffusion.train_denoiser,
            lambda: stable_diffusion.train_denoiser(
                diffusion.denoiser, latents, digits.y, schedule, stable_diffusion.STEPS // part
            ),
        ),
    }
    results = {}
    for name, (network, trainer, train) in runs.items():
        start = time.perf_counter()
        losses = train()
        results[name] = {
            "parameters": sum(weights.numel() for weights in network.parameters()),
            "line": call_of_train(trainer),
            "seconds": time.perf_counter() - start,
            "steps": len(losses),
            "first": losses[0],
            "last": statistics.mean(losses[-len(losses) // 50 :]),  # of batches, which differ
            "losses": [round(loss, 4) for loss in losses[:: max(1, len(losses) // 200)]],
        }
    return results


def headline(results: dict[str, Any]) -> str:
    """Return what the README's table of claims says."""
    *sizes, last = (f"{measured['parameters']:,}" for measured in results.values())
    return f"networks of {', '.join(sizes)} and {last} parameters, trained by one `train()`"


def table(results: dict[str, Any]) -> str:
    """Return the README's table."""
    rows = []
    for name, measured in results.items():
        loss = f"{measured['first']:.2f} to {measured['last']:.2f}"
        count, steps = (f"{measured[key]:,}" for key in ("parameters", "steps"))
        rows.append(
            (name, f"`{measured['line']}`", count, steps, loss, f"{measured['seconds']:.3g} s")
        )
    header = ("network", "the line that trains it", "parameters", "steps", "training loss", "takes")
    return markdown(header, rows, left=2)


def chart(results: dict[str, Any], path: Path) -> None:
    """Draw the three losses side by side, as a PNG."""
    with drawing(path, 12, 3.2, columns=3) as panels:
        for axes, (name, measured) in zip(panels, results.items(), strict=True):
            steps = torch.linspace(1, measured["steps"], len(measured["losses"])).tolist()
            axes.plot(steps, measured["losses"], color=BLUE, lw=1)
            title = f"{name}\n{measured['parameters']:,} parameters"
            axes.set(title=title, xlabel="step", ylabel="loss")
            axes.set_ylim(0)


ENTRY = Entry("used verbatim", measure, headline, table, chart)
