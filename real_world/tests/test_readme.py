"""The README says what is so: its lines work when copied, and its numbers are those measured."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from real_world import benchmark

ROOT = Path(__file__).resolve().parents[2]
README = benchmark.README.read_text(encoding="utf-8")
NUMBER = re.compile(r"\d[\d,]*(\.\d+)?(e-\d+)?")


@pytest.fixture(scope="module")
def console(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """Run the README's console lines in a copy of the project.

    Returns for each line what stands under it in the README, and what it printed.
    """
    folder = tmp_path_factory.mktemp("clone")
    shutil.copy(ROOT / "lesson_code.py", folder)
    shutil.copytree(ROOT / "real_world", folder / "real_world")
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    blocks = "".join(re.findall(r"```console\n(.*?)```", README, re.DOTALL))
    ran, server, address = {}, None, ""
    try:
        for line, shown in re.findall(r"^\$ (.+)\n((?:[^$].*\n)*)", blocks, re.MULTILINE):
            command = re.sub(r"^\./setup\.sh (--all )?", "", line)
            command = command.replace("localhost:8000", address)
            if "real_world.serve" in command:
                pipes = {"stdout": subprocess.PIPE, "text": True}
                command = f"exec {command} --port 0"  # 8000 may be taken here
                server = subprocess.Popen(
                    ["bash", "-c", command], cwd=folder, env=environment, **pipes
                )
                for said in server.stdout:
                    if found := re.search(r"listening on +http://([\d.:]+)", said):
                        address = found[1]
                        break
                continue
            done = subprocess.run(
                ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            ran[line] = shown, done.stdout
    finally:
        if server:
            server.terminate()
            server.communicate(timeout=30)
    return ran


def test_from_training_to_an_answer_by_copying_lines(console):
    """C++ and curl answer what the README shows, and so the same."""
    answered = {line: both for line, both in console.items() if both[0]}
    assert [line.split()[0] for line in answered] == ["echo", "curl"]
    for shown, printed in answered.values():
        shown, printed = (re.split(r"[\s,\[\]{}:]+", text.strip()) for text in (shown, printed))
        assert len(shown) == len(printed)
        for expected, found in zip(shown, printed, strict=True):
            if NUMBER.fullmatch(expected):
                assert float(found) == pytest.approx(float(expected), abs=1e-5)
            else:
                assert found == expected


def masked(text: str) -> str:
    """Return `text` without its numbers, which are times, sizes and process ids of one run."""
    return re.sub(r" +", " ", NUMBER.sub("#", text.strip()))


@pytest.mark.parametrize(
    ("block", "line"),
    list(
        enumerate(
            [
                "real_world.static_graph",
                "real_world.deploy --cpp",
                "2 -m real_world.distributed",
                "--fsdp load",
                "real_world.training_control",
                "real_world.digits",
            ]
        )
    ),
)
def test_a_transcript_is_what_its_page_prints(console, block, line):
    shown = re.findall(r"```text\n(.*?)```", README, re.DOTALL)[block]
    printed = next(printed for ran, (_, printed) in console.items() if ran.endswith(line))
    assert masked(shown) in masked(printed)


def test_what_was_measured_is_what_the_readme_says():
    results = json.loads(benchmark.RESULTS.read_text())
    assert benchmark.with_results(README, results) == README
    assert results.keys() >= set(benchmark.NAMES) - {"cuda"}
    for name in results:
        picture = benchmark.picture(name)
        assert f"../docs/{picture.name}" in README
        assert picture.exists()
        assert results[name]["machine"]["cores"] >= 1


def test_every_page_stands_in_the_table_of_claims():
    table = README.split("| the article says |")[1].split("\n\n")[0]
    pages = {path.stem for path in (ROOT / "real_world").glob("[!_]*.py")}
    pages |= {"llama", "stable_diffusion"}
    assert pages == set(re.findall(r"\[`(\w+)", table)) - {"benchmark"}
