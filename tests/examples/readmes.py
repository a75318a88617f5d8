"""Compare what an example prints with the transcript in its README."""

import re
from pathlib import Path

import pytest

REAL_WORLD = Path(__file__).resolve().parents[2] / "real_world"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def read_lines(text: str) -> list[str]:
    """Return lines without paths and versions, which differ, and with single spaces."""
    lines = [re.sub(r"\S*/\S*|\+c(pu|u\d+)", "", line) for line in text.strip().splitlines()]
    return [re.sub(r"\s+|(?<!\S)-+(?!\S)", " ", line).strip() for line in lines]


def mask(line: str) -> str:
    """Return a line without its numbers, and the signs that depend on them."""
    return re.sub(r"[\s-]+", " ", NUMBER.sub("#", line))


def numbers(line: str) -> list[float]:
    """Return the numbers in a line."""
    return [float(number.replace(",", "")) for number in NUMBER.findall(line)]


def assert_transcript(example: str, printed: str, varying: str = "(?!)") -> None:
    """Assert that the first transcript in a README has the lines that the example printed.

    Their numbers are equal to 1 %, except in lines in which the pattern `varying` is found: there
    they depend on the machine.
    """
    readme = (REAL_WORLD / example / "README.md").read_text(encoding="utf-8")
    transcript = re.search(r"```text\n(.*?)```", readme, re.DOTALL)
    assert transcript is not None
    expected, lines = read_lines(transcript[1]), read_lines(printed)
    assert [mask(line) for line in lines] == [mask(line) for line in expected]
    for line, shown in zip(lines, expected, strict=True):
        if not re.search(varying, shown):
            assert numbers(line) == pytest.approx(numbers(shown), rel=0.01), f"README: {shown}"
