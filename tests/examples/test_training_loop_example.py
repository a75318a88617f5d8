"""The training_loop example: its figures, its checks, its transcript."""

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from readmes import assert_transcript
from sklearn.metrics import accuracy_score
from torch import nn

import lesson_code as lesson
from real_world.common import CheckFailed
from real_world.digits.data import load_digits
from real_world.digits.model import build_model
from real_world.training_loop import __main__ as training_loop
from real_world.training_loop import loops, profiling
from real_world.training_loop.__main__ import (
    custom_loss,
    early_stopping,
    gradient_accumulation,
    gradient_clipping,
    learning_rate_scheduler,
    mixed_precision,
    multi_task_learning,
    nan_in_the_data,
)
from real_world.training_loop.losses import cumulative_share, focal_loss
from real_world.training_loop.model import MultiTaskModel, build
from real_world.training_loop.profiling import StepProfile, print_profiles, profile_steps

DIGITS = load_digits()
X, Y = DIGITS.X_train[:300], DIGITS.y_train[:300]
BATCHES = list(zip(X.split(128), Y.split(128), strict=True))  # of 128, 128 and 44 samples


def test_figures_worked_out_by_hand():
    assert cumulative_share(torch.tensor([3.0, 1.0, 4.0])) == [0.5, 0.875, 1.0]
    assert training_loop.epoch_means([1.0, 2.0, 3.0, 4.0, 5.0, 9.0], epochs=2) == [2.0, 6.0]
    model = build_model(0)
    accuracy = accuracy_score(DIGITS.y_test, model(DIGITS.X_test).argmax(dim=1))
    losses = [5.0] * 38 + [1.0, 2.0]
    expected = f"loss 1.5000, test accuracy {accuracy:.1%}"
    assert training_loop.summary(losses, model, DIGITS) == expected


def test_learning_rate_of_the_first_and_the_last_epoch():
    rates = learning_rate_scheduler(DIGITS, seed=0)["learning rate"]
    warm_up = [0.2 * (0.05 + 0.95 * step / 20) for step in range(10)]
    annealing = [0.1 * (1 + math.cos(math.pi * step / 180)) for step in range(170, 180)]
    assert rates[0] == pytest.approx(sum(warm_up) / 10)
    assert rates[-1] == pytest.approx(sum(annealing) / 10, rel=1e-4)


def test_accuracy_of_one_task_of_two(monkeypatch, capsys):
    torch.manual_seed(0)
    model = MultiTaskModel()
    monkeypatch.setattr(training_loop, "MultiTaskModel", lambda: model)
    multi_task_learning(DIGITS, seed=0)
    accuracy = accuracy_score(DIGITS.y_test, model(DIGITS.X_test)[0].argmax(dim=1))
    assert f"test accuracy of the digit       {accuracy:.1%}\n" in capsys.readouterr().out


def test_times_of_a_profile(capsys):
    times, calls = {"aten::mm": 5.0, "aten::sqrt": 1.0, "aten::view": 3.0}, {"aten::mm": 3}
    column = StepProfile(step_time=10, profiled_time=20, self_times=times, calls=calls)
    assert column.operator_share == 0.45
    print_profiles({"a": column, "b": StepProfile(30, 40, {}, {"aten::mm": 2})})
    rows = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[1:] for row in rows] == [
        ["5", "0"],  # aten::mm
        ["3", "0"],  # other operators: aten::view, and aten::sqrt with no calls is listed
        ["11", "40"],  # between operators
        ["20", "40"],
        ["10", "30"],
    ]
    assert rows[0][0].split()[-2:] == ["aten::mm", "3"]


def wrong_focal_loss(logits, y, gamma=2.0, reduction="mean"):
    return 1.01 * focal_loss(logits, y, gamma, reduction)


def focal_loss_without_gamma(logits, y, gamma=2.0, reduction="mean"):
    return focal_loss(logits, y, 0.0, reduction)


def no_clipping(parameters, max_norm, **options):
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])


def low_learning_rate(seed, device, optimizer, lr):
    return build(seed, device, optimizer, lr / 100)


def no_training(*args, **kwargs):
    return [math.nan]


AMP = "train_mixed_precision"


def wrong_amp(wrong_dtype, loss=1.0, norm=1.0):
    """Return train_mixed_precision(), which multiplies losses or norms with one dtype."""
    train = loops.train_mixed_precision

    def broken(model, batches, criterion, optimizer, epochs, amp_dtype):
        losses, norms = train(model, batches, criterion, optimizer, epochs, amp_dtype)
        if amp_dtype == wrong_dtype:
            return [loss * value for value in losses], [norm * value for value in norms]
        return losses, norms

    return broken


def constant_loss(outputs, y):
    return 1.0 + 0.0 * outputs.sum()


def small_batches(model, batches, *args):
    for X, y in batches:
        lesson.train(model, zip(X.split(16), y.split(16), strict=True), *args[:2], 1)


def constant_rate(model, batches, criterion, optimizer, epochs, scheduler):
    optimizer.param_groups[0]["lr"] = 0.2
    return lesson.train(model, batches, criterion, optimizer, epochs), []


no_patience_limit = partial(loops.train_with_early_stopping, patience=200)


def profile_one_epoch(model, batches, epochs, *args, **kwargs):
    return profile_steps(model, batches, 1, *args, **kwargs)


def step_times(digits, seed):
    profiling.time_of_a_step(digits, BATCHES[:2] * 5, seed, Path("trace.json"))


@pytest.mark.parametrize(
    ("part", "check", "module", "name", "broken"),
    [
        (custom_loss, "gamma 0 is", training_loop, "focal_loss", wrong_focal_loss),
        (custom_loss, "share of the", training_loop, "focal_loss", focal_loss_without_gamma),
        (gradient_clipping, "without clipping", training_loop, "build", low_learning_rate),
        (gradient_clipping, "max_norm 1", loops, "clip_grad_norm_", no_clipping),
        (gradient_clipping, "gradient norm", nn.utils, "clip_grad_norm_", no_clipping),
        (nan_in_the_data, r"train\(\) raises", lesson, "train", no_training),
        (nan_in_the_data, "error_if_nonfinite", loops, "clip_grad_norm_", no_clipping),
        (mixed_precision, "  loss", loops, AMP, wrong_amp(torch.bfloat16, loss=1.5)),
        (mixed_precision, "  loss", loops, AMP, wrong_amp(torch.float16, loss=1.5)),
        (mixed_precision, "  gradient norm", loops, AMP, wrong_amp(torch.float16, norm=65_536)),
        (multi_task_learning, "loss of the digit", loops, "cross_entropy", constant_loss),
        (multi_task_learning, "loss of the ink", loops, "mse_loss", constant_loss),
        (gradient_accumulation, "weights", loops, "train_with_accumulation", small_batches),
        (learning_rate_scheduler, "scheduled", loops, "train_with_scheduler", constant_rate),
        (early_stopping, "last", loops, "train_with_early_stopping", no_patience_limit),
        (early_stopping, "lowest", loops, "copy", SimpleNamespace(deepcopy=lambda state: state)),
        (step_times, "two linear layers", profiling, "profile_steps", profile_one_epoch),
    ],
)
def test_broken_part_fails_its_check(part, check, module, name, broken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(CheckFailed, match=f"check failed: {check}"):
        part(DIGITS, 0)


def test_example(tmp_path, capsys):
    training_loop.main(["--device", "cpu", "--output", str(tmp_path / "new")])
    printed = capsys.readouterr().out
    assert printed.count(" ok\n") == 17
    # Rounding and speed; with the largest learning rate, the accuracy of one image.
    varying = r"differ by|within|lr up to|of the time|aten::|operators|profiler"
    assert_transcript("training_loop", printed, varying)
    figure = matplotlib.image.imread(tmp_path / "new" / "training_loop.png")
    assert figure.shape == (840, 1440, 4)
