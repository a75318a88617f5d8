"""The article's data flow as a service: the lesson's network answering over HTTP.

    python -m real_world.serve [--port 8000] [--workers 2] [--device cuda]
    curl localhost:8000/predict --data '{"features": [[0.5, -1.2, 0.3, 0.8]]}'

    API Request -> Preprocessing -> Tensor Batch -> PyTorch Model
        -> Logits -> Postprocessing -> Response

Requests that wait at the same moment share one batch, whoever sent them (dynamic batching), for a
network takes little longer for fifty rows than for one. A request that is refused never gets there:
mosec, which batches in Rust and is faster still, has one status for all requests of a batch.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Annotated

import msgspec  # JSON and its schema in one pass, the fastest of its kind
import numpy as np
import prometheus_client.multiprocess  # adds up what several processes count
import torch
import uvicorn  # HTTP, the workers, their replacement, an orderly end
from starlette.applications import Starlette  # routes
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from torch import nn
from uvicorn.supervisors import Multiprocess

import lesson_code as lesson
from real_world import heading, lesson_checkpoint, parser, run, show, shown, whole_number

LARGEST_BATCH = 1024  # rows: of a request, and of the requests that share a batch
LARGEST_VALUE = 1e30  # of a feature; the sums of much larger ones overflow float32, and answer nan
LARGEST_BODY = 2**18  # bytes; LARGEST_BATCH rows of four long decimals take a third

DEFAULT = lesson.OUTPUT / "lesson.pt"
NETWORKS: dict[str, Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]]] = {
    "eager": lambda model: model,
    "torchscript": torch.jit.script,
    "compile": lambda model: torch.compile(model, dynamic=True),
}

POWERS_OF_TWO = [2**power for power in range(11)]
REFUSALS = prometheus_client.Counter("refusals", "Requests refused, by HTTP status.", ["status"])
SECONDS = prometheus_client.Histogram(
    "answer_seconds",
    "From a request's head to its answer, of those that were answered.",
    buckets=[0.0001 * power for power in POWERS_OF_TWO],
)
BATCH_REQUESTS = prometheus_client.Histogram(
    "batch_requests", "Requests that shared a batch.", buckets=POWERS_OF_TWO
)
BATCH_ROWS = prometheus_client.Histogram("batch_rows", "Rows of a batch.", buckets=POWERS_OF_TWO)


# %% Preprocessing: bytes to features


def features_type(in_features: int) -> type[msgspec.Struct]:
    """Return the type of a request's body: 1 to LARGEST_BATCH rows of `in_features` values."""
    value = Annotated[float, msgspec.Meta(ge=-LARGEST_VALUE, le=LARGEST_VALUE)]
    row = Annotated[list[value], msgspec.Meta(min_length=in_features, max_length=in_features)]
    rows = Annotated[list[row], msgspec.Meta(min_length=1, max_length=LARGEST_BATCH)]
    return msgspec.defstruct("Features", [("features", rows)], forbid_unknown_fields=True)


def preprocess(body: bytes, decoder: msgspec.json.Decoder) -> np.ndarray:
    """Return the features of a request's JSON, (rows, in_features) float32.

    `decoder` is of `features_type`. Raises HTTPException, 400 or 422 with a sentence, for a body
    that it does not take.
    """
    try:
        return np.array(decoder.decode(body).features, dtype=np.float32)
    except msgspec.ValidationError as error:
        sentence = f"the body is not features of this network, see /openapi.json: {error}"
        raise HTTPException(422, sentence) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error) if body else "it is empty"
        raise HTTPException(400, f"the body is not JSON: {reason}") from None


# %% Tensor batch -> PyTorch model -> logits


@dataclass(frozen=True)
class Settings:
    """What every worker is given, also one that takes another's place: the same network.

    `network` is of NETWORKS, `wait` how many seconds a batch waits for more requests.
    """

    model: lesson.SimpleClassifier
    network: str
    device: torch.device
    wait: float


def warm_network(settings: Settings) -> Callable[[np.ndarray], np.ndarray]:
    """Return what maps features, (rows, in_features) float32, to probabilities, (rows, classes).

    It has been called: compilers and CUDA do much of their work at the first calls.
    Raises BackendCompilerFailed where torch.compile finds no compiler.
    """
    torch.set_num_threads(1)  # the workers share the cores; a small batch gains nothing from two
    if settings.network == "compile":
        torch._inductor.config.compile_threads = 1  # no pool of processes for each of them
    device = settings.device
    network = NETWORKS[settings.network](settings.model.to(device).eval())

    @torch.inference_mode()
    def probabilities(features: np.ndarray) -> np.ndarray:
        X = torch.from_numpy(features).to(device)
        logits = network(X)
        return logits.softmax(dim=1).cpu().numpy()

    for rows in (1, 2, LARGEST_BATCH):
        probabilities(np.zeros((rows, settings.model.fc1.in_features), dtype=np.float32))
    return probabilities


class Batcher:
    """Dynamic batching: what waits while the network works goes through it together, next.

    Its `network` is what `warm_network` returns. A batch that is not full waits up to `wait`
    seconds for more; at 0 it goes at once.
    """

    network: Callable[[np.ndarray], np.ndarray]

    def __init__(self, wait: float = 0.0) -> None:
        self.wait = wait
        self.waiting: deque[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = deque()
        self.waiting_rows = 0
        self.not_empty, self.full = asyncio.Event(), asyncio.Event()

    def submit(self, features: np.ndarray) -> asyncio.Future[np.ndarray]:
        """Return what will be the probabilities of `features`, (rows, classes) float32."""
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((features, future))
        self.add_waiting_rows(len(features))
        return future

    def add_waiting_rows(self, rows: int) -> None:
        """Note that `rows` more wait, or fewer."""
        self.waiting_rows += rows
        for event, least in ((self.not_empty, 1), (self.full, LARGEST_BATCH)):
            event.set() if self.waiting_rows >= least else event.clear()

    async def gather(self) -> list[tuple[np.ndarray, asyncio.Future[np.ndarray]]]:
        """Return the requests of the next batch, in the order in which they came."""
        await self.not_empty.wait()
        if self.wait:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.full.wait(), self.wait)
        batch, rows = [], 0
        while self.waiting and rows + len(self.waiting[0][0]) <= LARGEST_BATCH:
            batch.append(self.waiting.popleft())
            rows += len(batch[-1][0])
        self.add_waiting_rows(-rows)
        return batch

    async def run(self) -> None:
        """Send batch after batch through the network, until cancelled."""
        while True:
            batch = await self.gather()
            features = np.concatenate([rows for rows, _ in batch])
            BATCH_REQUESTS.observe(len(batch))
            BATCH_ROWS.observe(len(features))
            try:
                probabilities = self.network(features)
            except Exception as error:  # told to these requests: the next batch has its own chance
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            first = 0
            for rows, future in batch:
                if not future.done():  # cancelled, where a shutdown ran out of time
                    future.set_result(probabilities[first : first + len(rows)])
                first += len(rows)


# %% Postprocessing: probabilities to bytes


class Prediction(msgspec.Struct, forbid_unknown_fields=True):
    """The answer to one row: its class, and the probability of every class."""

    label: int = msgspec.field(name="class")
    probabilities: list[Annotated[float, msgspec.Meta(ge=0, le=1)]]


class Predictions(msgspec.Struct, forbid_unknown_fields=True):
    """The answer to a request: a prediction for each row, in order."""

    predictions: list[Prediction]


def postprocess(probabilities: np.ndarray) -> bytes:
    """Return JSON with the class and the probabilities of every row, (rows, classes) float32."""
    classes = probabilities.argmax(axis=1).tolist()
    predictions = Predictions(list(map(Prediction, classes, probabilities.tolist())))
    return msgspec.json.encode(predictions) + b"\n"  # for who reads it in a shell


# %% Request -> response


async def read(receive: Receive) -> bytes:
    """Return the body; raise HTTPException, 413, as soon as it is longer than LARGEST_BODY."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message["body"]
        if len(body) > LARGEST_BODY:
            raise HTTPException(413, f"the body is longer than {LARGEST_BODY:,} bytes")
        more = message["more_body"]
    return body


class Refusal(msgspec.Struct, forbid_unknown_fields=True):
    """The answer to a request that is wrong: what is."""

    error: str


def refusal(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return the answer to a request that is wrong."""
    REFUSALS.labels(status).inc()
    content = msgspec.json.encode(Refusal(sentence)) + b"\n"
    return Response(content, status, headers, "application/json")


class Predict:
    """Answers POST /predict: the article's data flow, from request to response."""

    def __init__(self, batcher: Batcher, in_features: int) -> None:
        self.batcher = batcher
        self.decoder = msgspec.json.Decoder(features_type(in_features))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        start = time.perf_counter()
        try:
            features = preprocess(await read(receive), self.decoder)
            probabilities = await self.batcher.submit(features)
            if not np.isfinite(probabilities).all():
                raise HTTPException(422, "the features are so large that the answer is no number")
            response = Response(postprocess(probabilities), media_type="application/json")
            SECONDS.observe(time.perf_counter() - start)
        except HTTPException as error:
            response = refusal(error.status_code, error.detail)
        except ClientDisconnect:  # before its request was whole
            return
        await response(scope, receive, send)


async def live(request: Request) -> Response:
    """Answer GET /live: the process is there, and its event loop turns."""
    return Response(b'{"status":"live"}', media_type="application/json")


async def ready(request: Request) -> Response:
    """Answer GET /ready: a worker takes its first connection only when its network is warm."""
    content = {"status": "ready", **request.app.state.description}
    return Response(msgspec.json.encode(content), media_type="application/json")


async def metrics(request: Request) -> Response:
    """Answer GET /metrics: what all workers counted, also those that are gone."""
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.multiprocess.MultiProcessCollector(registry)
    content = prometheus_client.generate_latest(registry)
    return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)


async def openapi(request: Request) -> Response:
    """Answer GET /openapi.json."""
    content = msgspec.json.encode(describe(request.app.state.in_features))
    return Response(content, media_type="application/json")


async def refuse(request: Request, error: HTTPException) -> Response:
    """Answer a request for a path that is not there, or with a method that it does not take."""
    if error.status_code == 404:
        has = ", ".join(route.path for route in request.app.routes)
        return refusal(404, f"there is no {request.url.path} here; there is {has}")
    takes = ", ".join(sorted(error.headers["Allow"].split(", ")))
    return refusal(405, f"{request.url.path} takes {takes}, not {request.method}", error.headers)


class Service(Starlette):
    """The routes, and a short cut to the busy one, which Starlette's layers would slow down."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http" and (scope["method"], scope["path"]) == ("POST", "/predict"):
            await self.state.predict(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def application(settings: Settings) -> Service:
    """Return the service of one worker, whose network is warm before it takes a connection."""
    in_features = settings.model.fc1.in_features
    batcher = Batcher(settings.wait)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        batcher.network = warm_network(settings)
        # A full collection would look through all the objects that PyTorch brings, and all wait.
        gc.collect()
        gc.freeze()
        loop = asyncio.get_running_loop()
        parent = multiprocessing.parent_process().sentinel

        def orphaned() -> None:  # the supervisor was killed: nobody else ends this process
            loop.remove_reader(parent)
            os.kill(os.getpid(), signal.SIGTERM)

        loop.add_reader(parent, orphaned)
        running = loop.create_task(batcher.run())
        yield
        running.cancel()

    predict = Predict(batcher, in_features)
    app = Service(
        routes=[
            Route("/predict", predict, methods=["POST"]),
            Route("/live", live),
            Route("/ready", ready),
            Route("/metrics", metrics),
            Route("/openapi.json", openapi),
        ],
        exception_handlers={HTTPException: refuse},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # /predict/ is not there, rather than elsewhere
    app.state.predict = predict
    app.state.in_features = in_features
    app.state.description = {"network": settings.network, "device": str(settings.device)}
    return app


# %% Running it


def listen(host: str, port: int, shared: bool) -> socket.socket:
    """Return a socket bound to `host` and `port`; raise OSError, which names them, where it cannot.

    With `shared`, every worker has one of its own and the kernel spreads connections over them. One
    socket for all would let the worker that wakes up first take a whole burst.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        reason = f"{error.strerror or error}; --port 0 takes a free one"
        raise OSError(f"cannot listen on {host} port {port}: {reason}") from None
    return bound


@contextlib.contextmanager
def alone(host: str, port: int) -> Iterator[int]:
    """Keep other servers off `host` and `port` until the block ends; yield the port, 0 made real.

    The workers' sockets share the port, so the kernel would let another server's join them.
    Raises OSError where one is there already.
    """
    with listen(host, port, shared=False) as free:
        address, port = free.getsockname()[:2]
    with socket.socket(socket.AF_UNIX) as lock:
        if sys.platform == "linux":  # an abstract name, which ends with the process
            try:
                lock.bind(f"\0real_world.serve {address} {port}")
            except OSError:
                raise OSError(f"another server is starting on {host} port {port}") from None
        yield port


def announce(label: str, value: object) -> None:
    """Print a line; a reader who has left, `head` say, does not end the service."""
    try:
        show(label, value)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Supervisor(Multiprocess):
    """uvicorn's, with a socket for each worker, and a line printed when one is replaced."""

    @property
    def sockets(self) -> list[socket.socket]:
        """What the next worker, for which uvicorn reads this, listens on: it alone keeps it."""
        return [listen(self.config.host, self.config.port, shared=True)]

    @sockets.setter
    def sockets(self, unused: list[socket.socket]) -> None:
        pass

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Start workers that Ctrl-C, which goes to all, does not reach: this process ends them."""
        resource_tracker.ensure_running()  # the first start of it would unblock the signal again
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for process in self.processes:  # its pipe ends with it: nobody waits for a dead one's word
            process.child_conn.close()

    def init_processes(self) -> None:
        """Start the workers, and wait until their networks are warm."""
        with self.starting():
            super().init_processes()
        waiting = list(self.processes)
        while waiting and not self.should_exit.is_set():
            self.handle_signals()
            if not waiting[0].process.is_alive():
                return  # run() sees to it
            if waiting[0].is_ready(timeout=0.5):
                waiting.pop(0)
        if not waiting:
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            announce("worker processes", ", ".join(str(p.pid) for p in self.processes))
            url = f"http://{host}:{self.config.port}"
            announce("ready, listening on", f"{url}, until Ctrl-C or SIGTERM")

    def keep_subprocess_alive(self) -> None:
        """Replace each worker that died."""
        before = [process.pid for process in self.processes]
        with self.starting():
            super().keep_subprocess_alive()
        for old, process in zip(before, self.processes, strict=True):
            if process.pid != old:
                announce("a worker died", f"{old}; {process.pid} takes its place")


def serve(
    checkpoint: Path,
    host: str,
    port: int,
    workers: int,
    network: str,
    device: torch.device,
    wait: float,
) -> None:
    """Serve the network of `checkpoint` until SIGTERM or Ctrl-C.

    Raises OSError where it cannot listen, CheckpointError, or CheckFailed where no worker starts.
    """
    quote = "API Request -> Preprocessing -> Tensor Batch -> PyTorch Model (GPU) -> Logits -> ..."
    heading("Serve: the network behind HTTP", quote)
    if checkpoint != DEFAULT and not checkpoint.exists():  # a name mistyped is no wish to train
        raise OSError(f"there is no {checkpoint}; without --checkpoint the lesson's is served")
    model = lesson_checkpoint(checkpoint).requires_grad_(False)
    settings = Settings(model, network, device, wait)
    with (
        alone(host, port) as port,
        tempfile.TemporaryDirectory(prefix="lesson-metrics-") as folder,
    ):
        if network == "compile":  # once, for all workers: they find it in the compiler's cache
            from torch._dynamo.exc import BackendCompilerFailed

            try:
                warm_network(settings)
            except BackendCompilerFailed as error:
                reason = str(error.inner_exception).splitlines()[0]
                raise lesson.CheckFailed(f"--network {network} cannot be built: {reason}") from None
        announce("network", f"{shown(checkpoint)}, {network}, on {device}")
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # where the workers count
        config = uvicorn.Config(
            functools.partial(application, settings),
            factory=True,
            host=host,
            port=port,
            workers=workers,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            timeout_graceful_shutdown=5,  # seconds, for a client that does not finish its request
            timeout_worker_healthcheck=30,  # that a worker may take to import PyTorch
        )
        supervisor = Supervisor(config, [])
        supervisor.run()
    if any(process.exitcode == uvicorn.config.STARTUP_FAILURE for process in supervisor.processes):
        raise lesson.CheckFailed("a worker could not start; it says above why")
    announce("stopped", "all workers have ended")


def milliseconds(text: str) -> float:
    """Convert an option's text to seconds; raise ArgumentTypeError, which says what is right."""
    return whole_number(text, most=2000) / 1000


def options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exit with status 2, after one sentence, where one is wrong."""
    made = parser("serve", "The lesson's network behind HTTP.", "--device")
    port = functools.partial(whole_number, most=65535)
    positive = functools.partial(whole_number, least=1, most=1000)
    add = made.add_argument
    add("--checkpoint", metavar="FILE", type=Path, default=DEFAULT, help="default: the lesson's")
    add("--host", default="127.0.0.1", help="default: 127.0.0.1, which only this machine reaches")
    add("--port", metavar="N", type=port, default=8000, help="default: 8000; 0 takes a free one")
    add("--workers", metavar="N", type=positive, default=os.cpu_count(), help="default: one a core")
    add("--network", choices=NETWORKS, default="eager", help="default: eager")
    wait = "that a batch waits for more requests, up to 2000 (default: 0)"
    add("--wait", metavar="MS", type=milliseconds, default=0.0, help=wait)
    return made.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the page; return its exit status."""
    chosen = options(argv)
    return run("serve", lambda: serve(**vars(chosen)))


# %% OpenAPI


def describe(in_features: int) -> dict:
    """Return the OpenAPI description of the service, from the types that it decodes and encodes."""
    (features, predictions, refused), components = msgspec.json.schema_components(
        [features_type(in_features), Predictions, Refusal],
        ref_template="#/components/schemas/{name}",
    )

    def content(schema: dict, media: str = "application/json") -> dict:
        return {"content": {media: {"schema": schema}}}

    def get(summary: str, schema: dict, media: str = "application/json") -> dict:
        answer = {"description": summary, **content(schema, media)}
        return {"get": {"summary": summary, "responses": {"200": answer}}}

    predict = {
        "summary": "The class and the probabilities of every row, in order",
        "requestBody": {"required": True, **content(features)},
        "responses": {
            "200": {"description": "One prediction a row", **content(predictions)},
            "400": {"description": "Not JSON", **content(refused)},
            "413": {"description": "Too long", **content(refused)},
            "422": {"description": "JSON, but not features of this network", **content(refused)},
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "The lesson's network", "version": "1"},
        "components": {"schemas": components},
        "paths": {
            "/predict": {"post": predict},
            "/live": get("Liveness", {"type": "object", "required": ["status"]}),
            "/ready": get(
                "Readiness", {"type": "object", "required": ["status", "network", "device"]}
            ),
            "/metrics": get("What was counted, for Prometheus", {"type": "string"}, "text/plain"),
            "/openapi.json": get("This description", {"type": "object"}),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
