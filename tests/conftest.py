"""What all tests and the processes that they start inherit."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # test files run in parallel, one per core

# A background job and nohup ignore these signals, and so would the processes that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
