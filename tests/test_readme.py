"""The README is right: its tables name what exists, its edits turn red what they say."""

import contextlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import lesson_code as lesson

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LESSON = (ROOT / "lesson_code.py").read_text(encoding="utf-8")
EDIT = re.compile(r"^\| `(.+?)` \| (swapped with )?`(.+?)` \| (`test_.+?`) \| .+ \|$", re.MULTILINE)


def section(title: str) -> str:
    """Return a section of the README."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """Run the lesson on the CPU; return the folder with its files and `printed.txt`."""
    folder = tmp_path_factory.mktemp("lesson")
    command = [sys.executable, ROOT / "lesson_code.py", "--device", "cpu", "--output", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (folder / "printed.txt").write_text(done.stdout)
    return folder


def test_at_most_200_lines():
    assert README.count("\n") <= 200


def test_figure_is_what_the_lesson_plots(output):
    """Except for how another version of a font renders."""
    shown = matplotlib.image.imread(ROOT / "docs" / "lesson.png")
    plotted = matplotlib.image.imread(output / "lesson.png")
    assert shown.shape == plotted.shape
    assert np.abs(shown - plotted).mean() < 0.005


def test_table_of_sections_names_what_exists():
    table = section("The five sections")
    defined = re.findall(r"^def (test_\w+)", (ROOT / "test_lesson.py").read_text(), re.MULTILINE)
    assert re.findall(r"`(test_\w+)`", table) == defined
    columns = re.findall(r"^\| \d\. .+? \| (.*?)\|", table, re.MULTILINE)
    assert len(columns) == 5
    assert all(hasattr(lesson, name) for name in re.findall(r"`(\w+)`", "".join(columns)))


def test_messages_are_those_of_pytorch(output):
    """Each message of the table is printed by the lesson, up to where it is cut short by ..."""
    printed = (output / "printed.txt").read_text()
    rows = re.findall(r"^\| ([^|]+?) \| ", section("Common errors"), re.MULTILINE)[2:]
    if lesson.torch.version.cuda:  # this build says something else of a GPU that is not there
        rows.remove("Torch not compiled with CUDA enabled")
    assert len(rows) >= 8
    for row in rows:
        pattern = re.escape(row).replace(re.escape("..."), ".*")
        assert re.search(f": {pattern}$", printed, re.MULTILINE), row


def run_tests(folder: Path) -> None:
    """Run test_lesson.py with the lesson in a folder, in a new process."""
    os.chdir(folder)
    del sys.modules["lesson_code"]
    with open("printed.txt", "w") as printed, contextlib.redirect_stdout(printed):
        pytest.main(["-q", "--tb=no", "test_lesson.py"])


forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["torch._dynamo", "matplotlib.figure"])  # once for all edits


@pytest.mark.parametrize(("old", "swap", "new", "tests"), EDIT.findall(README))
def test_edit_turns_red_what_the_readme_says(old, swap, new, tests, tmp_path):
    replacement = {old: new, new: old} if swap else {old: new}
    edited = []
    for line in LESSON.splitlines():
        text = line.strip()
        code = text if text in replacement else text.split("  #")[0]
        edited.append(line.replace(code, replacement.get(code, code)) if code else line)
    assert "\n".join(edited) != LESSON.rstrip("\n")
    (tmp_path / "lesson_code.py").write_text("\n".join(edited))
    shutil.copy(ROOT / "test_lesson.py", tmp_path)
    process = forkserver.Process(target=run_tests, args=(tmp_path,))
    process.start()
    process.join()
    printed = (tmp_path / "printed.txt").read_text()
    failed = re.findall(r"^FAILED \S+::(\w+)", printed, re.MULTILINE)
    assert failed == re.findall(r"test_\w+", tests), printed


def test_every_edit_is_tried():
    """A row that EDIT does not match would be left out silently."""
    rows = section("Break it on purpose").count("\n| `")
    assert len(EDIT.findall(README)) == rows >= 12


def test_code_example_works(output):
    code = section("Options").split("```python\n")[1].split("```")[0]
    (output / "checkpoints").mkdir()
    shutil.copy(output / "lesson.pt", output / "checkpoints")
    shutil.copy(ROOT / "lesson_code.py", output)
    done = subprocess.run([sys.executable, "-c", code], cwd=output, capture_output=True, text=True)
    assert done.stdout == "tensor([0])\n", done.stderr


def test_options_are_those_of_the_command_line(capsys):
    with pytest.raises(SystemExit):
        lesson.main(["--help"])
    options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert set(re.findall(r"^\| `(--[a-z-]+)", section("Options"), re.MULTILINE)) == options


def test_files_exist():
    files = re.findall(r"^(\S+) ", section("Files").split("```text\n")[1], re.MULTILINE)
    assert len(files) == 9
    for name in files:
        assert (ROOT / name).exists()
