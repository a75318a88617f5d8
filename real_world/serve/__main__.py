"""The article's data flow as a service: the lesson's model behind HTTP.

    python -m real_world.serve [--port 8000] [--workers 2] [--device cuda]
    curl localhost:8000/predict --data '{"features": [[0.5, -1.2, 0.3, 0.8]]}'

    API Request -> Preprocessing -> Tensor Batch -> PyTorch Model
        -> Logits -> Postprocessing -> Response

Granian (Rust) manages the processes, sockets and HTTP. Each of its workers runs the application.
"""

# ruff: noqa: E402
import signal
import sys

# Before slow imports: for PID 1 of a container, Linux drops a SIGTERM that has no handler.
signal.signal(signal.SIGTERM, lambda *_: sys.exit())

import argparse
import functools
import ipaddress
import multiprocessing
import pickle
import threading
from pathlib import Path
from types import FrameType

import joblib  # its cpu_count() knows a container's CPU quota
from granian import Granian
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels

import lesson_code as lesson
from real_world import common
from real_world.common import OUTPUT, CheckFailed, bounded_int, show
from real_world.serve.load import load_app
from real_world.serve.metrics import serve_metrics
from real_world.serve.monitor import Monitor, announce
from real_world.serve.sockets import limit_connections, remove_abandoned, reserve_port

DEFAULT_CHECKPOINT = OUTPUT / "lesson.pt"
ACCESS_LOG = (
    '[%(time)s] %(addr)s "%(method)s %(path)s" %(status)d %(dt_ms).1f ms %(header{x-request-id})s'
)


def main(argv: list[str] | None = None) -> None:
    about = "The lesson's model behind HTTP."
    parser = argparse.ArgumentParser("python -m real_world.serve", description=about)
    add = parser.add_argument
    add("--device", type=common.device, default="auto", help="auto (default), cpu, cuda or cuda:N")
    port = bounded_int(0, 65535)
    ip = ipaddress.ip_address
    text = "default: the lesson's, trained first if there is none"
    add("--checkpoint", metavar="FILE", type=Path, default=DEFAULT_CHECKPOINT, help=text)
    add("--host", metavar="IP", type=ip, default="127.0.0.1", help="default: 127.0.0.1")
    add("--port", metavar="N", type=port, default=8000, help="default: 8000; 0: any free port")
    add("--uds", metavar="FILE", type=Path, help="a Unix domain socket instead of a port")
    add("--metrics-host", metavar="IP", type=ip, default="127.0.0.1", help="default: 127.0.0.1")
    add("--metrics-port", metavar="N", type=port, default=8002, help="default: 8002; 0: any")
    text = "default: CPU cores, or a container's quota of them; 1 on a GPU"
    add("--workers", metavar="N", type=bounded_int(1, 1000), help=text)
    backends = ["eager", "torchscript", "compile"]
    add("--backend", choices=backends, default="eager", help="how the model runs (default: eager)")
    text = "how long a batch waits for more requests (default: 0)"
    add("--batch-timeout-ms", metavar="N", type=bounded_int(0, 2000), default=0, help=text)
    add("--access-log", action="store_true", help="print a line per request")
    args = parser.parse_args(argv)
    workers = args.workers or (joblib.cpu_count() if args.device.type == "cpu" else 1)
    common.print_heading(
        "Serve: the lesson's model behind HTTP",
        "API Request -> Preprocessing -> Tensor Batch -> PyTorch Model (GPU) -> Logits -> ...",
    )
    if args.checkpoint != DEFAULT_CHECKPOINT and not args.checkpoint.exists():
        raise lesson.CheckpointError(f"there is no {args.checkpoint}")
    model = common.load_lesson_model(args.checkpoint).requires_grad_(False)
    show("model", f"{args.checkpoint}, {args.backend}, on {args.device}")

    metrics_socket = reserve_port(str(args.metrics_host), args.metrics_port)
    show("metrics", f"GET /metrics on port {metrics_socket.getsockname()[1]}")
    if args.uds:
        remove_abandoned(args.uds)
        url = f"unix:{args.uds}"
        address = {"uds": args.uds}
    else:
        reserved_port = reserve_port(str(args.host), args.port)
        host, bound_port, *_ = reserved_port.getsockname()
        url = f"http://[{host}]:{bound_port}" if ":" in host else f"http://{host}:{bound_port}"
        address = {"address": host, "port": bound_port}
    connections = limit_connections()
    monitor = Monitor(workers, url)
    serve_metrics(metrics_socket, monitor.totals)
    multiprocessing.set_start_method("spawn")  # a fork could not use CUDA
    server = Granian(
        "serve",
        **address,
        interface=Interfaces.ASGI,
        http=HTTPModes.http1,
        websockets=False,
        workers=workers,
        backlog=4096,  # connections that wait to be accepted
        backpressure=connections,  # per worker
        http1_settings=HTTP1Settings(header_read_timeout=30_000, max_buffer_size=2**16),
        log_level=LogLevels.warning,
        log_access=args.access_log,
        log_access_format=ACCESS_LOG,
        respawn_failed_workers=True,
        workers_kill_timeout=5,  # seconds
    )

    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN

    @server.on_startup
    def start_monitor() -> None:
        interrupt = signal.getsignal(signal.SIGTERM)

        def stop(signum: int, frame: FrameType | None) -> None:
            monitor.stopping = True
            interrupt(signum, frame)  # type: ignore[operator,misc]

        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else stop)
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
