"""The ASGI application: request -> preprocess -> batch -> postprocess -> response."""

import asyncio
import contextlib
import gc
import logging
import socket
import time
from collections.abc import AsyncIterator, Mapping

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from real_world.serve import codec
from real_world.serve.batcher import Batcher
from real_world.serve.metrics import errors, report, request_latency
from real_world.serve.model import load_and_warm_up

BODY_TIMEOUT = 30.0  # seconds in which a body has to arrive


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Count an error, and return it as JSON."""
    errors.labels(status).inc()
    body = msgspec.json.encode(codec.Error(message))
    return Response(body, status, headers, "application/json")


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answer a request for an unknown path, or with the wrong method."""
    assert isinstance(error, HTTPException)
    return error_response(error.status_code, f"{error.detail}, see /openapi.json", error.headers)


class Predict:
    """Answers POST /predict."""

    def __init__(self, batcher: Batcher, in_features: int) -> None:
        self.batcher = batcher
        self.decoder = msgspec.json.Decoder(codec.features_type(in_features))
        self.max_bytes = codec.MAX_BATCH_ROWS * in_features * codec.MAX_BYTES_PER_VALUE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        start = time.perf_counter()
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                body = await self.read_body(scope, receive)
            features = codec.preprocess(body, self.decoder)
            probabilities = await self.batcher.submit(features)
            if not np.isfinite(probabilities).all():
                raise HTTPException(422, "the result is not finite: the features are too large")
            response = Response(codec.postprocess(probabilities), media_type="application/json")
            request_latency.observe(time.perf_counter() - start)
        except HTTPException as error:
            response = error_response(error.status_code, error.detail)
        except TimeoutError:
            response = error_response(408, "the body did not arrive in time")
        except ClientDisconnect:
            return
        except Exception:
            logging.exception("POST /predict")
            response = error_response(500, "internal error")
        await response(scope, receive, send)

    async def read_body(self, scope: Scope, receive: Receive) -> bytes:
        """Return the body.

        A body that is too large is read to its end: most clients read the response only after they
        have sent the body. Those that expect `100 Continue` wait before they send it.

        Raises:
            HTTPException: It is too large, or compressed.
            ClientDisconnect: It ends early.
        """
        headers = dict(scope["headers"])
        length = int(headers.get(b"content-length", -1))
        too_large = f"the body is larger than {self.max_bytes:,} bytes"
        if length > self.max_bytes and b"expect" in headers:
            raise HTTPException(413, too_large)
        body = b""
        size = 0
        more = True
        while more and size != length:  # each receive() costs a switch to the server's thread
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            size += len(message["body"])
            if size <= self.max_bytes:
                body += message["body"]
            more = message["more_body"]
        if size > self.max_bytes:
            raise HTTPException(413, too_large)
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise HTTPException(415, "the body must not be compressed")
        return body


def create_app(
    reports: socket.socket, model: bytes, backend: str, device: str, batch_timeout: float
) -> ASGIApp:
    """Return the application of one worker."""
    run_model, in_features = load_and_warm_up(model, backend, device)
    predict = Predict(Batcher(run_model, batch_timeout), in_features)
    status = msgspec.json.encode(codec.Status("ready", backend, device))
    schema = msgspec.json.encode(codec.openapi_schema(in_features))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # A full collection would look at all the objects that PyTorch creates: 50 to 100 ms.
        gc.collect()
        gc.freeze()
        reporting = asyncio.create_task(report(reports))
        yield
        reporting.cancel()

    starlette = Starlette(
        routes=[
            Route("/predict", predict, methods=["POST"]),
            Route("/ready", Response(status, media_type="application/json"), methods=["GET"]),
            Route(
                "/openapi.json", Response(schema, media_type="application/json"), methods=["GET"]
            ),
        ],
        exception_handlers={HTTPException: on_http_error},
        lifespan=lifespan,
    )
    starlette.router.redirect_slashes = False  # it would redirect to whatever host a request names

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # Starlette's layers would add a third to the time of the busiest route.
        if scope["type"] == "http" and (scope["method"], scope["path"]) == ("POST", "/predict"):
            await predict(scope, receive, send)
        else:
            await starlette(scope, receive, send)

    return app
