"""The pretrained model, which tests download once per clone."""

from pathlib import Path

import filelock
import pytest

import lesson_code as lesson
from real_world.llama.pretrained import download_smollm2


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, where the example saves it too."""
    with filelock.FileLock(lesson.OUTPUT / ".smollm2.lock"):  # test files run in parallel
        return download_smollm2(lesson.OUTPUT)
