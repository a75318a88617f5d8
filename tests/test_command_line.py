"""lesson_code.py as people run it: wrong options, plain terminals, closed pipes, Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lesson_code as lesson

ROOT = Path(__file__).resolve().parents[1]
LESSON = [sys.executable, str(ROOT / "lesson_code.py")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device cuda", "argument --device: 'cuda' is not available (choose from auto, cpu)"),
        ("--device gpu", "argument --device: 'gpu' is not available (choose from auto, cpu)"),
        ("--epochs 0", "--epochs must be at least 1, and --seed from 0 to 2**32 - 1"),
        (
            "--seed 99999999999999999999999",
            "--epochs must be at least 1, and --seed from 0 to 2**32 - 1",
        ),
        ("--section 6", "argument --section: invalid choice: 6 (choose from 1, 2, 3, 4, 5)"),
    ],
)
def test_wrong_option_is_a_usage_error(options, message, monkeypatch, capsys):
    monkeypatch.setattr(lesson.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(lesson.torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        lesson.main(options.split())
    printed, error = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed == ""
    assert error.startswith("usage: lesson_code.py")
    assert error.endswith(f"lesson_code.py: error: {message}\n")


@pytest.mark.parametrize("output", ["file", "file/folder", "/proc/folder"])
def test_unwritable_output_is_one_line(output, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("precious")
    folder = tmp_path / output
    with pytest.raises(SystemExit) as stopped:
        lesson.main(["--section", "5", "--output", str(folder)])
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert error.startswith("lesson_code.py: ")
    assert error.count("\n") == 1
    assert str(folder) in error
    assert file.read_text() == "precious"


def test_old_pytorch_is_named(monkeypatch):
    monkeypatch.setattr(lesson.torch, "__version__", type(lesson.torch.__version__)("2.2.2"))
    with pytest.raises(AssertionError, match=r"the lesson needs PyTorch 2\.3 or higher"):
        lesson.main(["--section", "1"])


@pytest.mark.parametrize("section", [1, 2, 3, 4, 5])
def test_each_section_runs_alone(section, tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    lesson.main(["--section", str(section), "--output", str(output), "--no-figure"])
    assert re.findall(r"^Section (\d)", capsys.readouterr().out, re.MULTILINE) == [str(section)]
    files = [path.name for path in output.iterdir()] if output.exists() else []
    assert files == (["lesson.pt"] if section == 5 else [])


def test_any_number_of_epochs(tmp_path, capsys):
    """One epoch claims no decrease, and a thousand none beyond the first hundred."""
    lesson.main(["--epochs", "1", "--no-figure", "--output", str(tmp_path)])
    assert "\nepoch    1  loss " in capsys.readouterr().out
    lesson.main(["--section", "4", "--epochs", "1000", "--seed", "2"])
    assert "\nepoch 1000  loss " in capsys.readouterr().out


def test_epochs_and_seed_are_those_of_the_saved_model(tmp_path):
    weights = []
    for seed in ("0", "1"):
        options = ["--epochs", "7", "--seed", seed, "--no-figure", "--output", str(tmp_path)]
        lesson.main(["--section", "5", *options])
        model, _, losses = lesson.load_checkpoint(tmp_path / "lesson.pt")
        assert len(losses) == 7
        weights.append(model.fc1.weight)
    assert not weights[0].equal(weights[1])


def test_run_magic_leaves_the_signals_of_the_kernel(tmp_path):
    """`%run lesson_code.py` in a notebook is a script: a broken pipe must not end the kernel."""
    code = "import runpy, signal, sys; sys.argv = ['lesson_code.py', '--section', '1']; "
    code += f"runpy.run_path({str(LESSON[1])!r}, run_name='__main__'); "
    code += "print(signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "True", done.stderr


def test_loss_that_rises_is_reported_with_its_epoch(monkeypatch):
    adam = lesson.torch.optim.Adam
    monkeypatch.setattr(lesson.torch.optim, "Adam", lambda parameters, lr: adam(parameters, lr=10))
    message = r"in epoch 2, the loss went from 1\.1223 to \d+\.\d{4}"
    with pytest.raises(AssertionError, match=message):
        lesson.main(["--section", "4"])


def test_import_prints_nothing():
    command = [sys.executable, "-c", "import lesson_code"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PYTHONIOENCODING", "ascii"),  # a terminal without UTF-8
        ("MPLBACKEND", "module://matplotlib_inline.backend_inline"),  # `!python` in a notebook
    ],
)
def test_other_environments(variable, value, tmp_path):
    environment = {**os.environ, variable: value}
    command = [*LESSON, "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "lesson.png").exists()


def test_closed_pipe_ends_quietly():
    """As in `python lesson_code.py | head -1`; -u, so that it writes more after that."""
    command = [sys.executable, "-u", *LESSON[1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_ctrl_c_leaves_no_partial_file(tmp_path):
    command = [sys.executable, "-u", *LESSON[1:], "--epochs", "1000000", "--output", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--section", "1", "5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs tests in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while "Section 5" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT
    assert error.endswith("KeyboardInterrupt\n")
    assert list(tmp_path.iterdir()) == []
