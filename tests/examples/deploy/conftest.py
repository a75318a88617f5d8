"""What the tests share: one run of the example, its model and its C++ program."""

import re
import signal
from pathlib import Path

import pytest
from deploy_run import COMMAND, run

import lesson_code as lesson

# A background job and nohup ignore these signals, and so would the processes that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def deployed(tmp_path_factory) -> tuple[Path, str]:
    """Run the example without a checkpoint; return its output folder and what it printed."""
    folder = tmp_path_factory.mktemp("deployed")
    done = run(*COMMAND, "--cpp", "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"(\[cpuinfo.*\n)*", done.stderr), "nothing but ExecuTorch's log"
    return folder, done.stdout


@pytest.fixture(scope="session")
def model(deployed) -> lesson.SimpleClassifier:
    return lesson.load_checkpoint(deployed[0] / "lesson.pt")[0].requires_grad_(False)


@pytest.fixture(scope="session")
def predict(deployed) -> list[Path]:
    """Return the command of the C++ program."""
    return [deployed[0] / "cpp" / "predict", deployed[0] / "lesson.pt2"]
