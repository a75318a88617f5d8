"""Processes and sockets: uvicorn's supervisor, with one socket per worker."""

import contextlib
import errno
import os
import signal
import socket
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker

from uvicorn.supervisors import Multiprocess

from real_world.common import show


def listen(host: str, port: int, shared: bool) -> socket.socket:
    """Return a socket bound to `host` and `port`; raise OSError if that is not possible.

    With `shared`, every worker has a socket of its own, and the kernel spreads connections over
    them. With one socket for all, the worker that wakes up first takes a whole burst.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from None
    return bound


@contextlib.contextmanager
def reserve_port(host: str, port: int) -> Iterator[int]:
    """Keep other servers off a port while the block runs; yield it, or a free one for 0.

    The workers' sockets share the port, so the kernel would let those of another server join.
    Raises OSError if the port is in use.
    """
    with listen(host, port, shared=False) as free:
        address, port = free.getsockname()[:2]
    with socket.socket(socket.AF_UNIX) as lock:
        if sys.platform == "linux":  # an abstract name, which ends with the process
            try:
                lock.bind(f"\0real_world.serve {address} {port}")
            except OSError:
                raise OSError(errno.EADDRINUSE, "Address in use", f"{host}:{port}") from None
        yield port


def announce(label: str, value: object) -> None:
    """Print a line. If the reader, `head` for example, has left, the service goes on."""
    try:
        show(label, value)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Supervisor(Multiprocess):
    """uvicorn's, with a socket for each worker, and a line printed when one is replaced."""

    @property
    def sockets(self) -> list[socket.socket]:
        """The socket of the next worker: uvicorn reads this property once per worker."""
        return [listen(self.config.host, self.config.port, shared=True)]

    @sockets.setter
    def sockets(self, unused: list[socket.socket]) -> None:
        pass

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Start workers with SIGINT blocked: Ctrl-C goes to all, and this process ends them."""
        resource_tracker.ensure_running()  # starting it later would unblock the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for process in self.processes:  # so that the pipe of a dead worker is closed
            process.child_conn.close()

    def init_processes(self) -> None:
        """Start the workers, and wait until their models are warm."""
        with self.starting():
            super().init_processes()
        waiting = list(self.processes)
        while waiting and not self.should_exit.is_set():
            self.handle_signals()
            if not waiting[0].process.is_alive():
                return  # run() replaces it
            if waiting[0].is_ready(timeout=0.5):
                waiting.pop(0)
        if not waiting:
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            announce("worker processes", ", ".join(str(p.pid) for p in self.processes))
            url = f"http://{host}:{self.config.port}"
            announce("ready, listening on", f"{url} (Ctrl-C to stop)")

    def keep_subprocess_alive(self) -> None:
        """Replace each worker that died."""
        before = [process.pid for process in self.processes]
        with self.starting():
            super().keep_subprocess_alive()
        for old, process in zip(before, self.processes, strict=True):
            if process.pid != old:
                announce("worker died", f"{old}, replaced by {process.pid}")
