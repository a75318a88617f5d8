"""Commands that the tests of the deploy example run."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "real_world.deploy"]


def run(
    *command: object, input: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository; return its status and what it printed."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, input=input, env=env, capture_output=True, text=True)
