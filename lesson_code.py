"""PyTorch in five steps: the lesson that runs beside the article.

    python lesson_code.py                all five steps; leaves checkpoints/lesson.pt and lesson.png
    python lesson_code.py --section 3    one step alone
    python lesson_code.py --help         every option

Read it from top to bottom with the article open. Each `# %%` cell is one of its steps, and an
editor that knows such cells runs them one at a time. Every claim is checked as it is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import math
import os
import pickle
import platform
import secrets
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

try:
    import numpy as np
    import torch
    from torch import nn
except ModuleNotFoundError as missing:
    sys.exit(f"lesson_code.py: no {missing.name} here; run it as ./setup.sh python lesson_code.py")
except KeyboardInterrupt:  # importing torch takes seconds
    sys.exit(130)

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"


class ClaimError(Exception):
    """Something that the lesson says turned out not to be so."""


def heading(title: str, quote: str) -> None:
    """Print the heading of a step, and what the article says there."""
    print(f'\n{title}\n{"=" * len(title)}\n  "{quote}"\n')


def show(label: str, value: object) -> None:
    """Print what it is and its value, aligned."""
    print(f"  {label:<32} {value}")


def check(claim: str, measured: object, holds: bool) -> None:
    """Print a claim, what was measured, and `ok`; raise ClaimError where it does not hold."""
    show(claim, f"{measured!s:<42} {'ok' if holds else 'NOT SO'}")
    if not holds:
        raise ClaimError(f"this should hold and does not: {claim} ({measured})")


# %% Step 1: Environment
# A device is chosen once, by name. After that the code is the same on a CPU and on a GPU.


def select_device(name: str = "auto") -> torch.device:
    """Return the device `auto`, `cpu`, `cuda`, `cuda:N` or `mps`, if this machine has it.

    `auto` is CUDA where there is one, else the CPU; MPS, which has no float64, only when asked for.
    Raises ValueError, which says what this machine has, for any other name.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.append("mps")
    if torch.cuda.is_available():
        available += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name == "auto":
        name = "cuda" if "cuda" in available else "cpu"
    if name not in available:
        has = ", ".join(["auto", *available])
        raise ValueError(f"there is no device {name!r} on this machine; it has {has}")
    return torch.device(name)


def environment(device: torch.device) -> None:
    """Print what the lesson runs on (step 1)."""
    quote = "On CPU-only machines, everything in this lesson runs perfectly fine"
    heading("Step 1: Environment", quote)
    cuda = torch.cuda.is_available()
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
    show("Python", platform.python_version())
    if torch.__version__ < (2, 3):
        has = f"PyTorch {torch.__version__} is too old"
        raise ClaimError(f"{has}: the lesson needs 2.3 or newer, see requirements.txt")
    check("PyTorch, 2.3 or newer", torch.__version__, True)
    show("NumPy", np.__version__)
    show("threads for one operation", torch.get_num_threads())
    show("CUDA", torch.cuda.get_device_name() if cuda else f"no; PyTorch is built for {built}")
    show("MPS (Apple)", "yes" if torch.backends.mps.is_available() else "no")
    show("auto chooses", f"{select_device()}, since there is {'a' if cuda else 'no'} CUDA GPU")
    show("this run uses", device)


# %% Step 2: Tensor operations
# A tensor is an array that knows its shape, its dtype and its device.


def tensor_operations(device: torch.device) -> dict[str, torch.Tensor]:
    """Do step 2, and return the tensors that it made, by name."""
    heading("Step 2: Tensor operations", "Everything in PyTorch is a tensor.")
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    check("x.shape", x.shape, x.shape == (2, 2))
    check("x.dtype", x.dtype, x.dtype == torch.float32)
    check("x.device", x.device, x.device == torch.device("cpu"))

    scalar = torch.tensor(3.0)
    vector = torch.tensor([1.0, 2.0, 3.0])
    images = torch.zeros(8, 3, 32, 32)  # 8 images, 3 colours, 32 x 32 pixels
    check("a scalar is 0-d", scalar.shape, scalar.ndim == 0)
    check("a vector is 1-d", vector.shape, vector.ndim == 1)
    check("a matrix is 2-d", x.shape, x.ndim == 2)
    check("a batch of images is 4-d", images.shape, images.ndim == 4)

    torch.manual_seed(0)  # the same random numbers at every run
    zeros, ones, noise = torch.zeros(2, 3), torch.ones(2, 3), torch.randn(100, 100)
    spread = f"mean {noise.mean():.2f}, deviation {noise.std():.2f}"
    check("torch.zeros(2, 3)", "every element 0", bool((zeros == 0).all()))
    check("torch.ones(2, 3)", "every element 1", bool((ones == 1).all()))
    check("torch.randn(100, 100)", spread, abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1)

    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(3, 4)
    product = torch.matmul(a, b)
    same = np.array_equal(product.numpy(), np.matmul(a.numpy(), b.numpy()))
    check("torch.matmul, (2, 3) by (3, 4)", f"{tuple(product.shape)}, equal to NumPy's", same)

    # The article: "reshape without copying data". So it is while the layout allows a view of the
    # same memory. After a transpose the elements are out of order there, and reshape has to copy.
    view, copy = a.reshape(3, 2), a.t().reshape(6)
    view[0, 0], copy[1] = 100.0, -1.0
    check("a write into a.reshape(3, 2)", "changes a: the same memory", a[0, 0].item() == 100)
    check("a write into a.t().reshape(6)", "does not: it had to copy", a[1, 0].item() == 3)

    moved = x.to(device)
    check(f"x.to({str(device)!r})", f"is on {moved.device}", moved.device.type == device.type)
    check("the same once more", "is already there: no copy", moved.to(device) is moved)

    array = np.zeros(3, dtype=np.float32)
    bridged = torch.from_numpy(array)
    array[0] = 7.0
    check("a write into a NumPy array", "changes torch.from_numpy(array)", bridged[0].item() == 7)

    y = x.add(1)
    check("x.add(1)", "makes a new tensor", y is not x and x[0, 0].item() == 1)
    check("x.add_(1), with an underscore", "changes x, in place", x.add_(1) is x and x.equal(y))
    made = {"x": x, "a": a, "scalar": scalar, "vector": vector, "images": images, "zeros": zeros}
    return made | {"ones": ones, "noise": noise, "product": product, "view": view, "copy": copy}


# %% Step 3: Autograd
# Every operation on a tensor that requires a gradient is recorded in a directed acyclic graph.
# backward() walks it from the loss to the leaves and applies the chain rule at every node.


def recorded_graph(result: torch.Tensor) -> list[str]:
    """Return the operations that autograd recorded for `result`, last one first, each once."""
    found: list[torch.autograd.graph.Node] = []
    waiting = [result.grad_fn]
    while waiting:
        node = waiting.pop(0)
        if node is not None and node not in found:
            found.append(node)
            waiting += [source for source, _ in node.next_functions]
    return [node.name().split("::")[-1] for node in found]


def article_loss(w: torch.Tensor | float) -> torch.Tensor | float:
    """Return the article's loss of `w`, a parabola that is least, and 0, at w = 3."""
    return (w * 3 - 9) ** 2


def chain_rule(start: float = 2.0) -> list[tuple[str, str, float, float]]:
    """Return what passed through each node of the article's graph, from the loss back to w.

    Rows of the node's name, the expression, its value, and the gradient d(loss) / d(value).
    """
    w = torch.tensor(start, requires_grad=True)
    product = w * 3
    difference = product - 9
    loss = difference**2
    values = (loss, difference, product, w)
    expressions = ("(w * 3 - 9) ** 2", "w * 3 - 9", "w * 3", "w")
    gradients = torch.autograd.grad(loss, values)
    rows = zip(recorded_graph(loss), expressions, values, gradients, strict=True)
    return [(name, expression, v.item(), gradient.item()) for name, expression, v, gradient in rows]


def gradient_descent(
    start: float = 2.0, lr: float = 0.03, iterations: int = 20, zero_grad: bool = True
) -> tuple[list[float], list[float]]:
    """Descend the article's loss by hand, without an optimizer, to its minimum at w = 3.

    Returns w and the loss, each before every update and after the last: `iterations` + 1 values.
    With `zero_grad=False` it has the article's common bug: gradients add up and are never cleared.
    """
    w = torch.tensor(start, requires_grad=True)
    path, losses = [], []
    for _ in range(iterations):
        loss = article_loss(w)
        path.append(w.item())
        losses.append(loss.item())
        loss.backward()
        with torch.no_grad():  # the update is no part of the loss, so it is not to be recorded
            w -= lr * w.grad
        if zero_grad:
            w.grad.zero_()
    return [*path, w.item()], [*losses, article_loss(w).item()]


def follow_the_data(x: torch.Tensor) -> torch.Tensor:
    """Halve a 0-d tensor until it lies within 1 of zero, then square it, or take its sine.

    Ordinary Python decides, from the data, which operations happen and so are recorded.
    """
    while x.abs() > 1:
        x = x / 2
    if x > 0:
        return x**2
    return x.sin()


def autograd_walkthrough() -> None:
    """Do step 3."""
    heading("Step 3: Autograd", "You get gradients without writing a single derivative by hand.")
    w = torch.tensor(2.0, requires_grad=True)
    loss = article_loss(w)
    loss.backward()
    check("loss = (w * 3 - 9) ** 2 at w = 2", loss.item(), loss.item() == 9)
    check("w.grad, which is d(loss)/dw", w.grad.item(), w.grad.item() == -18)

    print("\n  The recorded graph, walked from loss.grad_fn; backward() goes down it:")
    print(f"    {'node':<18}{'computed':<22}value    d(loss)/d(value)")
    for name, expression, value, gradient in chain_rule():
        print(f"    {name:<18}{expression:<20}{value:>7.0f}{gradient:>20.0f}")
    check("what arrived at w is w.grad", gradient, gradient == w.grad)

    print("\n  Descent by hand, with w.grad.zero_() and with it forgotten:")
    path, losses = gradient_descent()
    lost, high = gradient_descent(zero_grad=False)
    print("    updates           w        loss        w, forgotten        loss")
    for i in (0, 1, 2, 3, 4, 5, 10, 15, 20):
        print(f"    {i:<9}{path[i]:>10.6f}{losses[i]:>12.6f}{lost[i]:>20.6f}{high[i]:>12.6f}")
    away = max(abs(value - 3) for value in lost[10:])
    check("20 iterations reach the minimum", f"w = {path[-1]:.6f}", abs(path[-1] - 3) < 1e-5)
    check("forgotten, it swings for ever", f"up to {away:.2f} away in the last 10", away > 1)

    print("\n  Each call records its graph anew, and the graph follows the data:")
    graphs = set()
    for value in (5.0, 0.5, -3.0):
        x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        result = follow_the_data(x)
        result.backward()
        ahead, behind = (follow_the_data(x.detach() + step).item() for step in (1e-6, -1e-6))
        slope = (ahead - behind) / 2e-6
        names = [name.removesuffix("Backward0") for name in reversed(recorded_graph(result)[:-1])]
        graphs.add(" ".join(names))
        measured = f"gradient {x.grad:.6f}, by differences {slope:.6f}"
        check(f"x = {value:<4}  {' '.join(names)}", measured, abs(x.grad - slope) < 1e-6)
    check("graphs of the three inputs", f"{len(graphs)} different ones", len(graphs) == 3)


# %% Step 4: Build and train
# A model is a class with its layers in __init__ and its computation in forward(). Five lines train
# it. They are the same whatever the model, the loss and the optimizer.


class SimpleNet(nn.Module):
    """The article's one layer: (samples, 4) float32 in, (samples, 2) logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, (samples, 2), of `x`, (samples, 4)."""
        return self.linear(x)


class SimpleClassifier(nn.Module):
    """Two linear layers with a ReLU between: (samples, in_features) in, (samples, classes) out."""

    def __init__(self, in_features: int = 4, hidden: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.hidden = nn.Linear(in_features, hidden)
        self.relu = nn.ReLU()
        self.output = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits, (samples, classes), of `x`, (samples, in_features) float32."""
        return self.output(self.relu(self.hidden(x)))


def make_synthetic_data(
    samples: int = 100,
    features: int = 4,
    classes: int = 3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return normal features, (samples, features) float32, and random labels, (samples,) int64.

    Drawn on the CPU and then moved, so that a seed gives the same data on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(samples, features, generator=generator)
    y = torch.randint(classes, (samples,), generator=generator)
    return X.to(device), y.to(device)


def train(
    model: nn.Module,
    X: torch.Tensor,
    y: torch.Tensor,
    *,
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = nn.functional.cross_entropy,
    optimizer: torch.optim.Optimizer | None = None,
    epochs: int = 100,
    on_epoch: Callable[[int, torch.Tensor], None] | None = None,
) -> list[float]:
    """Train `model` in place with the article's five lines; return the loss of every epoch.

    X: (samples, in_features) float32, y: (samples,) int64, both on the model's device.
    The optimizer is Adam with lr 0.01 if none is given. `on_epoch(epoch, loss)` is called after
    each update. A loss is the one before its epoch's update; it stays on the device until the end,
    because to ask a GPU for a number is to wait for it.
    """
    if optimizer is None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for epoch in range(epochs):
        optimizer.zero_grad()  # 1. Clear gradients from previous step
        outputs = model(X)  # 2. Forward pass
        loss = criterion(outputs, y)  # 3. Compute loss
        loss.backward()  # 4. Backpropagation
        optimizer.step()  # 5. Update weights
        losses.append(loss.detach())
        if on_epoch is not None:
            on_epoch(epoch, losses[-1])
    return torch.stack(losses).tolist() if losses else []


def rises(losses: list[float]) -> list[int]:
    """Return the epochs, counted from 1, at which the loss is not below the one before."""
    pairs = enumerate(itertools.pairwise(losses), start=2)
    return [epoch for epoch, (before, loss) in pairs if loss >= before]


@torch.no_grad()
def accuracy(model: nn.Module, X: torch.Tensor, y: torch.Tensor) -> float:
    """Return the share of X, (samples, in_features), that `model` puts in its class y."""
    return (model(X).argmax(dim=1) == y).float().mean().item()


def lesson_data(seed: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return X and y to train on, then 2,000 fresh samples and labels from another seed."""
    fresh = make_synthetic_data(2000, seed=seed + 1, device=device)
    return *make_synthetic_data(seed=seed, device=device), *fresh


def untrained(seed: int, device: torch.device) -> tuple[SimpleClassifier, torch.optim.Optimizer]:
    """Return a network whose first weights follow from `seed` alone, and its optimizer."""
    torch.manual_seed(seed)
    model = SimpleClassifier().to(device)
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


@functools.cache  # steps 4 and 5 are about one network, whichever of them comes first
def trained(seed: int, device: torch.device, epochs: int) -> tuple[Checkpoint, list[float]]:
    """Train the lesson's network, printing ten losses; return it and its losses on fresh data."""
    X, y, fresh_X, fresh_y = lesson_data(seed, device)
    model, optimizer = untrained(seed, device)
    # In one piece: kept one by one, they would break up the memory that each epoch gives back.
    fresh_losses = torch.empty(epochs, device=device)

    @torch.no_grad()
    def watch(epoch: int, loss: torch.Tensor) -> None:
        fresh_losses[epoch] = nn.functional.cross_entropy(model(fresh_X), fresh_y)
        if (epoch + 1) % max(10, epochs // 10) == 0:
            print(f"    epoch {epoch + 1:>4}    loss {loss:.4f}")

    print(f"\n  The five-line loop, {epochs} epochs on {device}:")
    losses = train(model, X, y, optimizer=optimizer, epochs=epochs, on_epoch=watch)
    return Checkpoint(model, optimizer, epochs, losses), fresh_losses.tolist()


def build_and_train(seed: int, device: torch.device, epochs: int) -> None:
    """Do step 4."""
    quote = "This explicit loop ... exposes every step of training."
    heading("Step 4: Build and train a two-layer network", quote)
    logits = SimpleNet()(torch.randn(3, 4))
    check("SimpleNet, (3, 4) in", f"{tuple(logits.shape)} out", logits.shape == (3, 2))

    print("\n  What nn.Module registered of SimpleClassifier, from its two assignments of a layer:")
    parameters = dict(SimpleClassifier().named_parameters())
    for name, parameter in parameters.items():
        show(f"  {name}", f"{tuple(parameter.shape)!s:<10}{parameter.numel():>4}")
    count = sum(parameter.numel() for parameter in parameters.values())
    check("parameters in all", f"{count:>14}", count == (4 * 16 + 16) + (16 * 3 + 3))

    checkpoint, fresh_losses = trained(seed, device, epochs)
    losses = checkpoint.losses
    first = losses[:100]  # as many as the article's; near a minimum a fixed step is too long
    fell = f"{first[0]:.4f} to {first[-1]:.4f}"
    check(f"the loss fell, epoch 1 to {len(first)}", fell, not rises(first))
    if later := rises(losses):
        show("and rose later", f"at {len(later)} of {epochs - 100} epochs, first at {later[0]}")

    X, y, fresh_X, fresh_y = lesson_data(seed, device)
    known, fresh = accuracy(checkpoint.model, X, y), accuracy(checkpoint.model, fresh_X, fresh_y)
    near = f"{fresh:.1%}, chance is 33.3%"
    print(
        "\n  The article leaves this out: the labels are random, so all that can be learnt is the"
    )
    print("  samples by heart. Of samples that it has not seen, the network knows nothing:")
    show("accuracy on the training data", f"{known:.1%}")
    check("accuracy on fresh random data", near, abs(fresh - 1 / 3) < 0.05)
    show("loss on fresh random data", f"{fresh_losses[-1]:.4f}, a guess costs {math.log(3):.4f}")


# %% Step 5: Verify, test and demo
# A checkpoint is what outlives the process: the parameters, and what it takes to go on training.


class CheckpointError(Exception):
    """A checkpoint that cannot be used: the message says why, and what to do."""


@dataclass
class Checkpoint:
    """A network, its optimizer, the epochs behind it, and the loss of each."""

    model: SimpleClassifier
    optimizer: torch.optim.Optimizer
    epoch: int
    losses: list[float]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """What rebuilds the model: its in_features, hidden and classes."""
        first, last = self.model.hidden, self.model.output
        return first.in_features, first.out_features, last.out_features


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`: a crash at any moment leaves the old file or the new one whole.

    Raises OSError where it cannot be written.
    """
    path = Path(path)
    content = {
        "sizes": checkpoint.sizes,
        "model": checkpoint.model.state_dict(),
        "optimizer_class": type(checkpoint.optimizer).__name__,
        "optimizer": checkpoint.optimizer.state_dict(),
        "epoch": checkpoint.epoch,
        "losses": checkpoint.losses,
    }
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk, before it takes the old file's name
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Rebuild on `device` what `save_checkpoint` wrote; nothing in the file is ever run.

    Raises CheckpointError for a file that is missing, torn, altered, foreign or malicious.
    """

    def refuse(reason: str) -> NoReturn:
        advice = "'python lesson_code.py --section 5' makes a new one"
        raise CheckpointError(f"{path} {reason}; {advice}")

    torch.empty(0, device=device)  # a device that is not there is no fault of the file
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                refuse("is cut short" if file.read(2) == b"PK" else "is empty or no PyTorch file")
            # torch.load compares no checksum, and a record marked as a folder it leaves unread.
            archive = zipfile.ZipFile(file)
            if damaged := archive.testzip():
                refuse(f"was altered: {damaged} does not match its checksum")
            if any(record.external_attr & 0x10 for record in archive.infolist()):
                refuse("was altered: a record is marked as a folder")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # shapes alone, no memory and no random numbers
            model = SimpleClassifier(*content["sizes"])
        model.load_state_dict(content["model"], assign=True)
        optimizer_class = getattr(torch.optim, content["optimizer_class"])
        if not issubclass(optimizer_class, torch.optim.Optimizer):
            raise TypeError(f"{optimizer_class} is no optimizer")
        optimizer = optimizer_class(model.to(device).parameters())
        optimizer.load_state_dict(content["optimizer"])
        losses = [float(loss) for loss in content["losses"]]
        return Checkpoint(model, optimizer, int(content["epoch"]), losses)
    except CheckpointError:
        raise
    except FileNotFoundError:
        refuse("does not exist")
    except OSError as error:
        refuse(f"cannot be read ({error.strerror})")
    except pickle.UnpicklingError:
        refuse("holds more than tensors and plain values; none of it was run")
    except Exception:  # foreign content can provoke any: KeyError, RuntimeError, zlib.error
        refuse("was altered, or is no checkpoint of this lesson")


@torch.no_grad()
def predict(
    model: nn.Module, features: torch.Tensor | np.ndarray | list[list[float]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the class, (samples,) int64, and the probabilities, (samples, classes) float32.

    features: (samples, in_features), moved to the model's device.
    """
    parameter = next(model.parameters())
    probabilities = model(torch.as_tensor(features).to(parameter)).softmax(dim=1)
    return probabilities.argmax(dim=1), probabilities


def verify_and_demo(
    seed: int, device: torch.device, epochs: int, output: Path = CHECKPOINTS, figure: bool = True
) -> None:
    """Do step 5: leave `lesson.pt` and, with `figure`, `lesson.png` in `output`."""
    quote = "a fully trained neural network, verified test results, and a saved model checkpoint"
    heading("Step 5: Verify, test and demo", quote)
    checkpoint, fresh_losses = trained(seed, device, epochs)
    X, y, fresh_X, _ = lesson_data(seed, device)
    path, picture = output / "lesson.pt", output / "lesson.png"
    shown = output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output

    save_checkpoint(path, checkpoint)
    show("saved", f"{shown / path.name}, {path.stat().st_size:,} bytes")
    loaded = load_checkpoint(path, device)
    with torch.no_grad():
        same = torch.equal(loaded.model(fresh_X), checkpoint.model(fresh_X))
    check("loaded into a new network", "the same logits, bit for bit", same)

    half = epochs // 2
    model, optimizer = untrained(seed, device)
    losses = train(model, X, y, optimizer=optimizer, epochs=half)
    with tempfile.TemporaryDirectory() as folder:
        halfway = Path(folder, "halfway.pt")
        save_checkpoint(halfway, Checkpoint(model, optimizer, half, losses))
        resumed = load_checkpoint(halfway, device)
    model, optimizer = resumed.model, resumed.optimizer
    losses = resumed.losses + train(model, X, y, optimizer=optimizer, epochs=epochs - half)
    weights = zip(model.parameters(), checkpoint.model.parameters(), strict=True)
    same = losses == checkpoint.losses and all(torch.equal(*pair) for pair in weights)
    claim = f"{half} epochs, saved, read, {epochs - half} more"
    check(claim, f"the same losses and weights as {epochs}", same)

    samples = fresh_X[:4]
    classes, probabilities = predict(loaded.model, samples)
    print("\n  Four new samples:  features                     class    probabilities")
    for row, label, shares in zip(samples, classes, probabilities, strict=True):
        numbers = "".join(f"{value:8.2f}" for value in row)
        print(f"  {numbers:>44}{label:>9}   {''.join(f'{share:7.1%}' for share in shares)}")
    total = probabilities.sum(dim=1)
    check("the probabilities of a sample", "add up to 1", total.allclose(torch.ones_like(total)))
    if figure:
        draw(picture, checkpoint.losses, fresh_losses)
        show("drawn", shown / picture.name)


def draw(path: Path, losses: list[float], fresh_losses: list[float]) -> None:
    """Draw the recorded graph, the descent on its parabola, and the loss curves, as a PNG."""
    from matplotlib.figure import Figure  # half a second that only the picture needs

    blue, red, grey = "#0969da", "#cf222e", "#6e7781"
    figure = Figure(figsize=(12, 4), dpi=120)
    graph, parabola, curves = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.005, right=0.99, bottom=0.13, top=0.91, wspace=0.22)

    graph.set(title="Step 3: the graph that autograd recorded", xlim=(0, 1), ylim=(-0.5, 3.9))
    graph.axis("off")
    graph.text(0.14, 3.55, "value", color=blue, ha="center")
    graph.text(0.86, 3.55, "d(loss) / d(value)", color=red, ha="center")
    box = {"boxstyle": "round,pad=0.5", "facecolor": "#f6f8fa", "edgecolor": grey}
    centre = {"ha": "center", "va": "center"}
    forward, backward = ({"arrowstyle": "->", "color": color, "lw": 1.5} for color in (blue, red))
    graph.plot((0.5, 0.5), (0, 3), color=grey, lw=1)
    for y, (name, expression, value, gradient) in zip((3, 2, 1, 0), chain_rule(), strict=True):
        graph.text(0.5, y, f"{expression}\n{name}", size=9, bbox=box, **centre)
        graph.text(0.14, y, f"{value:g}", color=blue, size=12, **centre)
        graph.text(0.86, y, f"{gradient:g}", color=red, size=12, **centre)
        if y > 0:
            graph.annotate("", (0.14, y - 0.2), (0.14, y - 0.8), arrowprops=forward)
            graph.annotate("", (0.86, y - 0.8), (0.86, y - 0.2), arrowprops=backward)

    ws = [1.8 + step / 50 for step in range(121)]
    parabola.set(title="Step 3: descent by hand, 20 iterations", xlabel="w", ylabel="loss")
    parabola.plot(ws, [article_loss(w) for w in ws], color=grey, lw=1)
    parabola.plot(*gradient_descent(), "o", color=blue, label="gradient zeroed")
    lost = gradient_descent(zero_grad=False)
    parabola.plot(*lost, "o", color=red, mfc="none", label="zeroing forgotten")

    epochs = range(1, len(losses) + 1)
    curves.set(title="Step 4: training on random labels", xlabel="epoch", ylabel="cross-entropy")
    curves.plot(epochs, fresh_losses, color=red, label="fresh data")
    curves.axhline(math.log(3), color=grey, ls=":", label="a guess, ln 3")
    curves.plot(epochs, losses, color=blue, label="training data")
    for axes, corner in ((parabola, "upper center"), (curves, "upper left")):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc=corner)
    figure.savefig(path)


# %% Running it


def whole_number(text: str, least: int = 0, most: int = 2**32 - 1) -> int:
    """Convert an option's text; raise ArgumentTypeError, which says what would be right."""
    if text.isdecimal() and least <= int(text) <= most:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked; exit with status 2 after one sentence where one is wrong."""
    parser = argparse.ArgumentParser(
        prog="lesson_code.py", description="PyTorch in five steps, beside the article."
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # no usage lines
    add = parser.add_argument
    positive = functools.partial(whole_number, least=1)
    steps = {"type": int, "nargs": "+", "action": "extend", "choices": range(1, 6)}
    add("--section", metavar="N", help="run these steps alone, 1 to 5", **steps)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--epochs", metavar="N", type=positive, default=100, help="default: 100")
    add("--seed", metavar="N", type=whole_number, default=0, help="default: 0")
    add("--output", metavar="DIR", type=Path, default=CHECKPOINTS, help="default: checkpoints/")
    add("--no-figure", action="store_true", help="do not draw lesson.png")
    add("--pause", action="store_true", help="wait for Enter between steps")
    options = parser.parse_args(argv)
    options.section = sorted(set(options.section or range(1, 6)))
    try:
        options.device = select_device(options.device)
        if 5 in options.section:
            options.output.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=options.output).close()
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    except OSError as error:
        where = f"cannot write in the folder {options.output} ({error.strerror})"
        parser.error(f"argument --output: {where}; name one where you may")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the lesson; return its exit status, 0 where every claim held."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        options = parse(argv)
        shared = (options.seed, options.device, options.epochs)
        steps = {
            1: lambda: environment(options.device),
            2: lambda: tensor_operations(options.device),
            3: autograd_walkthrough,
            4: lambda: build_and_train(*shared),
            5: lambda: verify_and_demo(*shared, options.output, not options.no_figure),
        }
        for step in options.section:
            steps[step]()
            if options.pause and step != options.section[-1]:
                with contextlib.suppress(EOFError):  # nobody is there to press it
                    input("\n  Enter shows the next step ")
    except BrokenPipeError:  # whoever reads the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except OSError as error:
        message, status = f"could not write in {options.output}: {error.strerror}", 1
    except (ClaimError, CheckpointError, ImportError) as error:
        message, status = str(error), 1
    else:
        return 0
    print(f"lesson_code.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
