"""The article's data flow as a service: the lesson's network answering over HTTP.

    python -m real_world.serve [--port 8000] [--workers 2] [--device cuda]
    curl localhost:8000/predict --data '{"features": [[0.5, -1.2, 0.3, 0.8]]}'

    API Request -> Preprocessing -> Tensor Batch -> PyTorch Model -> Logits -> Postprocessing -> Response

Requests that wait at the same moment share one batch, whoever sent them (dynamic batching): a network
takes little longer for fifty rows than for one. Everything in a worker happens on one event loop but
the network, which has a thread of its own, so that the next batch gathers while it works.
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
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec  # JSON and its schema in one pass, the fastest of its kind
import numpy as np
import prometheus_client.multiprocess  # adds up what several processes count
import torch
import uvicorn  # HTTP, the worker processes, their replacement, and the orderly end
from starlette.applications import Starlette  # routes
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from torch import nn
from uvicorn.supervisors import Multiprocess

import lesson_code as lesson
from real_world import lesson_checkpoint, parser, run

LARGEST_BATCH = 1024  # rows: of a request, and of the requests that share a batch
LARGEST_BODY = 2**20  # bytes; LARGEST_BATCH rows of four full-length decimals take a tenth

NETWORKS: dict[str, Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]]] = {
    "eager": lambda model: model,
    "torchscript": torch.jit.script,
    "compile": functools.partial(torch.compile, dynamic=True),
}

POWERS_OF_TWO = [2**power for power in range(11)]
REQUESTS = prometheus_client.Counter("requests", "Answered requests, by HTTP status.", ["status"])
SECONDS = prometheus_client.Histogram(
    "request_seconds",
    "From a request's body to its answer.",
    buckets=[0.0001 * power for power in POWERS_OF_TWO],
)
BATCH_REQUESTS = prometheus_client.Histogram(
    "batch_requests", "Requests that shared a batch.", buckets=POWERS_OF_TWO
)
BATCH_ROWS = prometheus_client.Histogram("batch_rows", "Rows of a batch.", buckets=POWERS_OF_TWO)


# %% Preprocessing: bytes to features


class Features(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request."""

    features: list[list[float]]


def preprocess(body: bytes, in_features: int) -> np.ndarray:
    """Return the features of a request's JSON, (rows, in_features) float32.

    Raises HTTPException, 400 or 422 with a sentence, for anything else.
    """
    try:
        rows = msgspec.json.decode(body, type=Features).features
    except msgspec.ValidationError as error:
        example = [[0.0] * in_features]
        raise HTTPException(
            422, f'the body should be like {{"features": {example}}}: {error}'
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    if not 1 <= len(rows) <= LARGEST_BATCH:
        raise HTTPException(
            422, f"features has {len(rows)} rows; a request takes 1 to {LARGEST_BATCH}"
        )
    for index, row in enumerate(rows):
        if len(row) != in_features:
            raise HTTPException(
                422, f"features[{index}] has {len(row)} values; the network takes {in_features}"
            )
    with np.errstate(over="ignore"):
        features = np.array(rows, dtype=np.float32)
    if not np.isfinite(features).all():
        row, column = np.argwhere(~np.isfinite(features))[0]
        value = rows[row][column]
        raise HTTPException(
            422, f"features[{row}][{column}] is {value}, more than float32 can hold"
        )
    return features


# %% Tensor batch -> PyTorch model -> logits


class Batcher:
    """Dynamic batching: what waits while the network works goes through it together, next.

    `network` maps features, (rows, in_features) float32, to probabilities, (rows, classes) float32.
    A batch that is not full waits up to `wait` seconds for more; at 0 it goes at once.
    """

    def __init__(self, network: Callable[[np.ndarray], np.ndarray], wait: float = 0.0) -> None:
        self.network = network
        self.wait = wait
        self.waiting: deque[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = deque()
        self.rows = 0  # of all that wait
        self.some, self.enough = asyncio.Event(), asyncio.Event()
        self.thread = ThreadPoolExecutor(1)

    def submit(self, features: np.ndarray) -> asyncio.Future[np.ndarray]:
        """Return what will be the probabilities of `features`, (rows, classes) float32."""
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((features, future))
        self.count(len(features))
        return future

    def count(self, rows: int) -> None:
        """Note that `rows` more, or fewer, wait."""
        self.rows += rows
        for event, least in ((self.some, 1), (self.enough, LARGEST_BATCH)):
            event.set() if self.rows >= least else event.clear()

    async def gather(self) -> list[tuple[np.ndarray, asyncio.Future[np.ndarray]]]:
        """Return the requests of the next batch, in the order in which they came."""
        await self.some.wait()
        if self.wait:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.enough.wait(), self.wait)
        batch, rows = [], 0
        while self.waiting and rows + len(self.waiting[0][0]) <= LARGEST_BATCH:
            batch.append(self.waiting.popleft())
            rows += len(batch[-1][0])
        self.count(-rows)
        return batch

    async def run(self) -> None:
        """Send batch after batch through the network, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self.gather()
            features = np.concatenate([rows for rows, _ in batch])
            BATCH_REQUESTS.observe(len(batch))
            BATCH_ROWS.observe(len(features))
            try:
                probabilities = await loop.run_in_executor(self.thread, self.network, features)
            except Exception as error:  # told to these requests: the next batch has its own chance
                for _, future in batch:
                    future.set_exception(error)
                continue
            first = 0
            for rows, future in batch:
                if not future.done():  # cancelled, where a shutdown ran out of time
                    future.set_result(probabilities[first : first + len(rows)])
                first += len(rows)


# %% Postprocessing: probabilities to bytes


def postprocess(probabilities: np.ndarray) -> bytes:
    """Return JSON with the class and the probabilities of every row, (rows, classes) float32."""
    classes = probabilities.argmax(axis=1).tolist()
    answers = zip(classes, probabilities.tolist(), strict=True)
    predictions = [{"class": label, "probabilities": shares} for label, shares in answers]
    return msgspec.json.encode({"predictions": predictions})


# %% Request -> response


@dataclass(frozen=True)
class Settings:
    """What every worker is given, also one that takes another's place: the same network."""

    model: lesson.SimpleClassifier
    network: str
    device: str
    wait: float


async def read(request: Request) -> bytes:
    """Return the body; raise HTTPException, 413, as soon as it is longer than LARGEST_BODY."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise HTTPException(413, f"the body is longer than {LARGEST_BODY:,} bytes")
    return body


async def predict(request: Request) -> Response:
    """Answer POST /predict."""
    start = time.perf_counter()
    state = request.app.state
    features = preprocess(await read(request), state.in_features)
    probabilities = await state.batcher.submit(features)
    content = postprocess(probabilities)
    REQUESTS.labels("200").inc()
    SECONDS.observe(time.perf_counter() - start)
    return Response(content, media_type="application/json")


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


ROUTES = [
    Route("/predict", predict, methods=["POST"]),
    Route("/live", live),
    Route("/ready", ready),
    Route("/metrics", metrics),
    Route("/openapi.json", openapi),
]


async def refuse(request: Request, error: HTTPException) -> Response:
    """Answer what is wrong with a request, in a sentence."""
    sentence = error.detail
    if error.status_code == 404:
        has = ", ".join(route.path for route in ROUTES)
        sentence = f"there is no {request.url.path} here; there is {has}"
    if error.status_code == 405:
        takes = error.headers["Allow"]
        sentence = f"{request.url.path} takes {takes}, not {request.method}"
    REQUESTS.labels(str(error.status_code)).inc()
    content = msgspec.json.encode({"error": sentence})
    return Response(content, error.status_code, error.headers, "application/json")


async def gone(request: Request, error: ClientDisconnect) -> Response:
    """Answer nobody: the client left before its request was whole."""
    return Response(status_code=400)


def application(settings: Settings) -> Starlette:
    """Return the service of one worker."""
    torch.set_num_threads(1)  # the workers share the cores; a small batch gains nothing from two
    device = torch.device(settings.device)
    model = settings.model.to(device).eval()
    network = NETWORKS[settings.network](model)

    @torch.inference_mode()
    def probabilities(features: np.ndarray) -> np.ndarray:
        X = torch.from_numpy(features).to(device)
        logits = network(X)
        return logits.softmax(dim=1).cpu().numpy()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        batcher = app.state.batcher = Batcher(probabilities, settings.wait)
        for rows in (1, 2, LARGEST_BATCH):  # compilers and CUDA do their work at the first calls
            probabilities(np.zeros((rows, app.state.in_features), dtype=np.float32))
        # PyTorch brings a million objects, through which each full collection would look: 100 ms.
        gc.collect()
        gc.freeze()
        loop = asyncio.get_running_loop()
        if parent := multiprocessing.parent_process():  # when it is killed, nobody else ends this
            loop.add_reader(parent.sentinel, os.kill, os.getpid(), signal.SIGTERM)
        running = loop.create_task(batcher.run())
        yield
        running.cancel()

    handlers = {HTTPException: refuse, ClientDisconnect: gone}
    app = Starlette(routes=ROUTES, exception_handlers=handlers, lifespan=lifespan)
    app.state.in_features = model.hidden.in_features
    app.state.description = {"network": settings.network, "device": settings.device}
    return app


# %% Running it


class Supervisor(Multiprocess):
    """uvicorn's, which says in the transcript what becomes of the workers."""

    def init_processes(self) -> None:
        """Start the workers, and wait until their networks are warm."""
        super().init_processes()
        if all(process.wait_until_ready(timeout=300) for process in self.processes):
            lesson.show("ready, worker processes", ", ".join(str(p.pid) for p in self.processes))

    def keep_subprocess_alive(self) -> None:
        """Replace each worker that died."""
        before = [process.pid for process in self.processes]
        super().keep_subprocess_alive()
        for old, process in zip(before, self.processes, strict=True):
            if process.pid != old:
                lesson.show("a worker died", f"{old}; {process.pid} takes its place")


def serve(
    checkpoint: Path, host: str, port: int, workers: int, network: str, device: str, wait: float
) -> None:
    """Serve the network of `checkpoint` until SIGTERM or Ctrl-C.

    Raises OSError where it cannot listen, CheckpointError, or ClaimError where no worker starts.
    """
    lesson.heading(
        "Serve: the network behind HTTP", "API Request -> ... -> PyTorch Model -> ... -> Response"
    )
    model = lesson_checkpoint(checkpoint).model.requires_grad_(False)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen on {host} port {port}: {error.strerror}") from None
        address = listening.getsockname()
        lesson.show("network", f"{checkpoint}, {network}, on {device}")
        lesson.show("listening on", f"http://{host}:{address[1]}")
        settings = Settings(model, network, device, wait)
        config = uvicorn.Config(
            functools.partial(application, settings),
            factory=True,
            workers=workers,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=5,  # seconds, for a client that does not finish its request
            timeout_worker_healthcheck=60,
        )
        with tempfile.TemporaryDirectory(prefix="lesson-metrics-") as folder:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # where the workers count
            supervisor = Supervisor(config, [listening])
            supervisor.run()
    if any(process.exitcode == uvicorn.config.STARTUP_FAILURE for process in supervisor.processes):
        raise lesson.ClaimError("a worker could not start; it says above why")
    lesson.show("stopped", "every accepted request was answered")


def options(argv: list[str] | None) -> argparse.Namespace:
    """Return the service's options, checked; exit with status 2 after one sentence where one is wrong."""
    made = parser("serve", "The lesson's network behind HTTP.")
    port = functools.partial(lesson.whole_number, most=65535)
    positive = functools.partial(lesson.whole_number, least=1, most=1000)
    add = made.add_argument
    add("--checkpoint", metavar="FILE", type=Path, default=lesson.CHECKPOINTS / "lesson.pt")
    add("--host", default="127.0.0.1", help="default: 127.0.0.1, which only this machine reaches")
    add("--port", metavar="N", type=port, default=8000, help="default: 8000; 0 takes a free one")
    add("--workers", metavar="N", type=positive, default=os.cpu_count(), help="default: one a core")
    add("--network", choices=NETWORKS, default="eager", help="default: eager")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    wait = {"type": functools.partial(lesson.whole_number, most=10_000), "default": 0}
    add("--wait", metavar="MS", help="that a batch waits for more requests (default: 0)", **wait)
    chosen = made.parse_args(argv)
    try:
        chosen.device = str(lesson.select_device(chosen.device))
    except ValueError as error:
        made.error(f"argument --device: {error}")
    chosen.wait /= 1000
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Run the page; return its exit status."""
    chosen = options(argv)
    return run("serve", lambda: serve(**vars(chosen)))


# %% OpenAPI


def describe(in_features: int) -> dict:
    """Return the OpenAPI description of the service."""
    row = {
        "type": "array",
        "items": {"type": "number"},
        "minItems": in_features,
        "maxItems": in_features,
    }
    features = {"type": "array", "items": row, "minItems": 1, "maxItems": LARGEST_BATCH}
    probabilities = {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}}
    prediction = {"class": {"type": "integer", "minimum": 0}, "probabilities": probabilities}

    def answer(description: str, **properties: dict) -> dict:
        schema = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        return {"description": description, "content": {"application/json": {"schema": schema}}}

    def refusal(description: str) -> dict:
        return answer(description, error={"type": "string"})

    item = answer("", **prediction)["content"]["application/json"]["schema"]
    text = {"type": "string"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "The lesson's network", "version": "1"},
        "paths": {
            "/predict": {
                "post": {
                    "summary": "Class and probabilities of every row, in order",
                    "requestBody": {"required": True, **answer("", features=features)},
                    "responses": {
                        "200": answer(
                            "One prediction a row", predictions={"type": "array", "items": item}
                        ),
                        "400": refusal("Not JSON"),
                        "413": refusal("Too long"),
                        "422": refusal("JSON, but not features of this network"),
                    },
                }
            },
            "/live": {
                "get": {"summary": "Liveness", "responses": {"200": answer("Live", status=text)}}
            },
            "/ready": {
                "get": {
                    "summary": "Readiness",
                    "responses": {"200": answer("Ready", status=text, network=text, device=text)},
                }
            },
            "/metrics": {
                "get": {
                    "summary": "Prometheus metrics",
                    "responses": {"200": {"description": "Metrics", "content": {"text/plain": {}}}},
                }
            },
            "/openapi.json": {
                "get": {
                    "summary": "This description",
                    "responses": {
                        "200": {"description": "OpenAPI", "content": {"application/json": {}}}
                    },
                }
            },
        },
    }


if __name__ == "__main__":
    sys.exit(main())
