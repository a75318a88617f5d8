"""The notebook and the page are what lesson_code.py builds, and can be read on any screen."""

import re
import shutil
from pathlib import Path

import build_lesson
import jupytext
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


def test_notebook_is_up_to_date(committed):
    """Sources are equal, printed numbers to 1 %. If not: python docs/build_lesson.py."""
    built = build_lesson.execute(build_lesson.read_lesson())
    assert [cell.source for cell in built.cells] == [cell.source for cell in committed.cells]
    for cell, expected in zip(built.cells, committed.cells, strict=True):
        if "torch.__version__" in cell.source or "cuda" in cell.source:
            continue  # depends on the machine
        assert NUMBER.sub("#", printed(cell)) == NUMBER.sub("#", printed(expected))
        numbers, expected_numbers = (
            [float(number) for number in NUMBER.findall(printed(each))] for each in (cell, expected)
        )
        np.testing.assert_allclose(numbers, expected_numbers, rtol=0.01, atol=0.01)
    assert any("image/png" in output.get("data", {}) for output in committed.cells[-1].outputs)


def test_cells_of_the_script_run_in_a_kernel():
    """As VS Code and Spyder run them: in order, each with the output of its section."""
    notebook = build_lesson.execute(jupytext.read(ROOT / "lesson_code.py"))
    sections = [cell for cell in notebook.cells if "\n@section\n" in f"\n{cell.source}"]
    assert len(sections) == 5
    assert all(printed(cell).count(" ok\n") >= 1 for cell in sections)
    assert printed(notebook.cells[-1]) == ""  # the command line does not run


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
    """On a wide screen the output is beside the code, on a phone below; code alone may scroll."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto((ROOT / "docs" / "lesson.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    too_wide = "elements => elements.filter(e => e.scrollWidth > e.clientWidth).length"
    assert page.eval_on_selector_all(".output_wrapper pre, .output_wrapper img", too_wide) == 0
    if width == 1400:
        assert page.eval_on_selector_all("pre", too_wide) == 0
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
