"""The lesson's training loop with changed lines, beside train(): what each change does.

    python -m real_world.training_loop

The loops are in loops.py; compared ones start from the same weights and use the same mini-batches.
At the end, torch.profiler shows where the time of train() itself goes.
"""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader, TensorDataset

import lesson_code as lesson
from real_world.common import check, make_parser, print_heading, run_cli, show
from real_world.digits.data import Digits, load_digits
from real_world.digits.model import build_model
from real_world.training_loop import loops
from real_world.training_loop.losses import cumulative_share, focal_loss
from real_world.training_loop.model import MultiTaskModel, build
from real_world.training_loop.profiling import time_of_a_step

EPOCHS = 20
BATCH_SIZE = 128
Curves = dict[str, list[float]]  # values by label, for the figure


def make_loader(seed: int, *tensors: torch.Tensor) -> DataLoader:
    """Return shuffled mini-batches; the same seed gives the same order."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(*tensors), BATCH_SIZE, shuffle=True, generator=generator)


def epoch_means(values: list[float], epochs: int = EPOCHS) -> list[float]:
    """Return the mean of every epoch's steps."""
    return torch.tensor(values).reshape(epochs, -1).mean(dim=1).tolist()


def summary(losses: list[float], model: nn.Module, digits: Digits) -> str:
    """Return the loss of the last epoch and the test accuracy, as text."""
    _, accuracy = lesson.evaluate(model, digits.X_test, digits.y_test)
    return f"loss {epoch_means(losses)[-1]:.4f}, test accuracy {accuracy:.1%}"


def custom_loss(digits: Digits, seed: int) -> Curves:
    """Return the cumulative shares of cross-entropy and of focal loss."""
    print("\n  1. Custom loss function: focal loss. train_with_focal_loss()")
    X, y = digits.X_train, digits.y_train
    model, optimizer = build(seed, X.device)
    logits = model(X)
    difference = abs(focal_loss(logits, y, gamma=0) - cross_entropy(logits, y)).item()
    check("gamma 0 is cross-entropy", f"difference {difference:.1e}", difference < 1e-6)

    lesson.train(model, make_loader(seed, X, y), cross_entropy, optimizer, epochs=5)
    logits = model(X).detach()
    ce_share = cumulative_share(cross_entropy(logits, y, reduction="none"))
    focal_share = cumulative_share(focal_loss(logits, y, reduction="none"))
    tenth = len(y) // 10 - 1
    shares = f"{focal_share[tenth]:.0%} of focal loss, {ce_share[tenth]:.0%} of cross-entropy"
    check("share of the hardest 10%", shares, focal_share[tenth] > ce_share[tenth])

    model, optimizer = build(seed, X.device)
    losses = lesson.train(model, make_loader(seed, X, y), cross_entropy, optimizer, EPOCHS)
    show("cross-entropy", summary(losses, model, digits))
    model, optimizer = build(seed, X.device)
    losses = loops.train_with_focal_loss(model, make_loader(seed, X, y), optimizer, EPOCHS)
    show("focal loss (another scale)", summary(losses, model, digits))
    return {"cross-entropy": ce_share, "focal loss": focal_share}


def gradient_clipping(digits: Digits, seed: int) -> Curves:
    """Train with SGD at a learning rate that is too high; return the loss of every step."""
    print("\n  2. Gradient clipping: SGD, lr 0.3, pixels from 0 to 16. train_with_clipping()")
    digits = digits._replace(X_train=digits.X_train * 16, X_test=digits.X_test * 16)
    X, y = digits.X_train, digits.y_train
    model, optimizer = build(seed, X.device, torch.optim.SGD, lr=0.3)
    plain = lesson.train(model, make_loader(seed, X, y), cross_entropy, optimizer, EPOCHS)
    check("without clipping", summary(plain, model, digits), epoch_means(plain)[-1] > 2)

    model, optimizer = build(seed, X.device, torch.optim.SGD, lr=0.3)
    clipped, norms = loops.train_with_clipping(
        model, make_loader(seed, X, y), cross_entropy, optimizer, EPOCHS, max_norm=1.0
    )
    check("max_norm 1", summary(clipped, model, digits), epoch_means(clipped)[-1] < 0.1)
    show("steps with a norm above 1", f"{sum(norm > 1 for norm in norms)} of {len(norms)}")

    model = build_model(seed, X.device)
    cross_entropy(model(X), y).backward()
    before = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    after = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of gradients that are clipped
    check("gradient norm", f"{before:.3f} before clipping, {after:.3f} after", after < 1.0001)
    return {"without clipping": plain, "max_norm 1": clipped}


def nan_in_the_data(digits: Digits, seed: int) -> None:
    """Train for one step on data with a NaN, without and with a check of the gradients."""
    print("\n  A NaN in the data")
    X, y = digits.X_train.clone(), digits.y_train
    X[0, 0] = math.nan
    model, optimizer = build(seed, X.device)
    losses = lesson.train(model, [(X, y)], cross_entropy, optimizer, epochs=1)
    all_nan = all(parameter.isnan().all() for parameter in model.parameters())
    check("train() raises no error", f"loss {losses[0]}, every weight is nan", all_nan)
    message = "no error"
    try:
        loops.train_with_clipping(model, [(X, y)], cross_entropy, optimizer, epochs=1)
    except RuntimeError as error:
        message = str(error)
    check("error_if_nonfinite=True", "RuntimeError before the update", "non-finite" in message)


def mixed_precision(digits: Digits, seed: int) -> Curves:
    """Train with clipping, in float32, bfloat16 and float16; return the losses by epoch."""
    print("\n  3. Mixed precision, with gradient clipping. train_mixed_precision()")
    X, y = digits.X_train, digits.y_train
    model, optimizer = build(seed, X.device)
    losses, norms = loops.train_with_clipping(
        model, make_loader(seed, X, y), cross_entropy, optimizer, EPOCHS
    )
    show("float32", summary(losses, model, digits))
    curves = {"float32": epoch_means(losses)}
    for name, amp_dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        model, optimizer = build(seed, X.device)
        losses, amp_norms = loops.train_mixed_precision(
            model, make_loader(seed, X, y), cross_entropy, optimizer, EPOCHS, amp_dtype
        )
        show(name, summary(losses, model, digits))
        curves[name] = epoch_means(losses)
        difference = (torch.tensor(curves[name]) - torch.tensor(curves["float32"])).abs().max()
        check("  loss", f"within {difference:.4f} of float32's", difference < 0.01)
    unscaled = f"{amp_norms[0]:.4f}, in float32 {norms[0]:.4f}"
    check("  gradient norm after unscale_()", unscaled, abs(amp_norms[0] - norms[0]) < 0.01)
    return curves


def multi_task_learning(digits: Digits, seed: int) -> Curves:
    """Train one model for two tasks; return the losses by epoch."""
    print("\n  4. Multi-task learning: the digit, and its ink (mean pixel). train_multi_task()")
    X, y_digit = digits.X_train, digits.y_train
    ink = X.mean(dim=1)
    y_ink = (ink - ink.mean()) / ink.std()
    torch.manual_seed(seed)
    model = MultiTaskModel().to(X.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batches = make_loader(seed, X, y_digit, y_ink)
    losses_digit, losses_ink = loops.train_multi_task(model, batches, optimizer, EPOCHS)
    curves = {"digit": epoch_means(losses_digit), "ink": epoch_means(losses_ink)}
    accuracy = (model(digits.X_test)[0].argmax(dim=1) == digits.y_test).float().mean()
    show("test accuracy of the digit", f"{accuracy:.1%}")
    for name, losses in curves.items():
        change = f"{losses[0]:.4f} in epoch 1, {losses[-1]:.4f} in epoch {EPOCHS}"
        check(f"loss of the {name}", change, losses[-1] < losses[0] / 10)
    return curves


def gradient_accumulation(digits: Digits, seed: int) -> None:
    """Train on mini-batches of 128 and on micro-batches of 16, in float64."""
    print("\n  5. Gradient accumulation, float64: micro-batches of 16. train_with_accumulation()")
    X, y = digits.X_train.cpu().double(), digits.y_train.cpu()  # MPS has no float64
    weights = []
    for train in (lesson.train, loops.train_with_accumulation):
        model = build_model(seed)
        optimizer = torch.optim.Adam(model.double().parameters(), lr=0.01)
        train(model, make_loader(seed, X, y), cross_entropy, optimizer, EPOCHS)
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    difference = (weights[0] - weights[1]).abs().max().item()
    check("weights, 128 at once or 8 x 16", f"differ by {difference:.1e}", difference < 1e-6)


def learning_rate_scheduler(digits: Digits, seed: int) -> Curves:
    """Train at a constant and at a scheduled learning rate; return losses and rates by epoch."""
    print("\n  6. Learning rate scheduler: warm-up, cosine annealing. train_with_scheduler()")
    X, y = digits.X_train, digits.y_train
    model, optimizer = build(seed, X.device, lr=0.2)
    constant = lesson.train(model, make_loader(seed, X, y), cross_entropy, optimizer, EPOCHS)
    show("constant, lr 0.2", summary(constant, model, digits))

    model, optimizer = build(seed, X.device, lr=0.2)
    batches = make_loader(seed, X, y)
    warmup = LinearLR(optimizer, start_factor=0.05, total_iters=20)
    annealing = CosineAnnealingLR(optimizer, T_max=EPOCHS * len(batches) - 20)
    scheduler = SequentialLR(optimizer, [warmup, annealing], milestones=[20])
    scheduled, learning_rates = loops.train_with_scheduler(
        model, batches, cross_entropy, optimizer, EPOCHS, scheduler
    )
    better = epoch_means(scheduled)[-1] < epoch_means(constant)[-1]
    check("scheduled, lr up to 0.2", summary(scheduled, model, digits), better)
    return {
        "constant": epoch_means(constant),
        "scheduled": epoch_means(scheduled),
        "learning rate": epoch_means(learning_rates),
    }


def early_stopping(digits: Digits, seed: int) -> Curves:
    """Train until the validation loss stops decreasing; return the losses by epoch."""
    print("\n  7. Early stopping: patience of 10 epochs. train_with_early_stopping()")
    model, optimizer = build(seed, digits.X_train.device)
    batches = make_loader(seed, digits.X_train, digits.y_train)
    losses, validation_losses = loops.train_with_early_stopping(
        model, batches, cross_entropy, optimizer, 200, digits.X_validation, digits.y_validation
    )
    epochs = len(validation_losses)
    last = f"{validation_losses[-1]:.4f}, stopped after epoch {epochs} of 200"
    check("last validation loss", last, epochs < 200)
    loss, _ = lesson.evaluate(model, digits.X_validation, digits.y_validation)
    lowest = min(validation_losses)
    restored = f"{loss:.4f}, restored from epoch {validation_losses.index(lowest) + 1}"
    check("lowest validation loss", restored, loss == lowest)
    return {"training": epoch_means(losses, epochs), "validation": validation_losses}


def main(argv: list[str] | None = None) -> None:
    args = make_parser("training_loop", "Change and profile the lesson's loop.").parse_args(argv)
    print_heading(
        "Training loop: the lesson's five lines, changed",
        "You control what happens before and after each gradient update.",
    )
    args.output.mkdir(parents=True, exist_ok=True)
    digits = load_digits(args.seed, args.device)
    show("changed lines", "marked with # NEW in real_world/training_loop/loops.py")
    shares = custom_loss(digits, args.seed)
    clipping = gradient_clipping(digits, args.seed)
    nan_in_the_data(digits, args.seed)
    precision = mixed_precision(digits, args.seed)
    tasks = multi_task_learning(digits, args.seed)
    gradient_accumulation(digits, args.seed)
    schedule = learning_rate_scheduler(digits, args.seed)
    stopping = early_stopping(digits, args.seed)
    loader = make_loader(args.seed, digits.X_train, digits.y_train)
    time_of_a_step(digits, loader, args.seed, args.output / "training_loop.trace.json")

    if not args.no_figure:
        from real_world.training_loop.plot import plot_training_loop

        path = args.output / "training_loop.png"
        plot_training_loop(path, shares, clipping, precision, tasks, schedule, stopping)
        print()
        show("figure saved to", path)


if __name__ == "__main__":
    run_cli(main)
