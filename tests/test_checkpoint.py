"""What an adversary or bad luck does to a checkpoint: it is refused, or loads unchanged."""

import contextlib
import os
import pickle
import random
import resource
import signal
import time
import zipfile

import pytest
import torch
import torch.nn as nn

import lesson_code as lesson


@pytest.fixture
def saved(tmp_path):
    """Return a path with a checkpoint of three epochs, and what was saved."""
    path = tmp_path / "lesson.pt"
    model = lesson.SimpleClassifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batches = [lesson.make_synthetic_data()]
    losses = lesson.train(model, batches, nn.CrossEntropyLoss(), optimizer, epochs=3)
    lesson.save_checkpoint(path, model, optimizer, losses)
    return path, model, optimizer, losses


def test_one_bit_flipped_in_any_byte(saved):
    path, model, optimizer, losses = saved
    content = path.read_bytes()
    expected = repr((model.state_dict(), optimizer.state_dict(), losses))
    refused = 0
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            model, optimizer, losses = lesson.load_checkpoint(path)
        except lesson.CheckpointError:
            refused += 1
        else:
            assert repr((model.state_dict(), optimizer.state_dict(), losses)) == expected
    assert refused > len(content) / 2


class Subclass(lesson.SimpleClassifier):
    """Would come back as its parent, with another activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x).tanh())


class Adam(torch.optim.Adam):
    """Would come back as that of torch.optim."""


def test_what_would_come_back_changed_is_not_saved(saved):
    path, _, _, losses = saved
    content = path.read_bytes()

    def changed(**layers: nn.Module) -> lesson.SimpleClassifier:
        model = lesson.SimpleClassifier()
        for name, layer in layers.items():
            setattr(model, name, layer)
        return model

    buffered = lesson.SimpleClassifier()
    buffered.register_buffer("mean", torch.ones(3))
    extra = lesson.SimpleClassifier()
    extra.scale = nn.Parameter(torch.ones(3))
    frozen, partly_optimized, permuted = (lesson.SimpleClassifier() for _ in range(3))
    frozen.fc1.requires_grad_(False)
    cases = [
        (lesson.SimpleNet(), None),
        (Subclass(), None),
        (changed(relu=nn.Tanh()), None),
        (changed(dropout=nn.Dropout()), None),
        (changed(fc2=nn.Linear(16, 3, bias=False)), None),
        (extra, None),
        (frozen, None),
        (frozen, torch.optim.Adam(frozen.fc2.parameters())),
        (partly_optimized, torch.optim.Adam(partly_optimized.fc2.parameters())),
        (permuted, torch.optim.Adam([*permuted.fc2.parameters(), *permuted.fc1.parameters()])),
        (model := changed(), torch.optim.Adam([{"params": [p]} for p in model.parameters()])),
        (model := changed(), torch.optim.Adam(changed().parameters())),
        (model := changed(), torch.optim.SGD(model.parameters())),
        (model := changed(), Adam(model.parameters())),
    ]
    for model, optimizer in cases:
        optimizer = optimizer or torch.optim.Adam(model.parameters())
        with pytest.raises(lesson.CheckpointError):
            lesson.save_checkpoint(path, model, optimizer, losses)
    with pytest.raises(lesson.CheckpointError, match=r'Unexpected key\(s\) in state_dict: "mean"'):
        lesson.save_checkpoint(path, buffered, torch.optim.Adam(buffered.parameters()), losses)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_other_dtypes_and_settings_come_back(tmp_path):
    model = lesson.SimpleClassifier(5, 7, 2).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3, amsgrad=True)
    X, y = lesson.make_synthetic_data(20, 5, 2)
    lesson.train(model, [(X.double(), y)], nn.CrossEntropyLoss(), optimizer, epochs=2)
    lesson.save_checkpoint(tmp_path / "lesson.pt", model, optimizer, [])
    loaded, loaded_optimizer, _ = lesson.load_checkpoint(tmp_path / "lesson.pt")
    assert repr(loaded.state_dict()) == repr(model.state_dict())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert repr(loaded_optimizer.state_dict()) == repr(optimizer.state_dict())


def test_truncated_anywhere(saved):
    path, *_ = saved
    content = path.read_bytes()
    for size in range(0, len(content), 97):
        path.write_bytes(content[:size])
        with pytest.raises(lesson.CheckpointError, match="cannot load"):
            lesson.load_checkpoint(path)


def test_record_marked_as_a_folder(saved):
    """torch.load would leave that tensor unread, and so full of whatever was in memory."""
    path, *_ = saved
    content = bytearray(path.read_bytes())
    record = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))  # in the archive's index
    content[record + 38] |= 0x10
    path.write_bytes(content)
    with pytest.raises(lesson.CheckpointError, match="a record is corrupted"):
        lesson.load_checkpoint(path)


def test_foreign_files(saved, tmp_path):
    path, model, *_ = saved
    content = torch.load(path)
    foreign = {
        "an empty file": lambda: path.write_bytes(b""),
        "a text": lambda: path.write_text("a text"),
        "a pickle": lambda: path.write_bytes(pickle.dumps([1, 2, 3])),
        "a zip file": lambda: zipfile.ZipFile(path, "w").close(),
        "a list": lambda: torch.save([1, 2, 3], path),
        "a state dict": lambda: torch.save(model.state_dict(), path),
        "a whole model": lambda: torch.save(model, path),
        "other sizes": lambda: torch.save(content | {"sizes": (4, 5, 3)}, path),
        "huge sizes": lambda: torch.save(content | {"sizes": (10**6, 10**9, 3)}, path),
        "no optimizer": lambda: torch.save(content | {"optimizer_state_dict": {}}, path),
    }
    for make in foreign.values():
        make()
        with pytest.raises(lesson.CheckpointError, match=r"cannot load .*lesson\.pt \(\w+: .+\)"):
            lesson.load_checkpoint(path)
    with pytest.raises(lesson.CheckpointError, match="IsADirectoryError"):
        lesson.load_checkpoint(tmp_path)


def test_code_is_not_executed(saved, tmp_path):
    path, *_ = saved
    content = torch.load(path)

    class Malicious:
        def __reduce__(self):
            return (tmp_path / "executed").touch, ()

    for file in (Malicious(), content | {"losses": Malicious()}, {"model_state_dict": Malicious()}):
        torch.save(file, path)
        with pytest.raises(
            lesson.CheckpointError, match="UnpicklingError: Weights only load failed"
        ):
            lesson.load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_failure_while_saving_leaves_the_old_file(saved, tmp_path):
    path, model, optimizer, losses = saved

    class Interrupted:
        def __reduce__(self):
            raise KeyboardInterrupt

    optimizer.state[model.fc1.weight]["interrupted"] = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        lesson.save_checkpoint(path, model, optimizer, losses)
    assert list(tmp_path.iterdir()) == [path]
    assert lesson.load_checkpoint(path)[2] == losses


def test_full_disk_leaves_the_old_file(saved, tmp_path):
    """A limit on the size of files stands in for the disk."""
    path, model, optimizer, losses = saved
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"lesson\.pt|too large"):
            lesson.save_checkpoint(path, model, optimizer, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == [path]
    assert lesson.load_checkpoint(path)[2] == losses


def test_missing_device_is_not_blamed_on_the_file(saved):
    path, *_ = saved
    with pytest.raises(ValueError, match="'cuda:99' is not available"):
        lesson.load_checkpoint(path, "cuda:99")


def test_kill_while_saving_leaves_a_whole_file(saved):
    path, model, optimizer, losses = saved
    start = time.perf_counter()
    lesson.save_checkpoint(path, model, optimizer, losses)
    save_time = time.perf_counter() - start
    for _ in range(50):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(Exception):
                while True:
                    lesson.save_checkpoint(path, model, optimizer, [*losses, 0.0])
                    os.write(writer, b".")
            os._exit(1)
        os.close(writer)
        assert os.read(reader, 1) == b".", "the child cannot save"
        time.sleep(random.uniform(0, 2 * save_time))  # a random moment of one of its next saves
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        assert len(lesson.load_checkpoint(path)[2]) == len(losses) + 1
