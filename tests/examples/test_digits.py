"""The digits example: the split of the data, the result, the figure."""

import json
import re
from pathlib import Path

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure
from readmes import assert_transcript
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

import lesson_code as lesson
from real_world.common import CheckFailed
from real_world.digits import __main__ as digits
from real_world.digits.data import load_digits
from real_world.digits.model import build_model
from real_world.digits.plot import plot_digits
from real_world.training import log_losses, one_cycle, read_losses


def test_split_is_a_seeded_partition():
    data, again, other = load_digits(0), load_digits(0), load_digits(1)
    assert [len(part) for part in data] == [1257, 1257, 180, 180, 360, 360]
    assert (data.X_train.min(), data.X_train.max()) == (0, 1)
    assert data.X_test.equal(again.X_test)
    assert not data.X_test.equal(other.X_test)
    images = torch.cat([data.X_train, data.X_validation, data.X_test])
    all_images = torch.cat([other.X_train, other.X_validation, other.X_test])
    assert images.unique(dim=0).equal(all_images.unique(dim=0))


def test_labels_belong_to_their_images():
    data = load_digits()
    means = torch.stack([data.X_train[data.y_train == digit].mean(dim=0) for digit in range(10)])
    for images, y in ((data.X_validation, data.y_validation), (data.X_test, data.y_test)):
        assert (torch.cdist(images, means).argmin(dim=1) == y).float().mean() > 0.85


def test_example_reaches_96_percent_and_overfits(tmp_path, capsys):
    digits.main(["--device", "cpu", "--output", str(tmp_path / "new")])
    output = capsys.readouterr().out
    assert_transcript("digits", output)
    assert float(re.search(r"test accuracy +([\d.]+)%", output)[1]) >= 96
    rows = [line.split() for line in output.splitlines() if re.match(r" +\d+ +\d", line)]
    train_loss, validation_loss = float(rows[-1][1]), float(rows[-1][2])
    lowest = float(re.search(r"lowest validation loss +([\d.]+)", output)[1])
    assert train_loss < 0.1 * lowest < 0.1 * validation_loss
    assert matplotlib.image.imread(tmp_path / "new" / "digits.png").shape == (480, 1440, 4)


def test_losses_and_accuracies_are_those_of_scikit_learn(tmp_path, monkeypatch, capsys):
    data, model = load_digits(), build_model(0)
    monkeypatch.setattr(digits, "build_model", lambda *_: model)  # to keep the trained model
    options = ["--device", "cpu", "--output", str(tmp_path), "--no-figure"]
    digits.main([*options, "--epochs", "1", "--batch-size", "20"])
    printed = capsys.readouterr().out

    def accuracy(X: torch.Tensor, y: torch.Tensor) -> str:
        return f"{accuracy_score(y, model(X).argmax(dim=1)):.1%}"

    loss = log_loss(data.y_validation, model(data.X_validation).detach().double().softmax(dim=1))
    row = re.search(r"^ +1 .*", printed, re.MULTILINE)[0].split()
    assert row[2:] == [f"{loss:.4f}", accuracy(data.X_validation, data.y_validation)]
    shown = re.findall(r"(?:training|test) accuracy +(\S+%)", printed)
    assert shown == [accuracy(data.X_train, data.y_train), accuracy(data.X_test, data.y_test)]


def test_figure_shows_the_labels_in_rows_and_the_predictions_in_columns(monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    data = load_digits()
    predicted = data.y_test.masked_fill(data.y_test == 3, 5)
    plot_digits(Path(), data, predicted, [0.9, 0.5, 0.1], [0.4, 0.3, 0.6])
    losses, confusion, *_ = figures[0].axes
    assert losses.lines[2].get_xdata() == [2, 2], "the epoch of the lowest validation loss"
    counts = data.y_test.bincount().tolist()
    cells = {text.get_position(): int(text.get_text()) for text in confusion.texts}
    assert cells == {(5 if label == 3 else label, label): counts[label] for label in range(10)}


def test_options_change_the_training_and_are_saved(tmp_path, capsys):
    options = ["--device", "cpu", "--output", str(tmp_path), "--no-figure"]
    digits.main([*options, "--epochs", "2", "--batch-size", "100", "--learning-rate", "0.1"])
    config = json.loads((tmp_path / "digits" / "train_config.json").read_text())
    assert config == {"learning_rate": 0.1, "batch_size": 100, "epochs": 2, "seed": 0}
    losses = read_losses(tmp_path / "digits" / "losses.jsonl")
    rows = re.findall(r"^ +[12] +(\d\.\d+)", capsys.readouterr().out, re.MULTILINE)
    means = [sum(losses[:13]) / 13, sum(losses[13:]) / 13]
    assert [float(loss) for loss in rows] == pytest.approx(means, abs=1e-4)
    digits.main([*options, "--epochs", "2", "--batch-size", "100"])
    assert read_losses(tmp_path / "digits" / "losses.jsonl")[0] == losses[0]
    assert read_losses(tmp_path / "digits" / "losses.jsonl")[1] != losses[1], "another lr"


def test_losses_of_an_interrupted_run_are_kept(tmp_path):
    def interrupt(step: int, loss: torch.Tensor) -> None:
        log(step, loss)
        if step == 12:
            assert len(read_losses(path)) == 10, "written while it trains"
            raise KeyboardInterrupt

    data, model, path = load_digits(), build_model(0), tmp_path / "losses.jsonl"
    optimizer = torch.optim.Adam(model.parameters())
    batches = [(data.X_train, data.y_train)]
    with pytest.raises(KeyboardInterrupt), log_losses(path, optimizer) as log:
        lesson.train(model, batches, nn.CrossEntropyLoss(), optimizer, on_step=interrupt)
    assert len(read_losses(path)) == 13
    with log_losses(path, optimizer, first_step=5):
        assert len(read_losses(path)) == 5, "those before are kept, whenever it is killed"


def test_model_that_does_not_learn_fails_the_check(tmp_path, monkeypatch, capsys):
    options = ["--device", "cpu", "--no-figure", "--output", str(tmp_path)]
    digits.main([*options, "--learning-rate", "0", "--epochs", "1"])
    assert re.search(r"test accuracy +[\d.]+%, chance level 10%\n", capsys.readouterr().out)
    monkeypatch.setattr(digits, "train_digits", lambda *_: ([2.0], [2.0]))
    with pytest.raises(CheckFailed, match="test accuracy"):
        digits.main(options)


def test_one_cycle_changes_the_learning_rate_only_and_prints_ten_losses(tmp_path, capsys):
    model, rates, betas = nn.Linear(1, 1), [], set()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    batches = [(torch.ones(1, 1), torch.zeros(1, 1))] * 40

    def record(step: int, loss: torch.Tensor) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        betas.add(optimizer.param_groups[0]["betas"])
        on_step(step, loss)

    with one_cycle("Name", optimizer, 40, tmp_path / "losses.jsonl") as on_step:
        lesson.train(model, batches, nn.MSELoss(), optimizer, epochs=1, on_step=record)
    assert betas == {(0.9, 0.999)}
    assert rates.index(max(rates)) == 3, "after a tenth of the steps"
    assert (rates[0], max(rates)) == pytest.approx((0.1 / 25, 0.1))
    steps = re.findall(r"step +(\d+) +loss", capsys.readouterr().out)
    assert steps == [str(step) for step in range(4, 41, 4)]


def test_training_that_diverges_is_reported_before_it_is_saved(tmp_path):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    batches = [(torch.ones(1, 1), torch.zeros(1, 1))] * 20
    message = "Name: the training diverged; choose a lower learning rate"
    with (
        pytest.raises(CheckFailed, match=message),
        one_cycle("Name", optimizer, 20, tmp_path / "losses.jsonl") as on_step,
    ):
        lesson.train(model, batches, nn.MSELoss(), optimizer, epochs=1, on_step=on_step)
