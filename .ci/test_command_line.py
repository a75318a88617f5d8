"""The lesson as people run it: wrong options, poor terminals, closed pipes, Ctrl-C and kill -9."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lesson_code as lesson  # noqa: E402

LESSON = [sys.executable, str(ROOT / "lesson_code.py")]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--device cuda", "no device 'cuda' on this machine; it has auto, cpu"),
        ("--device gpu", "no device 'gpu' on this machine; it has auto, cpu"),
        ("--epochs 0", "'0' is not a whole number from 1 to"),
        ("--epochs -5", "'-5' is not a whole number from 1 to"),
        ("--epochs ten", "'ten' is not a whole number from 1 to"),
        ("--epochs 1.5", "'1.5' is not a whole number from 1 to"),
        ("--seed -1", "'-1' is not a whole number from 0 to"),
        ("--section 6", "invalid choice: 6 (choose from 1, 2, 3, 4, 5)"),
        ("--section two", "invalid int value: 'two'"),
        ("--section", "expected at least one argument"),
        ("--output {file}", "cannot write in the folder {file} (File exists)"),
        ("--output {file}/below", "cannot write in the folder {file}/below (Not a directory)"),
        ("--output /proc/none", "cannot write in the folder /proc/none"),
        ("--verbose", "unrecognized arguments: --verbose"),
    ],
)
def test_a_wrong_option_gets_one_sentence_and_status_2(
    options, sentence, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "file"
    file.write_text("precious")
    monkeypatch.setattr(lesson.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        lesson.main(options.format(file=file).split())
    printed, error = capsys.readouterr()
    assert stopped.value.code == 2
    assert (printed, error.count("\n")) == ("", 1)
    assert error.startswith("lesson_code.py: ")
    assert sentence.format(file=file) in error
    assert file.read_text() == "precious"


def test_an_old_pytorch_gets_a_sentence_and_status_1(monkeypatch, capsys):
    old = type(lesson.torch.__version__)("2.2.2")
    monkeypatch.setattr(lesson.torch, "__version__", old)
    assert lesson.main(["--section", "1"]) == 1
    assert "PyTorch 2.2.2 is too old: the lesson needs 2.3" in capsys.readouterr().err


def test_a_claim_that_does_not_hold_gets_a_sentence_and_status_1(monkeypatch, capsys):
    monkeypatch.setattr(lesson, "article_loss", lambda w: (w * 3 - 8) ** 2)
    assert lesson.main(["--section", "3"]) == 1
    printed, error = capsys.readouterr()
    assert printed.endswith("NOT SO\n")
    assert error == (
        "lesson_code.py: this should hold and does not: loss = (w * 3 - 9) ** 2 at w = 2 (4.0)\n"
    )


@pytest.mark.parametrize("section", [1, 2, 3, 4, 5])
def test_each_section_runs_alone(section, tmp_path, capsys):
    lesson.trained.cache_clear()
    output = tmp_path / "new" / "folder"
    assert lesson.main(["--section", str(section), "--output", str(output), "--no-figure"]) == 0
    headings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Step")]
    assert len(headings) == 1
    assert headings[0].startswith(f"Step {section}")
    assert output.exists() == (section == 5)


def test_longer_training_says_where_the_loss_rose(tmp_path, capsys):
    assert lesson.main(["--section", "4", "--epochs", "1000", "--seed", "2"]) == 0
    assert re.search(
        r"and rose later +at \d+ of 900 epochs, first at \d+\n", capsys.readouterr().out
    )
    assert lesson.main(["--epochs", "1", "--no-figure", "--output", str(tmp_path)]) == 0


def test_without_pytorch_it_says_how_to_get_it():
    command = [sys.executable, "-S", LESSON[1]]  # no site-packages
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("lesson_code.py: no numpy here; run it as ./setup.sh")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_utf8_is_enough(encoding, tmp_path):
    folder = tmp_path / "Ergebnis-\u00fc-\u4e2d"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [*LESSON, "--section", "5", "--output", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u4e2d" in done.stdout
    assert (folder / "lesson.png").stat().st_size > 10_000


def test_a_reader_that_closes_the_pipe_early_ends_it_quietly():
    with subprocess.Popen(LESSON, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 141


def test_ctrl_c_gets_one_word_and_status_130(tmp_path):
    command = [*LESSON, "--section", "5", "--epochs", "1000000", "--output", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs tests in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while "five-line loop" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, error) == (130, "lesson_code.py: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answers", ["\n", ""])
def test_pause_waits_for_enter_and_takes_no_answer_for_one(answers):
    command = [*LESSON, "--section", "2", "1", "--section", "1", "--pause"]
    done = subprocess.run(command, input=answers, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Enter shows the next step") == 1
    assert done.stdout.index("Step 1") < done.stdout.index("Step 2")


def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "lesson.pt"
    model, optimizer = lesson.untrained(0, lesson.torch.device("cpu"))
    lesson.save_checkpoint(path, lesson.Checkpoint(model, optimizer, 0, []))
    saved = 0
    for _ in range(200):
        child = os.fork()
        if child == 0:
            for epoch in range(10**6):
                lesson.save_checkpoint(path, lesson.Checkpoint(model, optimizer, epoch + 1, []))
        time.sleep(random.uniform(0, 0.01))  # the moment of the kill is what is random here
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved += lesson.load_checkpoint(path).epoch > 0
    assert saved > 100
