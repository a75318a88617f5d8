"""Sixteen tests of lesson_code.py: `pytest test_lesson.py -v`.

They are grouped by section. Each shows one thing that the article says, and is an example of how to
test it in a project of your own. They run on a CUDA GPU if available, otherwise on the CPU.
"""

import copy
import math

import pytest
import torch
import torch.nn as nn

import lesson_code as lesson

DEVICE = lesson.select_device()
CRITERION = nn.CrossEntropyLoss()


# Section 1: environment setup


def test_select_device(monkeypatch):
    """`auto` is CUDA if available; an unavailable device is refused, and the others are listed."""
    assert torch.ones(2, device=DEVICE).device.type == DEVICE.type
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)  # a Mac
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lesson.select_device("auto") == torch.device("cpu")
    assert lesson.select_device("mps") == torch.device("mps")
    with pytest.raises(ValueError, match=r"'cuda' is not available .*auto, cpu, mps\)"):
        lesson.select_device("cuda")

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)  # two NVIDIA GPUs
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert lesson.select_device() == torch.device("cuda")
    assert lesson.select_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"'cuda:2' .*auto, cpu, cuda, cuda:0, cuda:1\)"):
        lesson.select_device("cuda:2")


# Section 2: tensor operations


def test_tensor_operations(capsys):
    """The section prints the article's shape and dtype, and passes its 11 checks."""
    lesson.tensor_operations(lesson.DEFAULTS)
    printed = capsys.readouterr().out
    assert printed.startswith("torch.Size([2, 2])\ntorch.float32\ncpu\n")
    assert "[0, 1, 2, 3, 4] dimensions" in printed
    assert "tensor([[20., 23., 26., 29.],\n        [56., 68., 80., 92.]])" in printed
    assert f"a @ a.T, on {DEVICE.type}" in printed
    assert printed.count(" ok\n") == 11


def test_matmul_is_the_core_of_a_linear_layer():
    x = torch.randn(5, 4)
    linear = lesson.SimpleNet().linear
    by_hand = torch.matmul(x, linear.weight.T) + linear.bias
    torch.testing.assert_close(linear(x), by_hand)


# Section 3: autograd walkthrough


def test_gradient_of_the_articles_loss():
    """d(loss)/dw is -18, and a second backward() adds another -18."""
    w = torch.tensor(2.0, requires_grad=True)
    loss = (w * 3 - 9) ** 2
    names = ["PowBackward0", "SubBackward0", "MulBackward0", "AccumulateGrad"]
    assert lesson.recorded_graph(loss) == names
    loss.backward()
    assert w.grad == -18
    ((w * 3 - 9) ** 2).backward()
    assert w.grad == -36


def test_autograd_walkthrough(capsys):
    """The section prints the value and the gradient of every tensor, and a table of the descent."""
    lesson.autograd_walkthrough(lesson.DEFAULTS)
    printed = capsys.readouterr().out
    assert printed.startswith("tensor(-18.)\n")
    rows = [line.split() for line in printed.splitlines()]
    assert ["loss", "9", "1", "PowBackward0"] in rows
    assert ["difference", "-3", "-6", "SubBackward0"] in rows
    assert ["product", "6", "-6", "MulBackward0"] in rows
    assert ["w", "2", "-18", "AccumulateGrad"] in rows
    assert ["2", "2.5400", "1.9044", "-8.2800", "2.5400", "1.9044", "-26.2800"] in rows
    assert ["20", "3.0000", "0.0000", "-0.0000", "3.5492", "2.7144", "-16.1160"] in rows
    assert "x = 0.5: PowBackward0 AccumulateGrad\n" in printed
    assert printed.count(" ok\n") == 6


def test_gradient_descent_converges():
    """Each of 20 iterations multiplies the distance from 3 by 1 - 0.03 * 18 = 0.46."""
    w, losses, grads = lesson.gradient_descent()
    assert w == pytest.approx([3 - 0.46**i for i in range(21)], abs=1e-6)
    assert losses == pytest.approx([(3 * w_i - 9) ** 2 for w_i in w[:20]], abs=1e-5)
    assert grads == pytest.approx([18 * (w_i - 3) for w_i in w[:20]], abs=1e-5)
    assert abs(w[-1] - 3) < 1e-6


def test_gradients_accumulate_without_zero_grad():
    w, _, grads = lesson.gradient_descent(zero_grad=False)
    sums = [sum(18 * (w_i - 3) for w_i in w[: i + 1]) for i in range(20)]
    assert grads == pytest.approx(sums, abs=1e-3)
    assert max(w[10:]) > 4  # it still oscillates
    assert min(w[10:]) < 2


def test_graph_depends_on_the_data():
    """A while loop and an if decide which operations are recorded."""
    graphs = {
        5.0: ["PowBackward0", "DivBackward0", "DivBackward0", "DivBackward0", "AccumulateGrad"],
        1.0: ["PowBackward0", "AccumulateGrad"],
        -0.5: ["SinBackward0", "AccumulateGrad"],
        0.0: ["SinBackward0", "AccumulateGrad"],
    }
    for value, names in graphs.items():
        x = torch.tensor(value, requires_grad=True)
        assert lesson.recorded_graph(lesson.data_dependent(x)) == names
    assert lesson.data_dependent(torch.tensor(5.0)) == 0.625**2
    assert lesson.data_dependent(torch.tensor(-3.0)) == torch.tensor(-0.75).sin()


# Section 4: build and train a two-layer network


def test_parameters_are_registered():
    """Assigning a layer to `self` is enough: the optimizer then finds its parameters."""
    names = [name for name, _ in lesson.SimpleNet().named_parameters()]
    assert names == ["linear.weight", "linear.bias"]
    model = lesson.SimpleClassifier()
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    assert shapes == [(16, 4), (16,), (3, 16), (3,)]
    assert [type(layer) for layer in model.children()] == [nn.Linear, nn.ReLU, nn.Linear]


def test_forward_predict_and_evaluate():
    """A row of logits per sample: softmax turns it into probabilities, argmax selects a class."""
    model = lesson.SimpleClassifier(5, 7, 2).to(DEVICE)
    X, _ = lesson.make_synthetic_data(6, in_features=5, device=DEVICE)
    hidden = (X @ model.fc1.weight.T + model.fc1.bias).clamp(min=0)  # ReLU
    logits = hidden @ model.fc2.weight.T + model.fc2.bias
    torch.testing.assert_close(model(X), logits)
    assert logits.shape == (6, 2)

    grad_modes = []
    model.register_forward_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    classes, probabilities = lesson.predict(model, X)
    torch.testing.assert_close(probabilities, logits.exp() / logits.exp().sum(dim=1, keepdim=True))
    assert classes.equal((logits[:, 1] > logits[:, 0]).long())
    assert not model.training  # eval mode
    model.train()
    one_wrong = torch.cat([classes[:5], 1 - classes[5:]])
    loss, accuracy = lesson.evaluate(model, X, one_wrong)
    assert loss == pytest.approx(CRITERION(logits, one_wrong).item())
    assert accuracy == pytest.approx(5 / 6)
    assert not model.training
    assert grad_modes == [False, False]


def test_same_seed_same_data_and_model():
    X, y = lesson.make_synthetic_data(300, 5, 4, seed=7, device=DEVICE)
    assert (X.shape, X.dtype) == ((300, 5), torch.float32)
    assert (y.shape, y.dtype) == ((300,), torch.int64)
    assert y.unique().tolist() == [0, 1, 2, 3]
    assert abs(X.mean()) < 0.1
    assert abs(X.std() - 1) < 0.1
    assert X.device.type == y.device.type == DEVICE.type
    X_again, y_again = lesson.make_synthetic_data(300, 5, 4, seed=7)
    assert X_again.equal(X.cpu())
    assert y_again.equal(y.cpu())
    X_other, _ = lesson.make_synthetic_data(300, 5, 4, seed=8)
    assert not X_other.equal(X_again)
    weights = [lesson.build_model(seed, DEVICE)[0].fc1.weight for seed in (7, 7, 8)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])
    assert weights[0].device.type == DEVICE.type


def test_loss_decreases_monotonically():
    """For 100 epochs, starting near ln 3, the loss of a random guess."""
    X, y = lesson.make_synthetic_data(device=DEVICE)
    model, optimizer = lesson.build_model(0, DEVICE)
    assert optimizer.param_groups[0]["lr"] == 0.01
    losses = lesson.train(model, [(X, y)], CRITERION, optimizer)
    assert len(losses) == 100
    assert losses[0] == pytest.approx(math.log(3), abs=0.3)
    assert all(losses[i + 1] < losses[i] for i in range(99))
    assert losses[-1] < 0.75


def test_train_is_gradient_descent_on_every_batch():
    """The five lines, compared with gradients and updates by hand."""
    model, _ = lesson.build_model(0, DEVICE)
    by_hand = copy.deepcopy(model)
    X, y = lesson.make_synthetic_data(device=DEVICE)
    batches = [(X[:60], y[:60]), (X[60:], y[60:])]
    expected = []
    for X, y in batches * 3:
        loss = CRITERION(by_hand(X), y)
        expected.append(loss.item())
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient

    model.eval()
    steps = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = lesson.train(model, batches, CRITERION, optimizer, 3, lambda *step: steps.append(step))
    assert losses == pytest.approx(expected)
    for parameter, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter, other)
    assert [(step, loss.item()) for step, loss in steps] == list(enumerate(losses))
    assert not steps[0][1].requires_grad  # a stored loss must not keep its graph in memory
    assert model.training
    assert lesson.train(model, [], CRITERION, optimizer) == []


# Section 5: verify, test and demo


def test_checkpoint_reloads_and_resumes(tmp_path):
    """Five epochs, saved, loaded, and five more give exactly the same as ten."""
    batches = [lesson.make_synthetic_data(50, 5, 2, device=DEVICE)]
    path = tmp_path / "model.pt"
    for optimizer_class, settings in ((torch.optim.Adam, {}), (torch.optim.SGD, {"momentum": 0.9})):
        model = lesson.SimpleClassifier(5, 7, 2).to(DEVICE)
        optimizer = optimizer_class(model.parameters(), lr=0.02, **settings)
        losses = lesson.train(model, batches, CRITERION, optimizer, epochs=5)
        lesson.save_checkpoint(path, model, optimizer, losses)
        random_state = torch.get_rng_state()
        loaded, loaded_optimizer, loaded_losses = lesson.load_checkpoint(path, DEVICE)
        assert torch.get_rng_state().equal(random_state)  # loading draws no random numbers
        assert loaded_losses == losses
        assert lesson.predict(loaded, batches[0][0])[1].equal(
            lesson.predict(model, batches[0][0])[1]
        )
        more = lesson.train(model, batches, CRITERION, optimizer, epochs=5)
        assert lesson.train(loaded, batches, CRITERION, loaded_optimizer, epochs=5) == more
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left


def test_bad_checkpoint_is_refused(tmp_path):
    """A checkpoint is a pickle, and a pickle can run code: load only tensors and plain values."""
    path = tmp_path / "model.pt"
    model, optimizer = lesson.build_model(0, "cpu")
    lesson.save_checkpoint(path, model, optimizer, [])
    saved = path.read_bytes()
    corrupted = bytearray(saved)
    corrupted[saved.index(model.fc2.weight.detach().numpy().tobytes())] ^= 1  # one bit of a weight

    class Malicious:
        def __reduce__(self):
            return (tmp_path / "executed").touch, ()

    bad_files = {
        "missing": path.unlink,
        "truncated": lambda: path.write_bytes(saved[:-100]),
        "corrupted": lambda: path.write_bytes(corrupted),
        "not ours": lambda: torch.save(model.state_dict(), path),
        "malicious": lambda: torch.save(Malicious(), path),
    }
    for make_bad in bad_files.values():
        make_bad()
        with pytest.raises(lesson.CheckpointError, match=r"cannot load .*model\.pt \(\w+: .+\)"):
            lesson.load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_lesson_runs(tmp_path, capsys, monkeypatch):
    """The whole lesson passes its checks; a check that fails stops it with status 1."""
    output = tmp_path / "new" / "folder"
    assert lesson.main(["--epochs", "60", "--seed", "0", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    counts = [printed.count(text) for text in ("\nSection ", " ok\n", "\n  epoch ", "\n  class ")]
    assert counts == [5, 26, 6, 4]  # one ok for each check()
    assert printed.count("\n    -> ") == 14 + torch.cuda.is_available()  # mistakes
    assert "  fc1.weight  (16, 4)\n  fc1.bias    (16,)\n" in printed
    assert "  epoch   60  loss 0.83" in printed
    assert "  training accuracy " in printed
    assert f"saved {output / 'lesson.png'}\n" in printed
    assert (output / "lesson.png").stat().st_size > 10_000
    model, _, losses = lesson.load_checkpoint(output / "lesson.pt")
    assert len(losses) == 60
    assert lesson.evaluate(model, *lesson.make_synthetic_data())[0] < losses[-1]

    for wrong_option in (["--epochs", "0"], ["--device", "gpu"], ["--section", "6"]):
        with pytest.raises(SystemExit):
            lesson.main(wrong_option)
    monkeypatch.setattr(lesson, "SimpleNet", lambda: nn.Linear(4, 5))
    assert lesson.main(["--section", "4"]) == 1
    assert "check failed: SimpleNet, 3 samples" in capsys.readouterr().err
    with pytest.raises(lesson.CheckFailed), lesson.mistake(ValueError, "", "no error is raised"):
        pass
    with pytest.raises(ValueError, match="other words"), lesson.mistake(ValueError, "some", ""):
        raise ValueError("other words")
