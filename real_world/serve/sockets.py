"""Ports, Unix domain sockets, and how many connections a worker can keep."""

import errno
import resource
import socket
from pathlib import Path

from real_world.common import CheckFailed, show

MAX_CONNECTIONS = 10_000  # per worker
OTHER_FILES = 100  # that a worker opens, or the supervisor for its workers


def reserve_port(host: str, port: int) -> socket.socket:
    """Bind a port (a free one if it is 0), so that no second service takes it.

    Raises CheckFailed if it is in use. Keep the socket, which does not listen, until the end.
    """
    try:
        reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind((host, port))
    except OSError as error:
        raise CheckFailed(f"cannot listen on {host} port {port}: {error.strerror}") from None
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return reserved


def remove_abandoned(uds: Path) -> None:
    """Delete the socket of a service that was killed. Raises CheckFailed if it cannot be bound."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            if uds.is_socket() and client.connect_ex(str(uds)) == errno.ECONNREFUSED:
                uds.unlink()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(uds))
        uds.unlink()
    except OSError as error:
        raise CheckFailed(f"cannot listen on {uds}: {error.strerror or error}") from None


def limit_connections() -> int:
    """Raise the limit of open files; return how many connections a worker can keep.

    Raises CheckFailed if the limit is too low.
    """
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = min(MAX_CONNECTIONS + OTHER_FILES, limit)
    connections = files - OTHER_FILES
    if connections < 1:
        raise CheckFailed(f"needs {OTHER_FILES + 1} open files or more, `ulimit -Hn` is {limit}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, limit))
    if connections < MAX_CONNECTIONS:
        show("connections per worker", f"{connections}, because `ulimit -Hn` is {limit}")
    return connections
