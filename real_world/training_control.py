"""What an explicit loop lets you change: the lesson's five lines, five times, a little different.

    python -m real_world.training_control

The article: "This control is precisely what you need when working with custom loss functions,
gradient clipping, mixed-precision training, or multi-task learning." Below, each is train() of
`lesson_code.py` with the lines changed or added that end in `# <-`. The page prints them, and a
test compares the rest of the loop to the lesson's, letter for letter. The data are the digits.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import lesson_code as lesson
from real_world import heading, parser, run, show, shown, whole_number
from real_world.digits import Digits, load_digits, untrained

criterion = nn.functional.cross_entropy


# %% A loss of your own


def focal_loss(logits: torch.Tensor, y: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """Return the mean of (1 - p) ** gamma times the cross-entropy, p the probability of the truth.

    logits: (samples, classes), y: (samples,) int64. It makes little of samples that are already
    right. At gamma 0 it is the cross-entropy; between 0 and 1 its slope at p = 1 has no bound
    (T.-Y. Lin et al., "Focal Loss for Dense Object Detection", 2017, equation 4).
    """
    log_p = logits.log_softmax(dim=1).gather(1, y.unsqueeze(1)).squeeze(1)
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


def train_with_focal_loss(
    model: nn.Module,
    X: torch.Tensor,
    y: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    epochs: int,
) -> list[float]:
    """Train as the lesson does, by a loss that is a plain function; return it by epoch."""
    losses = []
    for _ in range(epochs):
        optimizer.zero_grad()  # 1. Clear gradients from previous step
        outputs = model(X)  # 2. Forward pass
        loss = focal_loss(outputs, y)  # 3. Compute loss  # <-
        loss.backward()  # 4. Backpropagation
        optimizer.step()  # 5. Update weights
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


# %% Gradient clipping


def train_clipped(
    model: nn.Module,
    X: torch.Tensor,
    y: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    largest: float = 1.0,
    norms: list[torch.Tensor] | None = None,
) -> list[float]:
    """Train with gradients scaled down to a norm of `largest` at the most; return the losses.

    `norms` gets the norm before clipping, of every epoch (R. Pascanu et al., "On the difficulty of
    training recurrent neural networks", 2013, algorithm 1).
    """
    losses, norms = [], [] if norms is None else norms
    for _ in range(epochs):
        optimizer.zero_grad()  # 1. Clear gradients from previous step
        outputs = model(X)  # 2. Forward pass
        loss = criterion(outputs, y)  # 3. Compute loss
        loss.backward()  # 4. Backpropagation
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), largest))  # <-
        optimizer.step()  # 5. Update weights
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


# %% Mixed precision


def train_mixed(
    model: nn.Module,
    X: torch.Tensor,
    y: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    epochs: int,
) -> list[float]:
    """Train with the forward pass in 16 bits where that is safe; return the losses.

    bfloat16 on a CPU. On CUDA float16, whose small gradients would vanish: the scaler multiplies
    the loss, and divides the gradients before the update (P. Micikevicius et al., "Mixed Precision
    Training", 2018, section 3.2). Elsewhere it does nothing.
    """
    device = X.device.type
    half = torch.float16 if device == "cuda" else torch.bfloat16  # <-
    scaler = torch.amp.GradScaler(device, enabled=half == torch.float16)  # <-
    losses = []
    for _ in range(epochs):
        optimizer.zero_grad()  # 1. Clear gradients from previous step
        with torch.autocast(device, half):  # <-
            outputs = model(X)  # 2. Forward pass
            loss = criterion(outputs, y)  # 3. Compute loss
        scaler.scale(loss).backward()  # 4. Backpropagation  # <-
        scaler.step(optimizer)  # 5. Update weights  # <-
        scaler.update()  # <-
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


# %% Two tasks


class TwoTasks(nn.Module):
    """One trunk with two heads: which digit it is, and how much ink it took.

    (samples, 64) float32 in; (samples, 10) logits and (samples,) ink out.
    """

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.trunk = nn.Linear(64, hidden)
        self.relu = nn.ReLU()
        self.digit = nn.Linear(hidden, 10)
        self.ink = nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of the digit, and the ink, of `x`."""
        features = self.relu(self.trunk(x))
        return self.digit(features), self.ink(features).squeeze(1)


def train_two_tasks(
    model: nn.Module,
    X: torch.Tensor,
    y: tuple[torch.Tensor, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    epochs: int,
) -> list[list[float]]:
    """Train on the sum of two losses; return both by epoch.

    y: the digits, (samples,) int64, and the ink, (samples,) float32.
    """
    losses = []
    for _ in range(epochs):
        optimizer.zero_grad()  # 1. Clear gradients from previous step
        outputs = model(X)  # 2. Forward pass
        both = criterion(outputs[0], y[0]), nn.functional.mse_loss(outputs[1], y[1])  # <-
        loss = both[0] + both[1]  # 3. Compute loss  # <-
        loss.backward()  # 4. Backpropagation
        optimizer.step()  # 5. Update weights
        losses.append(torch.stack(both).detach())  # <-
    return torch.stack(losses).tolist()


# %% Gradient accumulation


def train_accumulating(
    model: nn.Module,
    X: torch.Tensor,
    y: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batches: int = 8,
) -> list[float]:
    """Train on `batches` small batches an update, which is to train on one large one.

    For what does not fit into memory at once: backward() adds to the gradients that are there, the
    bug of step 3 put to use. Each batch counts by its share of the samples.
    """
    losses = []
    for _ in range(epochs):
        optimizer.zero_grad()  # 1. Clear gradients from previous step
        total = X.new_zeros(())  # <-
        for part, labels in zip(X.chunk(batches), y.chunk(batches), strict=True):  # <-
            outputs = model(part)  # 2. Forward pass  # <-
            loss = criterion(outputs, labels) * len(part) / len(X)  # 3. Compute loss  # <-
            loss.backward()  # 4. Backpropagation
            total += loss.detach()  # <-
        optimizer.step()  # 5. Update weights
        losses.append(total)  # <-
    return torch.stack(losses).tolist()


# %% What each changes, and what came of it


Losses = dict[str, list[float]]
"""By name, the loss of every epoch."""


def changed(loop: Callable) -> list[str]:
    """Return the lines of `loop` that are marked as changed, without mark and comment."""
    lines = inspect.getsource(loop).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.endswith("# <-")]


def announce(title: str, loop: Callable) -> None:
    """Print what a loop is for, and the lines that make it so."""
    print(f"\n  {title}")
    for line in changed(loop):
        print(f"    >  {line}")


def train_plainly(
    model: nn.Module,
    X: torch.Tensor,
    y: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    epochs: int,
) -> list[float]:
    """Train by the lesson's train(); return the losses."""
    return lesson.train(model, [(X, y)], criterion, optimizer, epochs)


def read_right(model: nn.Module, digits: Digits) -> str:
    """Return, to print, what share of the held-out digits `model` reads right."""
    return f"{lesson.evaluate(model, digits.unseen_X, digits.unseen_y)[1]:.1%} right"


def compare_focal(digits: Digits, epochs: int) -> Losses:
    """Train by the focal loss; show what share of a loss the hardest samples carry."""
    announce("1. A loss of your own: focal loss, a plain function", train_with_focal_loss)
    model, optimizer = untrained(0, digits.X.device)
    logits = model(digits.X)
    pair = focal_loss(logits, digits.y, gamma=0.0), criterion(logits, digits.y)
    lesson.check("at gamma 0 it is cross-entropy", "to 1e-6", torch.allclose(*pair, atol=1e-6))

    train_plainly(model, digits.X, digits.y, optimizer, 20)
    with torch.no_grad():
        each = criterion(model(digits.X), digits.y, reduction="none")
    hardest = each.topk(len(each) // 10).indices
    plain, focal = (
        loss[hardest].sum() / loss.sum() for loss in (each, (1 - (-each).exp()) ** 2 * each)
    )
    print("  Of the loss after 20 epochs, the hardest tenth of the samples makes up")
    shares = f"{focal:.0%}, of cross-entropy {plain:.0%}"
    lesson.check("  of focal loss, which seeks them", shares, bool(focal > plain))

    print("  Two losses are two measures; held against one, the cross-entropy of unseen digits:")
    losses = {}
    for name, loop in (("cross-entropy", train_plainly), ("focal loss", train_with_focal_loss)):
        model, optimizer = untrained(0, digits.X.device)
        losses[name] = loop(model, digits.X, digits.y, optimizer, epochs)
        with torch.no_grad():
            unseen = criterion(model(digits.unseen_X), digits.unseen_y)
        show(f"  {name}: {read_right(model, digits)}", f"cross-entropy {unseen:.4f}")
    return losses


def compare_clipping(digits: Digits, epochs: int) -> Losses:
    """Take steps that are too long, without and with clipping."""
    announce("2. Gradient clipping: steps of SGD at lr 0.3, pixels from 0 to 16", train_clipped)
    norms: list[torch.Tensor] = []
    losses = {}
    for name, loop, fits in (
        # Its units are dead after the first steps, and what is left is a guess, ln 10 = 2.30.
        ("not clipped", train_plainly, lambda last: last > 2),
        ("clipped to 1", functools.partial(train_clipped, norms=norms), lambda last: last < 0.1),
    ):
        model, _ = untrained(0, digits.X.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        losses[name] = loop(model, digits.X * 16, digits.y, optimizer, epochs)
        right = read_right(model, digits._replace(unseen_X=digits.unseen_X * 16))
        measured = f"loss up to {max(losses[name]):.1f}, at last {losses[name][-1]:.3f}"
        lesson.check(f"{name}: {right}", measured, fits(losses[name][-1]))
    before = torch.stack(norms).tolist()
    clipped = f"{sum(norm > 1 for norm in before)} of {epochs} clipped"
    show("norm of the gradients", f"up to {max(before):.1f}; {clipped}")
    model, _ = untrained(0, digits.X.device)
    criterion(model(digits.X * 16), digits.y).backward()
    gradients = [weights.grad for weights in model.parameters()]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    after = nn.utils.get_total_norm(gradients).item()
    lesson.check("norm at the first step", f"{before[0]:.3f} before, {after:.3f} after", after <= 1)
    print("  2.30 is ln 10, a guess: the first long steps left no unit that still answers.")
    return losses


def compare_mixed(digits: Digits, epochs: int) -> Losses:
    """Train in 32 and in 16 bits."""
    announce("3. Mixed precision: the forward pass in 16 bits", train_mixed)
    losses = {}
    half = "float16" if digits.X.is_cuda else "bfloat16"
    for name, loop in (("float32", train_plainly), (half, train_mixed)):
        model, optimizer = untrained(0, digits.X.device)
        losses[name] = loop(model, digits.X, digits.y, optimizer, epochs)
        show(f"{name}: {read_right(model, digits)}", f"loss at last {losses[name][-1]:.4f}")
    apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    lesson.check("apart, at the worst epoch", f"{apart:.4f}, less than 0.01", apart < 0.01)
    return losses


def compare_two_tasks(digits: Digits, epochs: int) -> Losses:
    """Train one trunk for two tasks."""
    announce("4. Two tasks: which digit it is, and its ink, the mean pixel", train_two_tasks)
    ink = digits.X.mean(dim=1)
    ink = (ink - ink.mean()) / ink.std()
    torch.manual_seed(0)
    model = TwoTasks().to(digits.X.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    both = train_two_tasks(model, digits.X, (digits.y, ink), optimizer, epochs)
    losses = {"digit": [digit for digit, _ in both], "ink": [ink for _, ink in both]}
    with torch.no_grad():
        logits, _ = model(digits.unseen_X)
    right = (logits.argmax(dim=1) == digits.unseen_y).float().mean().item()
    show("digits, with ink to learn too", f"{right:.1%} right")
    for name, values in losses.items():
        fell = f"{values[0]:.4f} to {values[-1]:.4f}"
        lesson.check(f"the loss of the {name} fell", fell, values[-1] < values[0] / 10)
    return losses


def compare_accumulating(digits: Digits, epochs: int) -> Losses:
    """Train on one large batch, and on eight small ones an update."""
    announce("5. Gradient accumulation: eight small batches for a large one", train_accumulating)
    X = digits.X.double()  # so that what differs is the method, not the rounding
    weights, losses = [], {}
    for name, loop in (("one batch", train_plainly), ("eight", train_accumulating)):
        model, _ = untrained(0, X.device)
        optimizer = torch.optim.Adam(model.double().parameters(), lr=0.01)
        losses[name] = loop(model, X, digits.y, optimizer, epochs)
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    apart = (weights[0] - weights[1]).abs().max().item()
    sizes = " or ".join(str(size) for size in sorted({len(part) for part in X.chunk(8)}))
    lesson.check(f"{sizes} samples: weights", f"differ by {apart:.1e}", apart < 1e-6)
    return losses


COMPARISONS = (
    compare_focal,
    compare_clipping,
    compare_mixed,
    compare_two_tasks,
    compare_accumulating,
)


def draw(path: Path, curves: list[Losses]) -> None:
    """Draw the losses of every comparison side by side, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), dpi=120, layout="constrained")
    titles = (
        "1. A loss of your own",
        "2. Clipping",
        "3. Mixed precision: the same curve",
        "4. Two tasks",
        "5. Accumulation: the same curve",
    )
    *panels, spare = figure.subplots(2, 3).flat
    spare.axis("off")
    for axes, title, losses in zip(panels, titles, curves, strict=True):
        axes.set(title=title, xlabel="epoch", ylabel="loss", yscale="log")
        for (name, values), color, style in zip(
            losses.items(), ("#cf222e", "#0969da"), ("-", "--"), strict=False
        ):
            axes.plot(range(1, len(values) + 1), values, style, color=color, label=name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path)


# %% Running it


def control(device: torch.device, epochs: int, output: Path, no_figure: bool) -> None:
    """Run the five comparisons; raise CheckFailed where one does not come out as said."""
    quote = "You control what happens before and after each gradient update."
    heading("Training control: the explicit loop, changed", quote)
    if not no_figure:
        output.mkdir(parents=True, exist_ok=True)  # before the work, should it not be possible
    digits = load_digits(device=device)
    show("train(), but for the lines at >", f"{epochs} epochs each, on {device}")
    curves = [compare(digits, epochs) for compare in COMPARISONS]
    if not no_figure:
        draw(output / "training_control.png", curves)
        print()
        show("drawn", shown(output / "training_control.png"))


def options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exit with status 2, after one sentence, where one is wrong."""
    about = "The lesson's loop, five times, with one to six lines changed or added."
    made = parser("training_control", about, "--device", "--output", "--no-figure")
    epochs = functools.partial(whole_number, least=100, most=10_000)
    made.add_argument(
        "--epochs", metavar="N", type=epochs, default=200, help="100 to 10000 (default: 200)"
    )
    chosen = made.parse_args(argv)
    if chosen.device.type == "mps":
        made.error("argument --device: mps has no float64, in which the page compares; use cpu")
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Run the page; return its exit status."""
    chosen = options(argv)
    return run("training_control", lambda: control(**vars(chosen)))


if __name__ == "__main__":
    sys.exit(main())
