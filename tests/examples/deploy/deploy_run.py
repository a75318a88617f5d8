"""Commands that the tests of the deploy example run."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
COMMAND = [sys.executable, "-m", "real_world.deploy"]


def run(
    *command: object, input: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository; return its status and what it printed."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, input=input, env=env, capture_output=True, text=True)


def run_example(folder: Path, *options: str) -> str:
    """Run the example without a checkpoint; return what it printed."""
    done = run(*COMMAND, *options, "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"(\[cpuinfo.*\n)*", done.stderr), "nothing but ExecuTorch's log"
    return done.stdout
