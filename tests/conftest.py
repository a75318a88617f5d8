"""What all tests and the processes that they start inherit."""

import os
import signal
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")  # test files run in parallel, one per core
# torch.compile would compile a test program per instruction set, 8 seconds in a new cache.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# A background job and nohup ignore these signals, and so would the processes that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# After the lesson's set-up alone, `pytest` runs the lesson's sixteen tests.
collect_ignore_glob = []
if find_spec("jupytext") is None:
    collect_ignore_glob = ["*"]
elif find_spec("transformers") is None:
    collect_ignore_glob = ["examples/*"]


def pytest_terminal_summary(terminalreporter):
    if collect_ignore_glob:
        skipped = "tests/" + collect_ignore_glob[0].removesuffix("*")
        command = "./setup.sh --all pip install -r .ci/requirements.txt"
        terminalreporter.write_line(f"{skipped} was skipped; to run it, install: {command}")
