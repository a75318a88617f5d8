"""The README says what is so: its transcript, its picture, and its table of things to break."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+\.\d+")
ROW = re.compile(r"^\| `(.+?)` \| (swapped with )?`(.+?)` \| `(test_\w+)` \| .+ \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, Path]:
    """Run the lesson as its own process; return what it printed, and the folder it left."""
    folder = tmp_path_factory.mktemp("lesson")
    shutil.copy(ROOT / "lesson_code.py", folder)
    command = [sys.executable, "lesson_code.py", "--device", "cpu"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout, folder


def test_the_transcript_is_what_the_lesson_prints(run):
    """From step 2 on (step 1 is about the machine): letter for letter, decimals to 1 %."""
    shown = README.split("```text\n")[1].split("```")[0]
    printed, shown = (text[text.index("Step 2") :].strip() for text in (run[0], shown))
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    for line, expected in zip(printed.splitlines(), shown.splitlines(), strict=True):
        numbers = [[float(n) for n in NUMBER.findall(text)] for text in (line, expected)]
        np.testing.assert_allclose(*numbers, rtol=0.01, atol=0.01, err_msg=line)


def test_the_picture_is_what_the_lesson_draws(run):
    """Up to how another version of a font rounds."""
    shown = matplotlib.image.imread(ROOT / "docs" / "lesson.png")
    drawn = matplotlib.image.imread(run[1] / "checkpoints" / "lesson.png")
    assert shown.shape == drawn.shape
    assert np.abs(shown - drawn).mean() < 0.005


def test_the_table_of_steps_names_every_test():
    """Each of the sixteen stands in it once."""
    defined = re.findall(r"^def (test_\w+)", (ROOT / "test_lesson.py").read_text(), re.MULTILINE)
    table = README.split("| step |")[1].split("\n\n")[0]
    assert re.findall(r"test_\w+", table) == defined


@pytest.mark.parametrize(("old", "swap", "new", "test"), ROW.findall(README))
def test_breaking_a_line_turns_its_test_red(old, swap, new, test, tmp_path):
    """Apply an edit of the table to a copy of the lesson, and run the test that it names."""
    replacement = {old: new, new: old} if swap else {old: new}
    edited, seen = [], set()
    for line in (ROOT / "lesson_code.py").read_text().splitlines():
        code = line.split("  #")[0].strip()
        seen.add(code)
        edited.append(line.replace(code, replacement.get(code, code)) if code else line)
    assert seen >= replacement.keys(), "the table quotes a line that the lesson no longer has"
    (tmp_path / "lesson_code.py").write_text("\n".join(edited))
    shutil.copy(ROOT / "test_lesson.py", tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"test_lesson.py::{test}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert f"FAILED test_lesson.py::{test}" in done.stdout


def test_the_table_of_things_to_break_is_read_whole():
    """A row that ROW does not match would be left out without a word."""
    table = README.split("## Break it on purpose")[1].split("\n## ")[0]
    assert len(ROW.findall(README)) == table.count("\n| `") >= 8
