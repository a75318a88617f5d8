"""The training_loop example: what each changed loop computes, and which lines it changes."""

import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

import lesson_code as lesson
from real_world.digits.data import load_digits
from real_world.digits.model import build_model
from real_world.training_loop import loops
from real_world.training_loop.losses import focal_loss
from real_world.training_loop.model import MultiTaskModel, build
from real_world.training_loop.profiling import profile_steps

LOOPS = [function for name, function in vars(loops).items() if name.startswith("train_")]
DIGITS = load_digits()
X, Y = DIGITS.X_train[:300], DIGITS.y_train[:300]
BATCHES = list(zip(X.split(128), Y.split(128), strict=True))  # of 128, 128 and 44 samples


def weights(model):
    return parameters_to_vector(model.parameters()).detach()


def loop_lines(function):
    """Return the lines of a loop, from the first of the five to the one that keeps the loss."""
    source = inspect.getsource(function).split("  # without its graph")[0]
    lines = [line.strip() for line in source.splitlines()]
    first = next(i for i, line in enumerate(lines) if "# 1. " in line)
    last = next(i for i, line in enumerate(lines) if line.startswith("losses") and i > first)
    return lines[first : last + 1]


@pytest.mark.parametrize("loop", LOOPS)
def test_lines_without_mark_are_the_lessons(loop):
    lines = loop_lines(loop)
    unmarked = [line for line in lines if not line.endswith("# NEW")]
    assert [line for line in loop_lines(lesson.train) if line in unmarked] == unmarked
    assert re.findall(r"# (\d)\. ", "\n".join(lines)) == list("12345")
    assert "    model.train()" in inspect.getsource(loop)


def test_readme_shows_lines_of_the_loops():
    folder = Path(loops.__file__).parent
    text = (folder / "loops.py").read_text() + (folder / "profiling.py").read_text()
    source = [line.strip() for line in text.splitlines()]
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == len(LOOPS) + 1 == 8
    assert [line for line in "".join(blocks).splitlines() if line.strip() not in source] == []


def test_focal_loss():
    logits, y = 3 * torch.randn(20, 5, dtype=torch.float64), torch.randint(5, (20,))
    torch.testing.assert_close(focal_loss(logits, y, gamma=0.0), cross_entropy(logits, y))
    ignored = y.masked_fill(y == 0, -100)
    torch.testing.assert_close(
        focal_loss(logits, ignored, gamma=0.0), cross_entropy(logits, ignored)
    )
    p = logits.softmax(dim=1)[range(20), y]
    torch.testing.assert_close(focal_loss(logits, y), (-((1 - p) ** 2) * p.log()).mean())
    model, optimizer = build(0)
    losses = loops.train_with_focal_loss(model, BATCHES, optimizer, 3)
    model, optimizer = build(0)
    assert losses == lesson.train(model, BATCHES, focal_loss, optimizer, 3)


@pytest.mark.parametrize("max_norm", [0.1, 100.0])
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
def test_clipping_limits_the_unscaled_gradient(max_norm, amp_dtype):
    model = build_model(0)
    before = weights(model)
    gradient = torch.autograd.grad(cross_entropy(model(X), Y), list(model.parameters()))
    norm = parameters_to_vector(gradient).norm().item()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)  # the update is the gradient
    if amp_dtype is None:
        _, norms = loops.train_with_clipping(model, [(X, Y)], cross_entropy, sgd, 1, max_norm)
    else:
        _, norms = loops.train_mixed_precision(
            model, [(X, Y)], cross_entropy, sgd, 1, amp_dtype, max_norm
        )
    assert norms == [pytest.approx(norm, rel=0.01)]
    assert (weights(model) - before).norm().item() == pytest.approx(min(norm, max_norm), rel=0.01)


def test_nan_is_an_error_or_a_skipped_step_but_not_in_train():
    nan_X = X.clone()
    nan_X[0, 0] = math.nan
    model, optimizer = build(0)
    before = weights(model)
    with pytest.raises(RuntimeError, match="non-finite"):
        loops.train_with_clipping(model, [(nan_X, Y)], cross_entropy, optimizer, 1)
    assert weights(model).equal(before)
    loops.train_mixed_precision(model, [(nan_X, Y)], cross_entropy, optimizer, 1, torch.float16)
    assert weights(model).equal(before)
    lesson.train(model, [(nan_X, Y)], cross_entropy, optimizer, 1)
    assert weights(model).isnan().all()


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_computes_in_16_bits(amp_dtype):
    dtypes = set()
    model, optimizer = build(0)
    model.fc2.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    loops.train_mixed_precision(model, BATCHES, cross_entropy, optimizer, 1, amp_dtype)
    assert dtypes == {amp_dtype}
    assert weights(model).dtype == torch.float32


def test_both_tasks_train_the_shared_layer():
    y_ink = X.mean(dim=1)
    model = MultiTaskModel()
    before = model.fc1.weight.detach().clone()
    logits, ink = model(X)
    losses = [cross_entropy(logits, Y), mse_loss(ink, y_ink)]
    gradients = [torch.autograd.grad(loss, model.fc1.weight, retain_graph=True) for loss in losses]
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    digit, ink = loops.train_multi_task(model, [(X, Y, y_ink)], sgd, 1)
    assert digit + ink == [loss.item() for loss in losses]
    torch.testing.assert_close(before - model.fc1.weight, gradients[0][0] + gradients[1][0])


@pytest.mark.parametrize("micro_batch_size", [7, 50, 128])
def test_accumulation_equals_the_large_batch(micro_batch_size):
    batches = [(X.double(), y) for X, y in BATCHES]
    models = [build_model(0).double() for _ in range(2)]
    sgd = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    expected = lesson.train(models[0], batches, cross_entropy, sgd[0], 3)
    losses = loops.train_with_accumulation(
        models[1], batches, cross_entropy, sgd[1], 3, micro_batch_size
    )
    torch.testing.assert_close(weights(models[1]), weights(models[0]), rtol=0, atol=1e-12)
    assert losses == pytest.approx(expected, abs=1e-12)


def gradients(model):
    return parameters_to_vector([parameter.grad for parameter in model.parameters()])


def count_all_reduce(buckets, bucket):
    buckets.append(bucket.index())
    return allreduce_hook(dist.group.WORLD, bucket)


def accumulate_on_rank(rank, path):
    """Accumulate the gradients of 8 micro-batches with DDP."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    X_double, y = X[:256].double(), Y[:256]
    X_shard, y_shard = X_double.chunk(2)[rank], y.chunk(2)[rank]
    one_process = build_model(0)
    cross_entropy(one_process.double()(X_double), y).backward()
    expected = gradients(one_process)

    buckets = []
    model = DistributedDataParallel(build_model(0).double())
    model.register_comm_hook(buckets, count_all_reduce)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    loops.train_with_accumulation(model, [(X_shard, y_shard)], cross_entropy, sgd, 1)
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=1e-12)
    assert len(buckets) == 8

    dist.destroy_process_group()


def test_accumulation_under_ddp_with_an_all_reduce_per_micro_batch(tmp_path):
    torch.multiprocessing.spawn(accumulate_on_rank, args=(tmp_path / "store",), nprocs=2)


def test_scheduler_is_an_on_step_of_train():
    models = [build_model(0) for _ in range(2)]
    sgd = [torch.optim.SGD(model.parameters(), lr=1.0) for model in models]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2) for optimizer in sgd]
    expected = lesson.train(
        models[0], BATCHES, cross_entropy, sgd[0], 2, lambda step, loss: schedulers[0].step()
    )
    losses, learning_rates = loops.train_with_scheduler(
        models[1], BATCHES, cross_entropy, sgd[1], 2, schedulers[1]
    )
    assert losses == expected
    assert learning_rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_early_stopping_restores_the_best_epoch():
    validation = DIGITS.X_validation, DIGITS.y_validation
    modes = []
    model, optimizer = build(0)
    hook = model.register_forward_pre_hook(lambda model, inputs: modes.append(model.training))
    _, validation_losses = loops.train_with_early_stopping(
        model, BATCHES, cross_entropy, optimizer, 200, *validation, patience=3
    )
    hook.remove()
    assert modes == [True, True, True, False] * len(validation_losses)
    best = validation_losses.index(min(validation_losses)) + 1
    assert len(validation_losses) == best + 3 < 200
    assert lesson.evaluate(model, *validation)[0] == min(validation_losses)
    expected, optimizer = build(0)
    lesson.train(expected, BATCHES, cross_entropy, optimizer, best)
    assert weights(model).equal(weights(expected))


def test_early_stopping_validates_with_the_criterion():
    """A regression: cross-entropy of one output would be 0 in every epoch."""
    model = nn.Linear(64, 1)
    y = X.sum(dim=1, keepdim=True)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    _, validation_losses = loops.train_with_early_stopping(model, [(X, y)], mse_loss, sgd, 20, X, y)
    assert len(validation_losses) == 20
    assert validation_losses[-1] == pytest.approx(mse_loss(model(X), y).item())
    assert validation_losses[-1] < validation_losses[0] / 2


def test_profile_and_trace_have_the_operators_of_every_step(tmp_path):
    result = profile_steps(build_model(0), BATCHES[:2], 10, tmp_path / "trace.json")
    calls = {"aten::addmm": 2, "aten::_log_softmax": 1, "aten::mm": 3, "aten::sqrt": 4}
    assert {name: result.calls[name] for name in calls} == calls
    assert 0 < result.operator_share < 1
    times = result.self_times
    assert times["aten::linear"] < times["aten::addmm"], "without the operators that it calls"
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events]
    assert {name: names.count(name) for name in calls} == {k: 20 * v for k, v in calls.items()}
