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
        ("--epochs 0", "argument --epochs: must be at least 1"),
        ("--epochs ten", "argument --epochs: invalid int value: 'ten'"),
        ("--seed 1.5", "argument --seed: invalid int value: '1.5'"),
        ("--section 6", "argument --section: invalid choice: 6 (choose from 1, 2, 3, 4, 5)"),
        ("--section", "argument --section: expected at least one argument"),
        ("--verbose", "unrecognized arguments: --verbose"),
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
    assert lesson.main(["--section", "5", "--output", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lesson_code.py: ")
    assert error.count("\n") == 1
    assert str(folder) in error
    assert file.read_text() == "precious"


def test_old_pytorch_fails_the_first_check(monkeypatch, capsys):
    monkeypatch.setattr(lesson.torch, "__version__", type(lesson.torch.__version__)("2.2.2"))
    assert lesson.main(["--section", "1"]) == 1
    printed, error = capsys.readouterr()
    assert printed.endswith("2.2.2                                      FAILED\n")
    assert error == "lesson_code.py: check failed: torch.__version__ (got 2.2.2)\n"


@pytest.mark.parametrize("section", [1, 2, 3, 4, 5])
def test_each_section_runs_alone(section, tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    assert lesson.main(["--section", str(section), "--output", str(output), "--no-figure"]) == 0
    assert re.findall(r"^Section (\d)", capsys.readouterr().out, re.MULTILINE) == [str(section)]
    files = [path.name for path in output.iterdir()] if output.exists() else []
    assert files == (["lesson.pt"] if section == 5 else [])


def test_any_number_of_epochs(tmp_path, capsys):
    """One epoch claims no decrease, and a thousand none beyond the first hundred."""
    assert lesson.main(["--epochs", "1", "--no-figure", "--output", str(tmp_path)]) == 0
    assert "monotonic decrease" not in capsys.readouterr().out
    assert lesson.main(["--section", "4", "--epochs", "5"]) == 0
    assert re.search(r"monotonic decrease +1\.1223 to 1\.06\d\d +ok", capsys.readouterr().out)
    assert lesson.main(["--section", "4", "--epochs", "1000", "--seed", "2"]) == 0
    assert "  epoch 1000  loss " in capsys.readouterr().out


def test_import_prints_nothing():
    command = [sys.executable, "-c", "import lesson_code"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_terminal_without_utf8(encoding, tmp_path):
    folder = tmp_path / "Ergebnis-\u00fc-\u4e2d"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [*LESSON, "--output", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u4e2d" in done.stdout
    assert (folder / "lesson.png").exists()


def test_settings_of_the_user_do_not_break_the_figure(tmp_path):
    """Those of a notebook that started the script, and of a matplotlibrc that asks for LaTeX."""
    settings = tmp_path / ".config" / "matplotlib"
    settings.mkdir(parents=True)
    (settings / "matplotlibrc").write_text("text.usetex: True\nfont.family: not installed\n")
    environment = {**os.environ, "MPLBACKEND": "not_installed_here", "HOME": str(tmp_path)}
    for unset in ("XDG_CONFIG_HOME", "MATPLOTLIBRC", "MPLCONFIGDIR"):
        environment.pop(unset, None)
    command = [*LESSON, "--section", "5", "--output=~/results"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "results" / "lesson.png").exists()


def test_closed_pipe_ends_quietly():
    with subprocess.Popen(LESSON, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 130


def test_ctrl_c_ends_quietly(tmp_path):
    process = subprocess.Popen(
        [*LESSON, "--section", "1", "5", "--epochs", "1000000", "--output", str(tmp_path)],
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
    assert (process.returncode, error) == (130, "")
    assert list(tmp_path.iterdir()) == []


def test_pause_waits_for_enter():
    command = [*LESSON, "--section", "2", "1", "--pause"]
    done = subprocess.run(command, input="\n\n", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Press Enter to continue") == 2
    assert done.stdout.index("Section 1") < done.stdout.index("Section 2")
