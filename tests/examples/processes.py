"""Commands that a test runs as processes of their own, and ends whatever happens."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 120  # seconds, for anything that is waited for


def run(*command: object, input: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository; return its status and what it printed."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        input=input,
        capture_output=True,
        text=True,
    )


@contextlib.contextmanager
def start(*command: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command during a `with` block, and kill it with its children at the end."""
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end of a process; return its exit status and its output."""
    output, _ = process.communicate(timeout=TIME_LIMIT)
    return process.returncode, output


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + TIME_LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def children(process: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of a process's children."""
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in listing.read_text().split()]


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
