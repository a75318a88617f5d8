"""Sixteen tests of lesson_code.py: `pytest test_lesson.py -v`.

Each shows one thing, and how to test it in a project of your own. They run on a CUDA GPU if
available, otherwise on the CPU. `monkeypatch`, `capsys` and `tmp_path` are pytest's fixtures.
"""

import copy
import itertools
import math
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn

import lesson_code as lesson

torch.set_num_threads(1)  # the tensors are small, and on a busy computer, threads wait
DEVICE = lesson.select_device()
CRITERION = nn.CrossEntropyLoss()


def new_model():
    """Return a SimpleClassifier, always with the same weights, and an optimizer for it."""
    torch.manual_seed(0)
    model = lesson.SimpleClassifier().to(DEVICE)
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


# Section 1: environment setup
def test_select_device(monkeypatch):
    """`auto` is CUDA if available. The error for an unavailable one lists the others."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)  # a Mac
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lesson.select_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"'cuda' is not available .*auto, cpu, mps, mps:0\)"):
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
    """The section prints shapes, dtypes, a product, a view and a copy, and two errors."""
    lesson.tensor_operations(DEVICE)
    printed = capsys.readouterr().out
    for lines in (
        "torch.Size([2, 2])\ntorch.float32\ncpu\ndimensions: 0 1 2 3 4\n",
        "zeros and ones: tensor([0., 0., 0.]) tensor([1., 1., 1.])\nnoise: mean -0.01, std 1.00\n",
        "product:\ntensor([[10., 13.],\n        [28., 40.]])\nmatmul(a, a): mat1 and mat2",
        "= 100: tensor(100.)\nafter flat[0] = -1: tensor(-1.) tensor(100.)\n",  # a view, a copy
        f"moved @ moved.T is on {DEVICE}",
        'a.to("cuda") @ a.T: ',
    ):
        assert lines in printed, printed


def test_matmul_is_the_core_of_a_linear_layer():
    net = lesson.SimpleNet()
    x = torch.randn(5, 4)
    by_hand = torch.matmul(x, net.linear.weight.T) + net.linear.bias
    torch.testing.assert_close(net(x), by_hand)


# Section 3: autograd walkthrough
def test_gradient_of_the_articles_loss():
    """d(loss)/dw is -18, and a second backward() adds another -18."""
    w = torch.tensor(2.0, requires_grad=True)
    loss = (w * 3 - 9) ** 2
    assert lesson.recorded_graph(loss)[1:] == ["SubBackward0", "MulBackward0", "AccumulateGrad"]
    loss.backward()
    assert w.grad == -18
    ((w * 3 - 9) ** 2).backward()
    assert w.grad == -36


def test_autograd_walkthrough(capsys):
    """The section prints the gradient, three errors, a table, and graphs that depend on x."""
    lesson.autograd_walkthrough()
    printed = capsys.readouterr().out
    for lines in (
        "tensor(-18.)\ngraph: PowBackward0 SubBackward0 MulBackward0 AccumulateGrad\n",
        "chain rule: -18\nbackward() again: Trying to backward through the graph a",
        "\nw.numpy(): Can't call numpy()",
        "\nw -= ...: a leaf Variable that requires grad is being used in an in-place operation.\n",
        "with w.grad.zero_()       without w.grad.zero_()\niteration        w     loss  gradient  ",
        "        1   2.5400   1.9044   -8.2800   2.5400   1.9044  -26.2800\n",
        "       19   3.0000   0.0000   -0.0000   3.5492   2.7144  -16.1160\n",
        "SGD gives the same 21 values of w: True\n",
        "x = 5.0: PowBackward0 DivBackward0 DivBackward0 DivBackward0 AccumulateGrad\n",
        "x = 0.5: PowBackward0 AccumulateGrad\ngraph for x = -3.0: SinBackward0 DivBackward0 ",
    ):
        assert lines in printed, printed
    rows = re.findall(r"\n +(\d+)(?: +-?\d+\.\d{4}){6}", printed)
    assert rows == ["0", "1", "2", "3", "4", "5", "10", "19"]


def test_gradient_descent_converges():
    """Each of 20 iterations multiplies the distance from 3 by 1 - 0.03 * 18 = 0.46."""
    w, losses, grads = lesson.gradient_descent()
    assert w == pytest.approx([3 - 0.46**i for i in range(21)], abs=1e-6), "w must approach 3"
    assert losses == pytest.approx([(3 * w_i - 9) ** 2 for w_i in w[:20]], abs=1e-5)
    assert grads == pytest.approx([18 * (w_i - 3) for w_i in w[:20]], abs=1e-5)


def test_gradients_accumulate_without_zero_grad():
    """Each gradient is the sum of all gradients so far, so w overshoots 3, again and again."""
    w, _, grads = lesson.gradient_descent(zero_grad=False)
    sums = itertools.accumulate(18 * (w_i - 3) for w_i in w[:20])
    assert grads == pytest.approx(list(sums), abs=1e-3)
    assert min(w[10:]) < 2 < 4 < max(w[10:]), "w must oscillate"


# Section 4: build and train a two-layer network
def test_parameters_are_registered():
    """Assigning a layer to `self` is enough: the optimizer then finds its parameters."""
    assert [tuple(p.shape) for p in lesson.SimpleNet().parameters()] == [(2, 4), (2,)]
    shapes = [tuple(weights.shape) for weights in lesson.SimpleClassifier().parameters()]
    assert shapes == [(16, 4), (16,), (3, 16), (3,)]


def test_forward_predict_and_evaluate():
    """A row of logits per sample: softmax turns it into probabilities, argmax selects a class."""
    model = lesson.SimpleClassifier(5, 7, 2).to(DEVICE)
    X, _ = lesson.make_synthetic_data(6, in_features=5, device=DEVICE)
    hidden = (X @ model.fc1.weight.T + model.fc1.bias).clamp(min=0)  # ReLU
    logits = hidden @ model.fc2.weight.T + model.fc2.bias
    torch.testing.assert_close(model(X), logits, msg="logits are fc2(relu(fc1(X))), no softmax")
    grad_modes = []
    model.register_forward_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    classes, probabilities = lesson.predict(model, X)
    torch.testing.assert_close(probabilities, logits.exp() / logits.exp().sum(dim=1, keepdim=True))
    assert classes.equal((logits[:, 1] > logits[:, 0]).long())
    assert not model.training, "predict() must switch to eval mode"
    assert lesson.predict(model, X[0])[0] == classes[0], "one sample, without a batch dimension"
    model.train()
    one_wrong = torch.cat([classes[:5], 1 - classes[5:]])
    loss, accuracy = lesson.evaluate(model, X, one_wrong)
    assert loss == pytest.approx(CRITERION(logits, one_wrong).item())
    assert accuracy == pytest.approx(5 / 6)
    assert not model.training, "evaluate() must switch to eval mode"
    assert not any(grad_modes), "without torch.no_grad(), each forward pass records a graph"
    with pytest.raises(ValueError, match=r"y must be \(batch,\)"):
        lesson.evaluate(model, X, one_wrong.reshape(6, 1))


def test_same_seed_same_data():
    X, y = lesson.make_synthetic_data(300, 5, 4, seed=7, device=DEVICE)
    assert (X.shape, X.dtype, y.shape, y.dtype) == ((300, 5), torch.float32, (300,), torch.int64)
    assert y.unique().tolist() == [0, 1, 2, 3]
    assert X.std().item() == pytest.approx(1, abs=0.1)
    assert X.device.type == y.device.type == DEVICE.type
    X_again, _ = lesson.make_synthetic_data(300, 5, 4, seed=7)
    assert X_again.equal(X.cpu()), "the data must not depend on the device"
    assert not lesson.make_synthetic_data(300, 5, 4, seed=8)[0].equal(X_again)


def test_loss_decreases_monotonically():
    """For 100 epochs, starting near ln 3, the loss at chance level."""
    model, optimizer = new_model()
    X, y = lesson.make_synthetic_data(device=DEVICE)
    losses = lesson.train(model, [(X, y)], CRITERION, optimizer)
    assert len(losses) == 100
    assert losses[0] == pytest.approx(math.log(3), abs=0.3)
    for epoch, (before, after) in enumerate(itertools.pairwise(losses), start=2):
        assert after < before, f"in epoch {epoch}, the loss went from {before} to {after}"


def test_train_is_gradient_descent_on_every_batch():
    """The five lines, compared with gradients and updates by hand."""
    model, _ = new_model()
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
    assert losses == pytest.approx(expected), "the updates must be those by hand"
    for parameter, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter, other)
    assert [(step, loss.item()) for step, loss in steps] == list(enumerate(losses))
    assert not steps[0][1].requires_grad, "a stored loss must not keep its graph: use detach()"
    assert model.training, "train() must switch to training mode"
    assert lesson.train(model, [], CRITERION, optimizer) == []


def test_build_and_train(capsys):
    """On new samples, random labels are at chance level, and a rule that was learned holds."""
    lesson.build_and_train(DEVICE)
    printed = capsys.readouterr().out
    for lines in (
        "SimpleClassifier(\n  (fc1): Linear(in_features=4, out_features=16, bias=True)\n  (relu)",
        "parameters: 131\nlogits, 5 samples: torch.Size([5, 3])\nregistered: ['linear.weight', ",
        "epoch   10  loss 1.03",
        "epoch  100  loss 0.73",
        "chance level: loss 1.10, accuracy 33%\ntraining samples: loss 0.73, accuracy 66%\n",
        "new samples: loss 1.52, accuracy 34%\nlearned rule, new samples: loss 0.09, accuracy 96%",
        "eval mode: tensor([1., 1., 1., 1.]) tensor([1., 1., 1., 1.])\nfloat64 features: mat1 and",
        "int64, up to 3: Target 3 is out of bounds.\nsoftmax twice: tensor(0.5514)\n",
    ):
        assert lines in printed, printed
    assert printed.count("\nepoch ") == 10
    first, second = re.findall(r"training mode: (.*\)) (.*)", printed)[0]
    assert first != second, "in training mode, dropout is random"


# Section 5: verify, test and demo
def test_checkpoint_reloads_and_resumes(tmp_path):
    """Five epochs, saved, loaded, and five more give exactly the same as ten."""
    model = lesson.SimpleClassifier(5, 7, 2).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    X, y = lesson.make_synthetic_data(50, 5, 2, device=DEVICE)
    losses = lesson.train(model, [(X, y)], CRITERION, optimizer, epochs=5)
    path = tmp_path / "model.pt"
    lesson.save_checkpoint(path, model, optimizer, [np.float64(loss) for loss in losses])
    random_state = torch.get_rng_state()
    loaded, loaded_optimizer, loaded_losses = lesson.load_checkpoint(path, DEVICE)
    assert torch.get_rng_state().equal(random_state), "loading must not draw random numbers"
    assert loaded_losses == losses
    assert lesson.predict(loaded, X)[1].equal(lesson.predict(model, X)[1])
    more = lesson.train(model, [(X, y)], CRITERION, optimizer, epochs=5)
    resumed = lesson.train(loaded, [(X, y)], CRITERION, loaded_optimizer, epochs=5)
    assert resumed == more, "training must resume exactly"
    optimizer.param_groups[0]["lr"] = np.float64(0.01)  # no plain number: refused on loading
    with pytest.raises(lesson.CheckpointError, match="cannot load"):
        lesson.save_checkpoint(path, model, optimizer, losses)
    model.relu = nn.Tanh()  # the file has weights only: it would come back with a ReLU
    with pytest.raises(lesson.CheckpointError, match="saves only a SimpleClassifier"):
        lesson.save_checkpoint(path, model, optimizer, losses)
    assert lesson.load_checkpoint(path)[2] == losses, "the old file must be unchanged"
    assert list(tmp_path.iterdir()) == [path], "no temporary file may be left"


def test_bad_checkpoint_is_refused(tmp_path):
    """A checkpoint is a pickle, and a pickle can run code: load only tensors and plain values."""
    path = tmp_path / "model.pt"
    model, optimizer = new_model()
    lesson.save_checkpoint(path, model, optimizer, [])
    saved = path.read_bytes()
    corrupted = bytearray(saved)
    weights = model.fc2.weight.detach().cpu().numpy().tobytes()
    corrupted[saved.index(weights)] ^= 1  # one bit of a weight

    class Malicious:
        def __reduce__(self):
            return (tmp_path / "executed").touch, ()

    for make_bad in (
        path.unlink,  # missing
        lambda: path.write_bytes(saved[:-100]),  # truncated
        lambda: path.write_bytes(corrupted),
        lambda: torch.save(model.state_dict(), path),  # not a checkpoint of this lesson
        lambda: torch.save(Malicious(), path),
    ):
        make_bad()
        with pytest.raises(lesson.CheckpointError, match=r"cannot load .*model\.pt \(\w+: .+\)"):
            lesson.load_checkpoint(path)
    assert not (tmp_path / "executed").exists(), "loading a file must not run code"


def test_lesson_runs(tmp_path, capsys):
    """The whole lesson runs, and saves a model that predicts which of three features is largest."""
    output = tmp_path / "new" / "folder"
    lesson.main(["--output", str(output)])
    printed = capsys.readouterr().out
    assert re.findall(r"\nSection (\d)\n", printed) == ["1", "2", "3", "4", "5"]
    for line in (
        f"torch.__version__ = '{torch.__version__}'",
        f"torch.cuda.is_available() = {torch.cuda.is_available()}\ndevice = {DEVICE!r}",
        "same predictions: True\nnew samples: loss 0.11, accuracy 95%",
        f"saved {output / 'lesson.png'}\nsame losses: True\nwhole model: Weights only load failed",
    ):
        assert f"\n{line}\n" in printed, printed
    assert printed.count(": class ") == 4
    assert (output / "lesson.png").stat().st_size > 10_000
    model, _, _ = lesson.load_checkpoint(output / "lesson.pt")
    X = torch.tensor([[0.5, -1.2, 0.3, 0.8], [-0.9, 0.1, 1.5, -2.0]])
    assert lesson.predict(model, X)[0].tolist() == [0, 2]
    lesson.main(["--section", "4", "5", "--epochs", "1", "--output", str(output)])
    for wrong in (["--epochs", "0"], ["--device", "gpu"], ["--section", "6"], ["--seed", "-1"]):
        with pytest.raises(SystemExit, match="2"):
            lesson.main(wrong)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v"]))
