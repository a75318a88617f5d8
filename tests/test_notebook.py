"""The notebook and the page are what lesson_code.py builds, and can be read on any screen."""

import copy
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import build_lesson
import nbformat
import numpy as np
import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.fixture(scope="module")
def committed():
    """Return the notebook that is in the repository."""
    return nbformat.read(ROOT / "docs" / "lesson.ipynb", as_version=4)


def printed(cell) -> str:
    """Return what a cell printed."""
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


@pytest.fixture(scope="module")
def executed_twice():
    """Return the notebook as lesson_code.py builds it, each code cell followed by a copy."""
    notebook = build_lesson.read_lesson()
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "code":
            cells.append(copy.deepcopy(cell))
            cells[-1].id += "-again"
    notebook.cells = cells
    return build_lesson.execute(notebook)


def test_notebook_is_up_to_date(committed, executed_twice):
    """Sources are equal, printed numbers to 1 %. If not: python docs/build_lesson.py."""
    built = [cell for cell in executed_twice.cells if not cell.id.endswith("-again")]
    assert [cell.source for cell in built] == [cell.source for cell in committed.cells]
    for cell, expected in zip(built, committed.cells, strict=True):
        if "torch.__version__" in cell.source or "cuda" in cell.source:
            continue  # depends on the machine
        assert NUMBER.sub("#", printed(cell)) == NUMBER.sub("#", printed(expected))
        numbers, expected_numbers = (
            [float(number) for number in NUMBER.findall(printed(each))] for each in (cell, expected)
        )
        np.testing.assert_allclose(numbers, expected_numbers, rtol=0.01, atol=0.01)
    assert any("image/png" in output.get("data", {}) for output in committed.cells[-1].outputs)


def test_cells_can_run_twice(executed_twice):
    """A cell that people run again prints the same: each makes what it changes."""
    again = {c.id.removesuffix("-again"): c for c in executed_twice.cells if "-again" in c.id}
    assert len(again) > 30
    for cell in executed_twice.cells:
        if cell.id in again:
            assert printed(again[cell.id]) == printed(cell), cell.source


def test_notebook_runs_in_the_ipython_of_colab(tmp_path):
    """With Colab's versions of August 2026, and no other file of this project."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "ipython==7.34.0", "ipykernel==6.17.1"]
    subprocess.run(install, check=True)
    (packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    (packages / "lesson.pth").write_text(site.getsitepackages()[0])  # torch, matplotlib, nbclient
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(ROOT / "docs" / "lesson.ipynb", folder)
    execute = [python, "-c", "from nbclient.cli import main; main()", "--inplace", "lesson.ipynb"]
    done = subprocess.run(execute, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(folder / "lesson.ipynb", as_version=4)
    assert any("image/png" in output.get("data", {}) for output in notebook.cells[-1].outputs)


def test_page_is_up_to_date(committed):
    page = (ROOT / "docs" / "lesson.html").read_text(encoding="utf-8")
    assert build_lesson.render(committed) == page
    assert not re.search(r"<(script|link|iframe)\b|src=\"(?!data:)", page)  # nothing is loaded


@pytest.fixture(scope="module")
def browser():
    """Return a headless Chromium."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [1400, 390])
def test_page_fits_the_screen(browser, width):
    """On a wide screen the output is beside the code, on a phone below. Long lines scroll."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto((ROOT / "docs" / "lesson.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    styles = page.eval_on_selector_all(
        "pre",
        "boxes => boxes.map(getComputedStyle).map(s => [s.whiteSpace, s.overflowX, s.fontSize])",
    )
    assert all(style == ["pre", "auto", "13px"] for style in styles), "nothing wraps"
    too_wide = "elements => elements.filter(e => e.scrollWidth > e.clientWidth).length"
    assert page.eval_on_selector_all(".output_wrapper img", too_wide) == 0
    if width == 1400:
        assert page.eval_on_selector_all(".input pre", too_wide) == 0
        table = page.locator(".output_wrapper pre", has_text="iteration")
        assert table.evaluate("table => table.scrollWidth <= table.clientWidth")
    boxes = page.eval_on_selector_all(
        ".code_cell:has(.output_wrapper)",
        "cells => cells.map(cell => [cell.querySelector('.input').getBoundingClientRect(),"
        " cell.querySelector('.output_wrapper').getBoundingClientRect()])",
    )
    assert len(boxes) > 20
    for code, output in boxes:
        if width == 1400:
            assert output["left"] >= code["right"]
            assert output["top"] == code["top"]
        else:
            assert output["top"] >= code["bottom"]
    page.close()
