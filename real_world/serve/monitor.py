"""The supervisor's view of its workers."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import time

from real_world.common import show
from real_world.serve.metrics import Totals

MAX_SILENT_ROUNDS = 50  # of 0.1 s in which a worker does not report
MAX_DEATHS, PERIOD = 5, 300.0  # end the service if so many workers die in so many seconds


def announce(label: str, value: object) -> None:
    """Print a line; ignore a closed stdout."""
    with contextlib.suppress(OSError):
        show(label, value)


class Monitor:
    """Watches the workers, in a thread of the supervisor; the server replaces those that end.

    It sums what workers counted, kills one that hangs, and reports how one ended.
    """

    def __init__(self, workers: int, url: str) -> None:
        self.workers = workers
        self.url = url
        self.receiver, self.reports = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.receiver.setblocking(False)
        self.reports.setblocking(False)
        self.reports.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)  # 2 KB on macOS
        self.totals = Totals()
        self.children: dict[int | None, multiprocessing.process.BaseProcess] = {}
        self.silent_rounds: dict[int | None, int] = {}  # since a worker's last report
        self.deaths: list[float] = []
        self.ready = False
        self.stopping = False
        self.failed = False

    def run(self) -> None:
        """Watch until the process ends."""
        while True:
            time.sleep(0.1)
            with contextlib.suppress(BlockingIOError):
                while True:
                    pid, self.totals.by_worker[pid] = pickle.loads(self.receiver.recv(2**16))
                    self.silent_rounds[pid] = 0
            if not self.ready and len(self.silent_rounds) == self.workers:
                announce("worker processes", ", ".join(map(str, self.silent_rounds)))
                announce("ready, listening on", f"{self.url} (Ctrl-C to stop)")
                self.ready = True
            self.children.update({child.pid: child for child in multiprocessing.active_children()})
            for pid, child in list(self.children.items()):
                if child.exitcode is not None:
                    del self.children[pid]
                    self.silent_rounds.pop(pid, None)
                    self.on_exit(pid, child.exitcode)
                elif pid in self.silent_rounds:
                    # Rounds, not time: a supervisor that was suspended must not kill its workers.
                    self.silent_rounds[pid] += 1
                    if self.silent_rounds[pid] > MAX_SILENT_ROUNDS:
                        announce("worker hangs, killing it", pid)
                        child.kill()

    def on_exit(self, pid: int | None, exitcode: int) -> None:
        """Print why a worker exited; end the service after too many deaths."""
        if self.stopping:
            return
        reason = f"signal {-exitcode}" if exitcode < 0 else f"exit status {exitcode}"
        announce("worker died", f"{pid}, {reason}")
        now = time.monotonic()
        self.deaths = [*(death for death in self.deaths if now - death < PERIOD), now]
        if not self.ready or len(self.deaths) >= MAX_DEATHS:
            self.failed = True
            os.kill(os.getpid(), signal.SIGTERM)
