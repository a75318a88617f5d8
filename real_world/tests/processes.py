"""Commands that really run, in processes that a test ends whatever happens."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LIMIT = 120  # seconds, for any run


class Run:
    """A command in a session of its own, with a time limit, that leaves no process behind."""

    def __init__(self, *command: object, **environment: str) -> None:
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.said = ""
        self.timer = threading.Timer(LIMIT, self.kill)
        self.timer.start()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def until(self, pattern: str) -> re.Match:
        """Read on until a line matches."""
        for line in self.process.stdout:
            self.said += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"it ended without {pattern!r}:\n{self.said}")

    def end(self) -> tuple[int, str]:
        """Return the exit status and everything that was said."""
        self.said += self.process.stdout.read()
        return self.process.wait(), self.said

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        self.timer.cancel()
        self.kill()
        self.process.wait()
        self.process.stdout.close()


def torchrun(processes: int, *options: object, program: list) -> tuple[int, str]:
    """Run the page on so many processes; return the exit status and what was said."""
    together = ["--standalone", "--nproc-per-node", processes]
    with Run(*TORCHRUN, *together, *program, *options) as running:
        return running.end()
