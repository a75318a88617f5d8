"""JSON to features, probabilities to JSON: what a request and a response look like."""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec  # JSON and its schema in one pass
import numpy as np
from starlette.exceptions import HTTPException
from starlette.responses import Response

from real_world.serve.metrics import HTTP_ERRORS

MAX_BATCH_ROWS = 1024  # of a request, and of the requests that share a batch
MAX_ABS_VALUE = 1e30  # of a feature: the sums of larger values overflow float32
MAX_BODY_BYTES = 2**18  # 1,024 rows of four long decimals take a third


class Prediction(msgspec.Struct, forbid_unknown_fields=True):
    """The result for one row: its class, and the probability of every class."""

    label: int = msgspec.field(name="class")
    probabilities: list[Annotated[float, msgspec.Meta(ge=0, le=1)]]


class Predictions(msgspec.Struct, forbid_unknown_fields=True):
    """The response: one prediction per row, in order."""

    predictions: list[Prediction]


class Error(msgspec.Struct, forbid_unknown_fields=True):
    """The response to a request that is rejected."""

    error: str


def features_type(in_features: int) -> type[msgspec.Struct]:
    """Return the type of a request's body: 1 to MAX_BATCH_ROWS rows of `in_features` values."""
    value = Annotated[float, msgspec.Meta(ge=-MAX_ABS_VALUE, le=MAX_ABS_VALUE)]
    row = Annotated[list[value], msgspec.Meta(min_length=in_features, max_length=in_features)]  # type: ignore[valid-type]
    rows = Annotated[list[row], msgspec.Meta(min_length=1, max_length=MAX_BATCH_ROWS)]  # type: ignore[valid-type]
    return msgspec.defstruct("Features", [("features", rows)], forbid_unknown_fields=True)


def preprocess(body: bytes, decoder: msgspec.json.Decoder) -> np.ndarray:
    """Return the features of a request, (rows, in_features) float32.

    Raises HTTPException with status 400 or 422 if the body is not valid.
    """
    try:
        return np.array(decoder.decode(body).features, dtype=np.float32)
    except msgspec.ValidationError as error:
        raise HTTPException(422, f"invalid features, see /openapi.json: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None


def postprocess(probabilities: np.ndarray) -> bytes:
    """Return JSON with the class and the probabilities of every row, (rows, classes) float32."""
    classes = probabilities.argmax(axis=1).tolist()
    predictions = Predictions(list(map(Prediction, classes, probabilities.tolist())))
    return msgspec.json.encode(predictions) + b"\n"


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with an error message, and count it."""
    HTTP_ERRORS.labels(status).inc()
    content = msgspec.json.encode(Error(message)) + b"\n"
    return Response(content, status, headers, "application/json")


def openapi_schema(in_features: int) -> dict[str, Any]:
    """Return the OpenAPI description, from the types that are decoded and encoded."""
    (features, predictions, error), components = msgspec.json.schema_components(
        [features_type(in_features), Predictions, Error],
        ref_template="#/components/schemas/{name}",
    )

    def content(schema: dict, media_type: str = "application/json") -> dict:
        return {"content": {media_type: {"schema": schema}}}

    def get(summary: str, schema: dict, media_type: str = "application/json") -> dict:
        response = {"description": summary, **content(schema, media_type)}
        return {"get": {"summary": summary, "responses": {"200": response}}}

    predict = {
        "summary": "The class and the probabilities of every row, in order",
        "requestBody": {"required": True, **content(features)},
        "responses": {
            "200": {"description": "One prediction per row", **content(predictions)},
            "400": {"description": "Not JSON", **content(error)},
            "413": {"description": "Body too large", **content(error)},
            "422": {"description": "JSON, but not features of this model", **content(error)},
        },
    }
    status = {"type": "object", "required": ["status"]}
    ready = {"type": "object", "required": ["status", "backend", "device"]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "The lesson's model", "version": "1"},
        "components": {"schemas": components},
        "paths": {
            "/predict": {"post": predict},
            "/live": get("Liveness", status),
            "/ready": get("Readiness", ready),
            "/metrics": get("Metrics for Prometheus", {"type": "string"}, "text/plain"),
            "/openapi.json": get("This description", {"type": "object"}),
        },
    }
