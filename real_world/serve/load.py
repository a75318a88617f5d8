"""What a worker process runs first; it imports no PyTorch yet."""

import signal
import socket
from typing import Any


def load_app(
    reports: socket.socket, model: bytes, backend: str, device: str, batch_timeout: float
) -> Any:  # noqa: ANN401
    """Return the ASGI application."""
    for signum in (signal.SIGINT, signal.SIGHUP):  # which a terminal sends to all processes
        signal.signal(signum, signal.SIG_IGN)  # the supervisor ends its workers
    from real_world.serve.app import create_app  # takes seconds

    return create_app(reports, model, backend, device, batch_timeout)
