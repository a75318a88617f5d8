"""The article's data flow as a service: the lesson's model behind HTTP.

    python -m real_world.serve [--port 8000] [--workers 2] [--device cuda]
    curl localhost:8000/predict --data '{"features": [[0.5, -1.2, 0.3, 0.8]]}'

    API Request -> Preprocessing -> Tensor Batch -> PyTorch Model
        -> Logits -> Postprocessing -> Response

Granian (Rust) manages the processes, sockets and HTTP. Each of its workers runs the application.
"""

import argparse
import functools
import ipaddress
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import threading
from pathlib import Path
from types import FrameType

from granian import Granian
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from prometheus_client import CollectorRegistry, start_http_server

import lesson_code as lesson
from real_world import common
from real_world.common import OUTPUT, CheckFailed, bounded_int, show
from real_world.serve.load import load_app
from real_world.serve.monitor import Monitor, announce

DEFAULT_CHECKPOINT = OUTPUT / "lesson.pt"


def cpu_count() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def reserve_port(host: str, port: int) -> socket.socket:
    """Bind a port (a free one if it is 0), so that only this service's workers can share it.

    Raises OSError if it is in use. Keep the socket, which does not listen, until the service ends.
    """
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reserved.bind((host, port))
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"{host} port {port}") from None
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return reserved


def main(argv: list[str] | None = None) -> None:
    about = "The lesson's model behind HTTP."
    parser = argparse.ArgumentParser("python -m real_world.serve", description=about)
    add = parser.add_argument
    add(
        "--device",
        type=common.device,
        default="auto",
        help="auto, cpu, cuda, cuda:N (default: auto)",
    )
    port = bounded_int(0, 65535)
    ip = ipaddress.ip_address
    text = "default: the lesson's"
    add("--checkpoint", metavar="FILE", type=Path, default=DEFAULT_CHECKPOINT, help=text)
    add("--host", metavar="IP", type=ip, default="127.0.0.1", help="default: 127.0.0.1")
    add("--port", metavar="N", type=port, default=8000, help="default: 8000; 0: any free port")
    add("--metrics-port", metavar="N", type=port, default=8002, help="default: 8002; 0: any")
    add("--workers", metavar="N", type=bounded_int(1, 1000), help="default: CPU cores")
    backends = ["eager", "torchscript", "compile"]
    add("--backend", choices=backends, default="eager", help="how the model runs (default: eager)")
    timeout = "how long a batch waits for more requests (default: 0)"
    add("--batch-timeout-ms", metavar="N", type=bounded_int(0, 2000), default=0, help=timeout)
    parser.set_defaults(workers=cpu_count())
    args = parser.parse_args(argv)
    common.print_heading(
        "Serve: the lesson's model behind HTTP",
        "API Request -> Preprocessing -> Tensor Batch -> PyTorch Model (GPU) -> Logits -> ...",
    )
    if args.checkpoint != DEFAULT_CHECKPOINT and not args.checkpoint.exists():
        raise lesson.CheckpointError(f"there is no {args.checkpoint}")
    model = common.load_lesson_model(args.checkpoint).requires_grad_(False)
    show("model", f"{args.checkpoint}, {args.backend}, on {args.device}")

    host = str(args.host)
    url = f"http://[{host}]" if ":" in host else f"http://{host}"
    reserved_port = reserve_port(host, args.port)
    reserve_port(host, args.metrics_port).close()
    address, bound_port, *_ = reserved_port.getsockname()
    monitor = Monitor(args.workers, f"{url}:{bound_port}")
    registry = CollectorRegistry()
    registry.register(monitor.totals)
    metrics_server, _ = start_http_server(args.metrics_port, host, registry)
    show("metrics", f"GET /metrics on port {metrics_server.server_port}")

    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))  # one per connection
    multiprocessing.set_start_method("spawn")  # a fork could not use CUDA
    server = Granian(
        "serve",
        address=address,
        port=bound_port,
        interface=Interfaces.ASGI,
        http=HTTPModes.http1,
        websockets=False,
        workers=args.workers,
        backlog=4096,  # connections that wait to be accepted
        backpressure=10_000,  # connections per worker
        http1_settings=HTTP1Settings(header_read_timeout=30_000, max_buffer_size=2**16),
        log_level=LogLevels.warning,
        respawn_failed_workers=True,
        workers_kill_timeout=5,  # seconds
    )

    @server.on_startup
    def start_monitor() -> None:
        interrupt = signal.getsignal(signal.SIGTERM)

        def stop(signum: int, frame: FrameType | None) -> None:
            monitor.stopping = True
            interrupt(signum, frame)  # type: ignore[operator,misc]

        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, stop)
        threading.Thread(target=monitor.run, daemon=True).start()

    load = functools.partial(
        load_app,
        monitor.reports,
        pickle.dumps(model),  # bytes: multiprocessing would pass tensors in shared files
        args.backend,
        str(args.device),
        args.batch_timeout_ms / 1000,
    )
    try:
        server.serve(target_loader=load, wrap_loader=False)
    finally:  # if the supervisor fails, its workers must not go on
        for child in multiprocessing.active_children():
            child.kill()
    if monitor.failed:
        raise CheckFailed("a worker could not start, or workers keep dying; see above")
    announce("stopped", "all workers have ended")


if __name__ == "__main__":
    common.run_cli(main)
