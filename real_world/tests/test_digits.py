"""The lesson's network and train(), unchanged, on scanned digits."""

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import lesson_code as lesson
from real_world import digits


@pytest.fixture(scope="module")
def data() -> digits.Digits:
    """Return the digits, split by the default seed."""
    return digits.load_digits()


def test_every_image_is_there_once_and_none_is_on_both_sides(data):
    assert (data.X.shape, data.unseen_X.shape) == ((1437, 64), (360, 64))
    assert (data.X.dtype, data.y.dtype) == (torch.float32, torch.int64)
    assert (data.X.min(), data.X.max()) == (0, 1)
    assert sorted(set(data.y.tolist())) == sorted(set(data.unseen_y.tolist())) == list(range(10))
    everything = torch.cat([data.X, data.unseen_X])
    other = digits.load_digits(seed=1)
    assert not other.unseen_X.equal(data.unseen_X)
    again = torch.cat([other.X, other.unseen_X])
    for both in (everything, again):
        assert both.unique(dim=0).equal(everything.unique(dim=0))
    assert digits.load_digits(seed=1).unseen_X.equal(other.unseen_X)


def test_the_labels_belong_to_the_images(data):
    """Images of one digit are nearer to their own mean than to another's, most of the time."""
    means = torch.stack([data.X[data.y == digit].mean(dim=0) for digit in range(10)])
    nearest = torch.cdist(data.unseen_X, means).argmin(dim=1)
    assert (nearest == data.unseen_y).float().mean() > 0.85


def test_96_of_100_held_out_digits_are_read_right(tmp_path, capsys):
    assert digits.main(["--device", "cpu", "--output", str(tmp_path / "new")]) == 0
    transcript = capsys.readouterr().out
    rows = [line.split() for line in transcript.splitlines() if line.strip().startswith("is ")]
    counts = torch.tensor([[0 if c == "." else int(c) for c in row[2:]] for row in rows])
    assert (counts.shape, counts.sum()) == ((10, 10), 360)
    right = counts.diagonal().sum().item() / 360
    assert right >= 0.96
    assert f"{right:.1%}, chance is 10 %" in transcript

    model, optimizer = digits.untrained(0, "cpu")
    data = digits.load_digits()
    lesson.train(model, [(data.X, data.y)], nn.CrossEntropyLoss(), optimizer, 200)
    expected = torch.zeros(10, 10, dtype=torch.int64)
    for truth, read in zip(data.unseen_y, model(data.unseen_X).argmax(dim=1), strict=True):
        expected[truth, read] += 1
    assert counts.equal(expected)
    drawn = matplotlib.image.imread(tmp_path / "new" / "digits.png")
    assert drawn.shape == (480, 1440, 4)
    assert 0.02 < (drawn[..., :3].min(axis=2) < 0.9).mean() < 0.5, "something is drawn"


def test_the_picture_shows_what_was_misread_and_what_it_is(data, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    predicted = data.unseen_y.clone()
    predicted[[5, 7]] = (predicted[[5, 7]] + 1) % 10
    digits.draw(tmp_path / "x.png", data, predicted, [2.0, 1.0])
    _, grid, *misread = figures[0].axes
    is_and_read = [f"{data.unseen_y[index]}, {predicted[index]}" for index in (5, 7)]
    assert [axes.get_title() for axes in misread if axes.get_title()] == is_and_read
    assert misread[0].images[0].get_array().tolist() == data.unseen_X[5].reshape(8, 8).tolist()
    at = {text.get_position(): text.get_text() for text in grid.texts}
    for index in (5, 7):
        truth, read = data.unseen_y[index].item(), predicted[index].item()
        assert at[read, truth] == "1", "across is what was read"
    assert (grid.get_xlabel(), grid.get_ylabel()) == ("read as", "is")


def test_another_seed_is_another_network():
    first, again, other = (digits.untrained(seed, "cpu")[0].fc1.weight for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


def test_a_network_that_has_learnt_nothing_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(digits, "untrained", lambda seed, device: stuck(seed, device))
    assert digits.main(["--device", "cpu", "--no-figure"]) == 1
    assert "check failed: read right" in capsys.readouterr().err


def stuck(seed: int, device: str) -> tuple[lesson.SimpleClassifier, torch.optim.Optimizer]:
    """Return a network whose optimizer does not move it."""
    model = lesson.SimpleClassifier(64, 128, 10)
    return model, torch.optim.SGD(model.parameters(), lr=0)


def test_the_confusion_matrix_counts_rows_as_truth_and_columns_as_read():
    truth, read = torch.tensor([0, 0, 1, 9]), torch.tensor([0, 3, 1, 0])
    matrix = digits.confusion(read, truth)
    assert matrix.sum() == 4
    assert [matrix[0, 0], matrix[0, 3], matrix[1, 1], matrix[9, 0]] == [1, 1, 1, 1]


@pytest.mark.parametrize("options", [["--epochs", "0"], ["--device", "tpu"], ["--see", "1"]])
def test_a_wrong_option_gets_one_sentence_and_status_2(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        digits.main(options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert (error.startswith("digits: "), error.count("\n")) == (True, 1)
