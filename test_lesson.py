"""The sixteen tests of step 5: each proves one sentence of the article about `lesson_code.py`.

    pytest test_lesson.py -v

They run on CUDA where there is a GPU, else on the CPU.
"""

import copy
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import lesson_code as lesson

DEVICE = lesson.select_device()


# Step 1: environment


def test_a_device_is_chosen_by_name_or_refused(monkeypatch):
    """The article: "moving tensors between devices", and "CPU-only machines" run everything."""
    moved = torch.ones(2).to(DEVICE)
    assert moved.device.type == DEVICE.type
    assert moved.to(DEVICE) is moved
    assert moved.to("cpu").tolist() == [1, 1]
    elsewhere = torch.device("meta")  # a second device that every machine has, of shapes alone
    lesson.tensor_operations(elsewhere)
    data, (model, _) = lesson.lesson_data(0, elsewhere), lesson.untrained(0, elsewhere)
    assert {tensor.device for tensor in (*data, *model.parameters())} == {elsewhere}

    def offered() -> set[str]:
        names = ("cpu", "cuda", "cuda:0", "cuda:1", "cuda:2", "mps")
        with pytest.raises(ValueError, match="no device 'tpu' on this machine") as refusal:
            lesson.select_device("tpu")
        listed = set(str(refusal.value).split("it has ")[1].split(", ")) - {"auto"}
        for name in listed:
            assert str(lesson.select_device(name)) == name
        for name in {*names} - listed:
            with pytest.raises(ValueError, match=name):
                lesson.select_device(name)
        return listed

    def machine(cuda_gpus: int, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda_gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    machine(cuda_gpus=0, mps=False)
    assert offered() == {"cpu"}
    machine(cuda_gpus=0, mps=True)
    assert offered() == {"cpu", "mps"}
    assert lesson.select_device() == torch.device("cpu")
    machine(cuda_gpus=2, mps=False)
    assert offered() == {"cpu", "cuda", "cuda:0", "cuda:1"}
    assert lesson.select_device() == torch.device("cuda")


# Step 2: tensor operations


@pytest.fixture(scope="module")
def made() -> dict[str, torch.Tensor]:
    """Return the tensors that step 2 makes."""
    return lesson.tensor_operations(DEVICE)


def test_every_tensor_has_a_shape_and_a_dtype(made):
    """The article: "a scalar is a 0-dimensional tensor, a vector is 1-D, a matrix is 2-D"."""
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == {
        **{"scalar": (), "vector": (3,), "x": (2, 2), "images": (8, 3, 32, 32)},
        **{"zeros": (2, 3), "ones": (2, 3), "noise": (100, 100)},
        **{"a": (2, 3), "product": (2, 4), "view": (3, 2), "copy": (6,)},
    }
    assert {tensor.dtype for tensor in made.values()} == {torch.float32}
    assert not made["zeros"].any()
    assert made["ones"].eq(1).all()
    torch.manual_seed(0)
    assert made["noise"].equal(torch.randn(100, 100))
    assert made["x"].tolist() == [[2, 3], [4, 5]], "the article's x, after x.add_(1)"
    assert (made["scalar"].tolist(), made["vector"].tolist()) == (3, [1, 2, 3])


def test_matmul_multiplies_rows_by_columns(made):
    """The article: "torch.matmul(a, b): matrix multiplication, the core of every Linear layer"."""
    assert made["product"].tolist() == [[20, 23, 26, 29], [56, 68, 80, 92]]
    x, linear = torch.randn(5, 4), lesson.SimpleNet().linear
    by_matmul = torch.matmul(x, linear.weight.T) + linear.bias
    torch.testing.assert_close(linear(x), by_matmul)


def test_reshape_shares_memory_unless_it_has_to_copy(made):
    """The article: "reshape without copying data in memory", where the layout allows it."""
    assert made["view"].data_ptr() == made["a"].data_ptr()
    assert made["a"].tolist() == [[100, 1, 2], [3, 4, 5]]
    assert made["copy"].data_ptr() != made["a"].data_ptr()
    assert made["copy"].tolist() == [0, -1, 1, 4, 2, 5]


# Step 3: autograd


def test_the_gradient_of_the_articles_loss_is_minus_18():
    """The article: "print(w.grad)  # tensor(-18.)", by the chain rule "at every node"."""
    w = torch.tensor(2.0, requires_grad=True)
    lesson.article_loss(w).backward()
    assert w.grad == -18
    assert lesson.chain_rule() == [
        ("PowBackward0", "(w * 3 - 9) ** 2", 9, 1),
        ("SubBackward0", "w * 3 - 9", -3, -6),
        ("MulBackward0", "w * 3", 6, -6),
        ("AccumulateGrad", "w", 2, -18),
    ]
    assert lesson.chain_rule(4.0)[-1] == ("AccumulateGrad", "w", 4, 18)
    shared = w.exp()
    names = ["AddBackward0", "SinBackward0", "CosBackward0", "ExpBackward0", "AccumulateGrad"]
    assert lesson.recorded_graph(shared.sin() + shared.cos()) == names, "each node once"


def test_the_graph_follows_the_data_and_its_gradient_is_right():
    """The article: "You can use normal Python control flow directly in your model logic"."""
    recorded = {
        5.0: ["PowBackward0", *["DivBackward0"] * 3, "AccumulateGrad"],
        1.0: ["PowBackward0", "AccumulateGrad"],
        -0.5: ["SinBackward0", "AccumulateGrad"],
        -3.0: ["SinBackward0", *["DivBackward0"] * 2, "AccumulateGrad"],
    }
    for value, names in recorded.items():
        x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        assert lesson.recorded_graph(lesson.follow_the_data(x)) == names
        if value != 1.0:  # where one graph gives way to another, the function has a corner
            assert torch.autograd.gradcheck(lesson.follow_the_data, x)
    assert lesson.follow_the_data(torch.tensor(5.0)) == 0.625**2
    assert lesson.follow_the_data(torch.tensor(0.0)) == 0


def test_descent_by_hand_converges_in_20_iterations():
    """The article: "Running 20 iterations should converge cleanly"."""
    path, losses = lesson.gradient_descent()
    shrink = 1 - 18 * 0.03  # each update multiplies the distance to the minimum by this
    assert path == pytest.approx([3 - shrink**i for i in range(21)], abs=1e-6)
    assert losses == pytest.approx([9 * shrink ** (2 * i) for i in range(21)], abs=1e-5)
    assert lesson.gradient_descent(start=3.0, iterations=2) == ([3, 3, 3], [0, 0, 0])


def test_forgetting_zero_grad_adds_up_gradients_and_never_settles():
    """The article: "If you forget to zero gradients, your updates will be wrong"."""
    w = torch.tensor(2.0, requires_grad=True)
    lesson.article_loss(w).backward()
    lesson.article_loss(w).backward()
    assert w.grad == 2 * -18
    position, accumulated, expected = 2.0, 0.0, [2.0]
    for _ in range(20):
        accumulated += 18 * (position - 3)
        position -= 0.03 * accumulated
        expected.append(position)
    path, _ = lesson.gradient_descent(zero_grad=False)
    assert path == pytest.approx(expected, abs=1e-4)
    assert max(abs(w - 3) for w in path[-10:]) > 1


# Step 4: build and train


def test_assigning_a_layer_registers_its_parameters():
    """The article: "PyTorch uses the class structure to automatically register parameters"."""

    def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    assert shapes(lesson.SimpleNet()) == {"linear.weight": (2, 4), "linear.bias": (2,)}
    weights = {"hidden.weight": (16, 4), "output.weight": (3, 16)}
    assert shapes(lesson.SimpleClassifier()) == weights | {
        "hidden.bias": (16,),
        "output.bias": (3,),
    }
    assert [type(layer) for layer in lesson.SimpleClassifier().children()] == [
        nn.Linear,
        nn.ReLU,
        nn.Linear,
    ]


def test_logits_have_one_row_a_sample_and_one_column_a_class():
    """The article: "implement the forward pass in forward()"; step 5 turns logits into classes."""
    assert lesson.SimpleNet()(torch.randn(3, 4)).shape == (3, 2)
    model = lesson.SimpleClassifier(5, 7, 2).to(DEVICE)
    X = torch.randn(6, 5, device=DEVICE)
    hidden = (X @ model.hidden.weight.T + model.hidden.bias).clamp(min=0)
    logits = hidden @ model.output.weight.T + model.output.bias
    torch.testing.assert_close(model(X), logits)
    assert logits.shape == (6, 2)

    classes, probabilities = lesson.predict(model, X)
    expected = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(probabilities, expected.detach())
    assert classes.equal((logits[:, 1] > logits[:, 0]).long())
    assert not probabilities.requires_grad
    for features in (X.tolist(), X.double().cpu().numpy()):
        assert lesson.predict(model, features)[0].equal(classes)
    wrong_once = torch.cat([classes[:5], 1 - classes[5:]])
    accuracy = lesson.accuracy(model, X, wrong_once)
    assert (type(accuracy), accuracy) == (float, pytest.approx(5 / 6))


def test_the_loss_falls_at_every_one_of_100_epochs():
    """The article: "Print the loss every 10 epochs and confirm it decreases monotonically"."""
    X, y = lesson.make_synthetic_data(device=DEVICE)
    model, _ = lesson.untrained(0, DEVICE)
    before = nn.functional.cross_entropy(model(X), y).item()
    seen = []
    losses = lesson.train(model, X, y, on_epoch=lambda *seen_now: seen.append(seen_now))
    assert len(losses) == 100
    assert lesson.rises(losses) == []
    assert lesson.rises([4, 3, 3, 2, 5]) == [3, 5]
    assert losses[0] == pytest.approx(before)
    assert [(epoch, loss.item()) for epoch, loss in seen] == list(enumerate(losses))
    assert not seen[0][1].requires_grad, "a kept loss must not keep its graph"
    assert lesson.train(model, X, y, epochs=0) == []


def test_every_parameter_is_updated_by_its_own_fresh_gradient():
    """The article: "1. Clear gradients", "4. Backpropagation", "5. Update weights"."""
    X, y = lesson.make_synthetic_data(device=DEVICE)
    model, _ = lesson.untrained(0, DEVICE)
    by_hand, criterion = copy.deepcopy(model), nn.functional.multi_margin_loss
    for _ in range(3):
        parameters = list(by_hand.parameters())
        gradients = torch.autograd.grad(criterion(by_hand(X), y), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert gradient.any()
            parameter.data -= 0.1 * gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lesson.train(model, X, y, criterion=criterion, optimizer=optimizer, epochs=3)
    for parameter, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)


def test_equal_seeds_give_equal_data_and_equal_losses():
    """The article: "torch.randn for features and torch.randint for labels"."""
    X, y = lesson.make_synthetic_data(300, 5, 4, seed=7, device=DEVICE)
    assert (X.shape, X.dtype, y.shape, y.dtype) == ((300, 5), torch.float32, (300,), torch.int64)
    assert X.device.type == y.device.type == DEVICE.type
    assert y.unique().tolist() == [0, 1, 2, 3]
    assert abs(X.mean()) < 0.1
    assert abs(X.std() - 1) < 0.1
    again, other = (lesson.make_synthetic_data(300, 5, 4, seed=seed) for seed in (7, 8))
    assert again[0].equal(X.cpu())
    assert again[1].equal(y.cpu())
    assert not other[0].equal(X.cpu())

    X, y, *fresh = lesson.lesson_data(3, DEVICE)
    training = lesson.make_synthetic_data(seed=3, device=DEVICE)
    unseen = lesson.make_synthetic_data(2000, seed=4, device=DEVICE)
    for tensor, expected in zip((X, y, *fresh), (*training, *unseen), strict=True):
        assert tensor.equal(expected)
    assert (X.shape, y.unique().numel()) == ((100, 4), 3)
    assert lesson.make_synthetic_data()[0].equal(lesson.make_synthetic_data(seed=0)[0])

    def losses(seed: int, default: bool = False) -> list[float]:
        model, optimizer = lesson.untrained(seed, DEVICE)
        chosen = {} if default else {"optimizer": optimizer}
        return lesson.train(model, X, y, epochs=10, **chosen)

    assert losses(3) == losses(3) == losses(3, default=True)
    assert losses(3) != losses(4)


# Step 5: verify, test and demo


def test_the_lesson_runs_and_its_checkpoint_reloads_exactly(tmp_path, capsys, monkeypatch):
    """The article: "a fully trained neural network [...] and a saved model checkpoint"."""
    lesson.trained.cache_clear()
    monkeypatch.chdir(tmp_path)
    options = ["--epochs", "60", "--output", str(tmp_path), "--no-figure"]
    assert lesson.main(options) == 0
    transcript = capsys.readouterr().out
    assert transcript.count(" ok\n") >= 35
    assert re.findall(r"   epoch +(\d+)", transcript) == ["10", "20", "30", "40", "50", "60"]
    for shown in (
        "Div Div Div Pow  ",
        "  Pow  ",
        "  Div Div Sin  ",
        "up to 1.08 away",
        "30 epochs,",
    ):
        assert shown in transcript
    with pytest.raises(lesson.ClaimError, match="2 \\+ 2 is 5"):
        lesson.check("2 + 2 is 5", 4, False)

    path = tmp_path / "lesson.pt"
    kept, fresh_losses = lesson.trained(0, DEVICE, 60)
    loaded = lesson.load_checkpoint(path, DEVICE)
    assert (loaded.epoch, loaded.losses, loaded.sizes) == (60, kept.losses, (4, 16, 3))
    assert len(fresh_losses) == 60
    assert fresh_losses[-1] > 1.2
    X = torch.randn(64, 4, device=DEVICE)
    assert loaded.model(X).equal(kept.model(X))
    optimizer = loaded.optimizer.state_dict()
    assert (optimizer["param_groups"][0]["lr"], optimizer["state"][0]["step"]) == (0.01, 60)
    assert lesson.load_checkpoint(path, "meta").model.output.bias.is_meta

    class Interrupted:
        def __reduce__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lesson.save_checkpoint(
            path, lesson.Checkpoint(kept.model, kept.optimizer, 1, [Interrupted()])
        )
    assert list(tmp_path.iterdir()) == [path], "what was half written is gone"
    assert lesson.load_checkpoint(path).epoch == 60, "and the old checkpoint is whole"


def test_training_resumed_from_a_checkpoint_equals_training_uninterrupted(tmp_path):
    """The article: nn.Module is what lets PyTorch "save and load checkpoints"."""
    X, y = lesson.make_synthetic_data(50, 5, 2, device=DEVICE)
    path = str(tmp_path / "halfway.pt")
    for name, settings in (("Adam", {"lr": 0.02}), ("SGD", {"lr": 0.1, "momentum": 0.9})):
        model = lesson.SimpleClassifier(5, 7, 2).to(DEVICE)
        optimizer = getattr(torch.optim, name)(model.parameters(), **settings)
        losses = lesson.train(model, X, y, optimizer=optimizer, epochs=5)
        lesson.save_checkpoint(path, lesson.Checkpoint(model, optimizer, 5, losses))
        uninterrupted = lesson.train(model, X, y, optimizer=optimizer, epochs=5)

        random_state = torch.get_rng_state()
        resumed = lesson.load_checkpoint(path, DEVICE)
        assert torch.get_rng_state().equal(random_state), "loading draws no random numbers"
        assert resumed.losses == losses
        again = lesson.train(resumed.model, X, y, optimizer=resumed.optimizer, epochs=5)
        assert again == uninterrupted
        for parameter, expected in zip(resumed.model.parameters(), model.parameters(), strict=True):
            assert parameter.equal(expected)


def test_a_bad_checkpoint_is_refused_with_a_sentence_and_never_run(tmp_path, monkeypatch):
    """Not in the article: PyTorch's checkpoints are pickles, and a pickle can run any code."""
    path, trap = tmp_path / "lesson.pt", tmp_path / "trap"
    model, optimizer = lesson.untrained(0, torch.device("cpu"))
    lesson.save_checkpoint(path, lesson.Checkpoint(model, optimizer, 0, []))
    whole = path.read_bytes()
    content = torch.load(path, weights_only=True)
    weights = model.output.weight.detach().numpy().tobytes()
    altered = bytearray(whole)
    altered[whole.index(weights) + 5] ^= 1
    folder = bytearray(whole)  # the archive's index says of a tensor that it is a folder
    folder[whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"/data/0")) + 38] |= 0x10

    class Malicious:
        def __reduce__(self):
            return Path.touch, (trap,)

    def zipped(file: Path) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("readme.txt", "not a checkpoint")

    bad = {
        r"does not exist": [Path.unlink],
        r"cannot be read \(.+\)": [lambda file: (file.unlink(), file.mkdir())],
        r"is empty or no PyTorch file": [
            lambda file: file.write_bytes(b""),
            lambda file: file.write_text("a text"),
            lambda file: file.write_bytes(pickle.dumps(Malicious())),
        ],
        r"is cut short": [lambda file: file.write_bytes(whole[:-100])],
        r"was altered: \S+ does not match its checksum": [
            lambda file: file.write_bytes(altered),
        ],
        r"was altered: a record is marked as a folder": [
            lambda file: file.write_bytes(folder),
        ],
        r"holds more than tensors and plain values; none of it was run": [
            lambda file: torch.save(Malicious(), file),
            lambda file: torch.save(model, file),
        ],
        r"was altered, or is no checkpoint of this lesson": [
            zipped,
            lambda file: torch.save([1, 2, 3], file),
            lambda file: torch.save(model.state_dict(), file),
            lambda file: torch.save(content | {"sizes": (4, 5, 3)}, file),
            lambda file: torch.save(content | {"losses": ["low"]}, file),
            lambda file: torch.save(content | {"epoch": None}, file),
            lambda file: torch.save(content | {"optimizer_class": "lr_scheduler"}, file),
            lambda file: torch.save(content | {"optimizer_class": "Trap"}, file),
        ],
    }
    no_optimizer = type("Trap", (), {"__init__": lambda self, parameters: trap.touch()})
    monkeypatch.setattr(torch.optim, "Trap", no_optimizer, raising=False)
    advice = "'python lesson_code.py --section 5' makes a new one"
    for sentence, makers in bad.items():
        for make in makers:
            path.touch()
            make(path)
            with pytest.raises(lesson.CheckpointError) as refusal:
                lesson.load_checkpoint(path)
            expected = f"{re.escape(str(path))} {sentence}; {re.escape(advice)}"
            assert re.fullmatch(expected, str(refusal.value))
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    assert not trap.exists()
