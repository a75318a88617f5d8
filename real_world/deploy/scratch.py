"""Temporary folders: deleted at the end of a run, or after SIGKILL by the next run."""

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = ".deploy-"


@contextlib.contextmanager
def lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Lock a folder; the end of the process unlocks it.

    Raises BlockingIOError if it is locked and `wait` is False.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_dir(output: Path) -> Iterator[Path]:
    """Create a folder in `output`, from where a file can be moved to `output` atomically."""
    with contextlib.ExitStack() as stack:
        with lock(output, wait=True):  # no other run removes the folder before it is locked
            temporary = tempfile.TemporaryDirectory(
                prefix=PREFIX, dir=output.resolve(), ignore_cleanup_errors=True
            )
            folder = Path(stack.enter_context(temporary))
            stack.enter_context(lock(folder))
        yield folder


def remove_abandoned(output: Path) -> None:
    """Remove the temporary folders of processes that were killed: they are not locked."""
    with lock(output, wait=True):
        for folder in output.glob(f"{PREFIX}*"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), lock(folder):
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def scratch_dir(output: Path) -> Iterator[None]:
    """Keep the temporary files of a run, also those of compilers and libraries, in `output`.

    /tmp may be full, read-only or mounted noexec, and exported code has to be executed. SIGTERM
    and SIGHUP end the run as Ctrl-C does, after the files are deleted.
    """

    def stop(signum: int, frame: object) -> None:
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    remove_abandoned(output)
    with temporary_dir(output) as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            del os.environ["TMPDIR"]
            tempfile.tempdir = None
