"""What an adversary or bad luck does to a checkpoint: it is refused, or loads unchanged."""

import os
import pickle
import random
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
    model, optimizer = lesson.build_model(0, "cpu")
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


def test_what_could_not_be_loaded_is_not_saved(saved):
    path, model, _, losses = saved
    content = path.read_bytes()
    one_layer = torch.optim.Adam(model.fc2.parameters())
    two_groups = torch.optim.Adam([{"params": [p]} for p in model.parameters()])
    for optimizer in (one_layer, two_groups):
        with pytest.raises(lesson.CheckpointError, match="parameter group"):
            lesson.save_checkpoint(path, model, optimizer, losses)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


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
        "no optimizer": lambda: torch.save(content | {"optimizer": "lr_scheduler"}, path),
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


def test_kill_while_saving_leaves_a_whole_file(saved):
    path, model, optimizer, losses = saved
    saves = 0
    for _ in range(100):
        child = os.fork()
        if child == 0:
            for epoch in range(10**6):
                lesson.save_checkpoint(path, model, optimizer, [*losses, float(epoch)])
        time.sleep(random.uniform(0, 0.01))  # the moment of the kill is what is random here
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saves += len(lesson.load_checkpoint(path)[2]) > 3
    assert saves > 50
