"""The article's data flow as a service: the lesson's model behind HTTP.

python -m real_world.serve [--port 8000] [--workers 2] [--device cuda]
curl localhost:8000/predict --data '{"features": [[0.5, -1.2, 0.3, 0.8]]}'

API Request -> Preprocessing -> Tensor Batch -> PyTorch Model
    -> Logits -> Postprocessing -> Response
"""

import functools
import os
import tempfile
from pathlib import Path

import uvicorn

import lesson_code as lesson
from real_world.common import (
    bounded_int,
    load_lesson_model,
    make_parser,
    print_heading,
    run_cli,
    show,
)
from real_world.serve.model import BACKENDS, ServerConfig, load_and_warm_up

DEFAULT_CHECKPOINT = lesson.OUTPUT / "lesson.pt"


def serve(config: ServerConfig, host: str, port: int, workers: int) -> None:
    """Serve a model until SIGTERM or Ctrl-C.

    Raises OSError if it cannot listen, CheckFailed if no worker starts.
    """
    with tempfile.TemporaryDirectory(prefix="lesson-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # read when the metrics are imported
        from real_world.serve.app import create_app
        from real_world.serve.supervisor import Supervisor, announce, reserve_port

        with reserve_port(host, port) as port:
            uvicorn_config = uvicorn.Config(
                functools.partial(create_app, config),
                factory=True,
                host=host,
                port=port,
                workers=workers,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                timeout_graceful_shutdown=5,  # seconds, for a client that does not finish
                timeout_worker_healthcheck=30,  # a worker may take that long to import PyTorch
            )
            supervisor = Supervisor(uvicorn_config, [])
            supervisor.run()
    if any(worker.exitcode == uvicorn.config.STARTUP_FAILURE for worker in supervisor.processes):
        raise lesson.CheckFailed("a worker could not start, see above")
    announce("stopped", "all workers have ended")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("serve", "The lesson's model behind HTTP.")
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", type=Path, default=DEFAULT_CHECKPOINT)
    add("--host", default="127.0.0.1", help="default: 127.0.0.1, this computer only")
    add("--port", metavar="N", type=bounded_int(0, 65535), default=8000, help="0: any free port")
    workers = bounded_int(1, 1000)
    add("--workers", metavar="N", type=workers, default=os.cpu_count(), help="default: CPU cores")
    add("--backend", choices=BACKENDS, default="eager", help="default: eager")
    timeout = "how long a batch waits for more requests (default: 0)"
    add("--batch-timeout-ms", metavar="N", type=bounded_int(0, 2000), default=0, help=timeout)
    args = parser.parse_args(argv)
    print_heading(
        "Serve: the lesson's model behind HTTP",
        "API Request -> Preprocessing -> Tensor Batch -> PyTorch Model (GPU) -> Logits -> ...",
    )
    if args.checkpoint != DEFAULT_CHECKPOINT and not args.checkpoint.exists():
        raise lesson.CheckpointError(f"there is no {args.checkpoint}")
    model = load_lesson_model(args.checkpoint).requires_grad_(False)
    config = ServerConfig(model, args.backend, args.device, args.batch_timeout_ms / 1000)
    if args.backend == "compile":  # once, for all workers: they use the compiler's cache
        from torch._dynamo.exc import BackendCompilerFailed

        try:
            load_and_warm_up(config)
        except BackendCompilerFailed as error:
            reason = str(error.inner_exception).splitlines()[0]
            raise lesson.CheckFailed(f"--backend compile failed: {reason}") from None
    show("model", f"{args.checkpoint}, {args.backend}, on {args.device}")
    serve(config, args.host, args.port, args.workers)


if __name__ == "__main__":
    run_cli(main)
