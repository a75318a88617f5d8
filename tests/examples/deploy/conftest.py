"""Let the tests of interrupted runs send signals."""

import signal

# A background job and nohup ignore these signals, and so would the processes that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
