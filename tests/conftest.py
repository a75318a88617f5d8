"""One thread per test process: test files run in parallel, one per core."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
