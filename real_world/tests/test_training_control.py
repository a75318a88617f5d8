"""Five lines, and what changing one or two of them does."""

import inspect
import math
import re

import matplotlib.image
import pytest
import torch
from torch import nn

import lesson_code as lesson
from real_world import training_control as control
from real_world.digits import load_digits, untrained

LOOPS = (
    control.train_with_focal_loss,
    control.train_clipped,
    control.train_mixed,
    control.train_two_tasks,
    control.train_accumulating,
)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def loop_lines(function) -> list[str]:
    """Return the lines of a function's loop, from clearing the gradients to keeping the loss."""
    lines = [line.strip() for line in inspect.getsource(function).splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("optimizer.zero_grad()"))
    end = next(i for i, line in enumerate(lines) if line.startswith("losses.append"))
    return lines[start : end + 1]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_all_lines_but_the_marked_are_the_lessons_letter_for_letter(loop):
    lines, original = loop_lines(loop), loop_lines(lesson.train)
    original[-1] = original[-1].split("  #")[0]  # a sixth line, whose comment is train()'s own
    kept = [line for line in lines if not line.endswith("# <-")]
    assert [line for line in original if line in kept] == kept, "the same lines in the same order"
    assert 1 <= len(lines) - len(kept) <= 6
    for step in range(1, 6):
        assert sum(f"# {step}. " in line for line in lines) == 1, "every step is there, once"


def test_focal_loss_is_cross_entropy_at_gamma_0_and_its_formula_elsewhere():
    logits, y = torch.randn(20, 5, dtype=torch.float64) * 3, torch.randint(5, (20,))
    plain = nn.functional.cross_entropy(logits, y)
    torch.testing.assert_close(control.focal_loss(logits, y, gamma=0.0), plain)
    for gamma in (0.5, 2.0, 5.0):
        by_hand = 0.0
        for row, label in zip(logits.tolist(), y.tolist(), strict=True):
            p = math.exp(row[label]) / sum(map(math.exp, row))
            by_hand -= (1 - p) ** gamma * math.log(p) / 20
        assert control.focal_loss(logits, y, gamma).item() == pytest.approx(by_hand)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: control.focal_loss(x, y), logits)
    assert control.focal_loss(logits, y).equal(control.focal_loss(logits, y, gamma=2.0))
    far = torch.tensor([[1000.0, -1000.0]])
    assert control.focal_loss(far, torch.tensor([1])) == 2000, "no overflow"


def test_the_focal_loop_trains_by_its_loss(digits):
    model, optimizer = untrained(0, "cpu")
    expected, _ = untrained(0, "cpu")
    first = control.focal_loss(expected(digits.X), digits.y).item()
    losses = control.train_with_focal_loss(model, digits.X, digits.y, optimizer, 30)
    assert losses[0] == pytest.approx(first)
    by_criterion, optimizer = untrained(0, "cpu")
    again = lesson.train(
        by_criterion,
        [(digits.X, digits.y)],
        criterion=control.focal_loss,
        optimizer=optimizer,
        epochs=30,
    )
    assert losses == again, "the lesson's train() takes it too"


def test_clipping_scales_the_gradients_down_to_the_norm_and_no_smaller_one_up(digits):
    for scale, clipped in ((16, True), (0.01, False)):
        model, _ = untrained(0, "cpu")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        before = [p.detach().clone() for p in model.parameters()]
        norms: list[torch.Tensor] = []
        control.train_clipped(model, digits.X * scale, digits.y, optimizer, 1, norms=norms)
        pairs = zip(model.parameters(), before, strict=True)
        step = torch.cat([((a - b) / 0.5).flatten() for a, b in pairs]).norm().item()
        assert (norms[0].item() > 1) == clipped
        assert step == pytest.approx(1.0 if clipped else norms[0].item(), rel=1e-3)


def test_without_clipping_it_diverges_and_with_it_it_converges(digits, capsys):
    losses = control.compare_clipping(digits, 200)
    assert losses["not clipped"][-1] > 2 > 0.1 > losses["clipped to 1"][-1]
    assert max(losses["not clipped"]) > 10 * losses["not clipped"][0]
    said = capsys.readouterr().out
    assert re.search(r"up to 12\.8; \d+ of 200 clipped", said)
    assert re.search(r"12\.849 before, 1\.000 after +ok", said)


def test_clipping_is_to_the_norm_that_was_asked_for(digits):
    model, _ = untrained(0, "cpu")
    norms = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    control.train_clipped(model, digits.X * 16, digits.y, optimizer, 1, largest=0.5, norms=norms)
    after = nn.utils.get_total_norm([weights.grad for weights in model.parameters()])
    assert norms[0] > 10
    assert after.item() == pytest.approx(0.5, abs=1e-4)


def test_a_scaler_multiplies_the_loss_and_takes_it_out_again_before_the_update(digits, monkeypatch):
    """As on CUDA, but for the format: there it is float16 and the scaler is enabled."""
    calls = []

    class Scaler(torch.amp.GradScaler):
        def scale(self, loss: torch.Tensor) -> torch.Tensor:
            calls.append("scale")
            return super().scale(loss)

        def step(self, optimizer: torch.optim.Optimizer) -> None:
            calls.append("step")
            return super().step(optimizer)

        def update(self) -> None:
            calls.append("update")
            return super().update()

    def scaler(device: str, enabled: bool) -> Scaler:
        asked.append(enabled)
        return Scaler(device, init_scale=1024.0)

    asked = []
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    model, optimizer = untrained(0, "cpu")
    seen = []
    model.fc2.bias.register_hook(lambda gradient: seen.append(gradient.abs().max().item()))
    scaled = control.train_mixed(model, digits.X, digits.y, optimizer, 5)
    assert calls == ["scale", "step", "update"] * 5
    assert asked == [False], "bfloat16 needs none"
    model, optimizer = untrained(0, "cpu")
    plain = lesson.train(model, [(digits.X, digits.y)], nn.CrossEntropyLoss(), optimizer, 5)
    assert scaled == pytest.approx(plain, abs=0.01)
    assert seen[0] > 100 * model.fc2.bias.grad.abs().max()


def test_every_comparison_compares_two_ways(digits):
    for compare in (control.compare_mixed, control.compare_accumulating, control.compare_focal):
        first, second = compare(digits, 20).values()
        assert first != second


def test_mixed_precision_really_computes_in_16_bits_and_stays_near_float32(digits):
    seen = set()
    model, optimizer = untrained(0, "cpu")
    model.fc2.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    mixed = control.train_mixed(model, digits.X, digits.y, optimizer, 200)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "the weights stay whole"
    model, optimizer = untrained(0, "cpu")
    whole = lesson.train(model, [(digits.X, digits.y)], nn.CrossEntropyLoss(), optimizer, 200)
    apart = max(abs(a - b) for a, b in zip(mixed, whole, strict=True))
    assert 0 < apart < 0.01


def test_each_of_two_tasks_is_learnt_and_each_moves_the_trunk(digits):
    ink = digits.X.mean(dim=1)
    for left_out in (None, 0, 1):
        torch.manual_seed(0)
        model = control.TwoTasks()
        for head in (
            (model.digit, model.ink)[left_out : left_out + 1] if left_out is not None else ()
        ):
            nn.init.zeros_(head.weight)
            head.weight.requires_grad_(False)
        before = model.trunk.weight.detach().clone()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = control.train_two_tasks(model, digits.X, (digits.y, ink), optimizer, 20)
        assert not model.trunk.weight.equal(before)
        for task in {0, 1} - {left_out}:
            assert losses[-1][task] < losses[0][task]
    outputs = model(digits.X[:5])
    assert [output.shape for output in outputs] == [(5, 10), (5,)]


@pytest.mark.parametrize("batches", [1, 2, 8, 479])
def test_small_batches_equal_one_large_one_to_the_last_digits(digits, batches):
    X = digits.X.double()
    weights, losses = [], []
    for loop in (control.train_plainly, control.train_accumulating):
        model, _ = untrained(0, "cpu")
        optimizer = torch.optim.Adam(model.double().parameters(), lr=0.01)
        options = {"batches": batches} if loop is control.train_accumulating else {}
        losses.append(loop(model, X, digits.y, optimizer, 10, **options))
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_the_page_prints_what_it_changed_and_draws_it(tmp_path, capsys):
    assert control.main(["--device", "cpu", "--epochs", "100", "--output", str(tmp_path)]) == 0
    transcript = capsys.readouterr().out
    for loop in LOOPS:
        for line in control.changed(loop):
            assert f"    >  {line}\n" in transcript
    assert control.changed(control.train_with_focal_loss) == ["loss = focal_loss(outputs, y)"]
    assert transcript.count(" ok\n") == 9
    drawn = matplotlib.image.imread(tmp_path / "training_control.png")
    assert drawn.shape == (840, 1440, 4)
    with pytest.raises(SystemExit):
        control.main(["--epochs", "99"])
