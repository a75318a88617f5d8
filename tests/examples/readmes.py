"""Compare what an example prints with the transcript in its README."""

import re
from pathlib import Path

REAL_WORLD = Path(__file__).resolve().parents[2] / "real_world"
NUMBER = re.compile(r"[\d,.]*\d(e[-+]?\d+)?")


def mask(text: str) -> list[str]:
    """Return lines without numbers and paths, which differ, and with single spaces."""
    lines = [re.sub(r"\S*/\S*|\+c(pu|u\d+)", "", line) for line in text.splitlines()]
    return [re.sub(r"[\s-]+", " ", NUMBER.sub("#", line)).strip() for line in lines]


def assert_transcript(example: str, printed: str) -> None:
    """Assert that the first transcript in a README has the lines that the example printed."""
    readme = (REAL_WORLD / example / "README.md").read_text(encoding="utf-8")
    transcript = re.search(r"```text\n(.*?)```", readme, re.DOTALL)
    assert transcript is not None
    assert mask(transcript[1].strip()) == mask(printed.strip())
