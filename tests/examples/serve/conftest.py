"""A service with two workers, which the tests of a file share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_run import Server

from real_world.common import load_lesson_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "lesson.pt"
    load_lesson_model(path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_lesson_model(checkpoint)


@pytest.fixture(scope="module")
def server(checkpoint) -> Iterator[Server]:
    with Server("--workers", 2, "--checkpoint", checkpoint) as running:
        yield running
        status, rest = running.stop()
        assert (status, "Traceback" in running.output + rest) == (0, False)
