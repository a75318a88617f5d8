"""The lesson and its tests over what they cannot do without."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from real_world.benchmark import ROOT, Entry, alternate, times

FLOOR = """
import sys, torch, numpy
from matplotlib.figure import Figure
model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
optimizer = torch.optim.Adam(model.parameters())
torch.nn.functional.cross_entropy(model(torch.randn(9, 4)), torch.zeros(9).long()).backward()
optimizer.step()
figure = Figure(figsize=(12, 4), dpi=120)
for axes in figure.subplots(1, 3):
    axes.plot([1, 2])
figure.savefig(sys.argv[1] + "/floor.png")
state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
torch.save(state, sys.argv[1] + "/floor.pt")
torch.load(sys.argv[1] + "/floor.pt", weights_only=True)
"""


def measure(quick: bool) -> dict[str, Any]:
    """Run the lesson, its tests and a floor, in turn; return the seconds of each."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "the floor": ["-c", FLOOR, folder],
            "python lesson_code.py": ["lesson_code.py", "--output", folder],
            "pytest test_lesson.py": ["-m", "pytest", "-q", "test_lesson.py"],
        }

        # What the pages need brings plug-ins that pytest would load; the lesson's tests use none.
        alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

        def seconds(words: list[str]) -> float:
            command = [sys.executable, *words]
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, check=True)
            return time.perf_counter() - start

        ways = {name: functools.partial(seconds, words) for name, words in commands.items()}
        return {"from start to end": alternate(ways, 1 if quick else 5, "floor")}


def headline(results: dict[str, Any]) -> str:
    """Return what the README says."""
    floor, script, tests = results["from start to end"].values()
    return f"the script takes {times(script, floor)} as long, its tests {times(tests, floor)}"


ENTRY = Entry("all 16 tests should pass in under 30 seconds on CPU", measure, headline)
