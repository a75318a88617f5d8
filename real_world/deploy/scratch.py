"""Where temporary files are: in the output folder, and no run leaves them behind."""

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def scratch_dir(output: Path) -> Iterator[None]:
    """Keep the temporary files of a run, also those of compilers and libraries, in `output`.

    /tmp may be full, read-only or mounted noexec, and exported code has to be executed. SIGTERM
    and SIGHUP end the run as Ctrl-C does, after the files are deleted; those that SIGKILL left are
    deleted here.
    """

    def stop(signum: int, frame: object) -> None:
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # by nohup
        signal.signal(signal.SIGHUP, stop)
    descriptor = os.open(output, os.O_RDONLY)
    try:  # the end of a process unlocks it
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another run in {output}", file=sys.stderr)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    folder = output.resolve() / ".deploy"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        del os.environ["TMPDIR"]
        tempfile.tempdir = None
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)
