"""The ASGI application: request -> preprocess -> batch -> postprocess -> response."""

import asyncio
import contextlib
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncIterator

import msgspec
import numpy as np
import prometheus_client.multiprocess  # sums over processes
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from real_world.serve import codec
from real_world.serve.batcher import Batcher
from real_world.serve.metrics import REQUEST_LATENCY
from real_world.serve.model import ServerConfig, load_and_warm_up


async def read_body(receive: Receive) -> bytes:
    """Return the body; raise HTTPException (413) as soon as it exceeds MAX_BODY_BYTES."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message["body"]
        if len(body) > codec.MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {codec.MAX_BODY_BYTES:,} bytes")
        more = message["more_body"]
    return body


class Predict:
    """Answers POST /predict."""

    def __init__(self, batcher: Batcher, in_features: int) -> None:
        self.batcher = batcher
        self.decoder = msgspec.json.Decoder(codec.features_type(in_features))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        start = time.perf_counter()
        try:
            features = codec.preprocess(await read_body(receive), self.decoder)
            probabilities = await self.batcher.submit(features)
            if not np.isfinite(probabilities).all():
                raise HTTPException(422, "the result is not finite: the features are too large")
            response = Response(codec.postprocess(probabilities), media_type="application/json")
            REQUEST_LATENCY.observe(time.perf_counter() - start)
        except HTTPException as error:
            response = codec.error_response(error.status_code, error.detail)
        except ClientDisconnect:
            return
        await response(scope, receive, send)


async def live(request: Request) -> Response:
    """Answer GET /live: the process runs."""
    return Response(b'{"status":"live"}', media_type="application/json")


async def ready(request: Request) -> Response:
    """Answer GET /ready; a worker accepts its first connection when its model is warm."""
    config: ServerConfig = request.app.state.config
    content = {"status": "ready", "backend": config.backend, "device": str(config.device)}
    return Response(msgspec.json.encode(content), media_type="application/json")


async def metrics(request: Request) -> Response:
    """Answer GET /metrics with the sums over all workers."""
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.multiprocess.MultiProcessCollector(registry)
    content = prometheus_client.generate_latest(registry)
    return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)


async def openapi(request: Request) -> Response:
    """Answer GET /openapi.json."""
    schema = codec.openapi_schema(request.app.state.config.model.fc1.in_features)
    return Response(msgspec.json.encode(schema), media_type="application/json")


async def http_error(request: Request, error: Exception) -> Response:
    """Answer a request for an unknown path, or with the wrong method."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}, see /openapi.json"
    return codec.error_response(error.status_code, message, error.headers)


class App(Starlette):
    """The routes, and a shortcut to the busiest, without Starlette's middleware."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http" and (scope["method"], scope["path"]) == ("POST", "/predict"):
            await self.state.predict(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(config: ServerConfig) -> App:
    """Return the application of one worker."""
    batcher = Batcher(config.batch_timeout)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        batcher.predict = load_and_warm_up(config)
        # A full collection would look at all the objects that PyTorch creates: 50 to 100 ms.
        gc.collect()
        gc.freeze()
        loop = asyncio.get_running_loop()
        parent = multiprocessing.parent_process()
        assert parent is not None

        def supervisor_died() -> None:
            loop.remove_reader(parent.sentinel)
            os.kill(os.getpid(), signal.SIGTERM)

        loop.add_reader(parent.sentinel, supervisor_died)
        running = loop.create_task(batcher.run())
        yield
        running.cancel()

    predict = Predict(batcher, config.model.fc1.in_features)
    app = App(
        routes=[
            Route("/predict", predict, methods=["POST"]),
            Route("/live", live),
            Route("/ready", ready),
            Route("/metrics", metrics),
            Route("/openapi.json", openapi),
        ],
        exception_handlers={HTTPException: http_error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.predict = predict
    app.state.config = config
    return app
