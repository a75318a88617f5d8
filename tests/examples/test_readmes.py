"""The index of the examples: every example is in it, its links work, its commands can be copied."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from readmes import REAL_WORLD

ROOT = REAL_WORLD.parent
INDEX = (REAL_WORLD / "README.md").read_text(encoding="utf-8")
EXAMPLES = sorted(path.parent.name for path in REAL_WORLD.glob("*/__main__.py"))
READMES = [ROOT / "README.md", REAL_WORLD / "README.md", *REAL_WORLD.glob("*/README.md")]


def test_index_names_every_example():
    assert INDEX.count("\n") <= 150
    table = INDEX.split("| the article |")[1].split("\n\n")[0]
    assert sorted(set(re.findall(r"\]\((\w+)/README\.md", table))) == EXAMPLES
    root = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"-m real_world\.(\w+)", root)) <= set(EXAMPLES)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_links(readme):
    text = readme.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([\w-]+))?\s*\)", text):
        if target.startswith("http"):
            continue
        path = (readme.parent / target) if target else readme
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{target}#{anchor}"


def test_from_training_to_an_answer(tmp_path):
    """Copy the lines of the index: C++ and HTTP give the same answer, the one that it shows."""
    shutil.copy(ROOT / "lesson_code.py", tmp_path)
    shutil.copytree(REAL_WORLD, tmp_path / "real_world")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    blocks = re.findall(r"```console\n(.*?)```", INDEX, re.DOTALL)
    lines = re.findall(r"^\$ (?:\./setup\.sh )?(?:--all )?(.+)$", "".join(blocks), re.MULTILINE)
    lesson, deploy, predict, serve, curl = lines

    def run(command: str) -> str:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def numbers(text: str) -> list[float]:
        return [float(number) for number in re.findall(r"\d\.\d+", text)]

    run(lesson)
    run(deploy)
    assert numbers(run(predict)) == pytest.approx(numbers(blocks[0]), abs=1e-5)
    with subprocess.Popen(
        f"exec {serve} --port 0", shell=True, cwd=tmp_path, env=environment, stdout=-1, text=True
    ) as server:
        try:
            assert server.stdout is not None
            printed = iter(server.stdout.readline, "")
            address = next(re.search(r"//([\d.:]+)", line) for line in printed if "//" in line)
            answer = run(curl.replace("localhost:8000", address[1]))
        finally:
            server.terminate()
    assert numbers(answer) == pytest.approx(numbers(blocks[1]), abs=1e-5)
    assert numbers(answer) == pytest.approx(numbers(blocks[0]), abs=1e-5)
