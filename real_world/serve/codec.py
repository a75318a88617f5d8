"""JSON to features, probabilities to JSON, and the OpenAPI description of both."""

from typing import Annotated, Any

import msgspec  # decodes, validates, encodes and describes JSON
import numpy as np
from starlette.exceptions import HTTPException

MAX_BATCH_ROWS = 1024  # of a request, and of the requests that share a batch
MAX_ABS_VALUE = 1e30  # of a feature: the sums of larger values overflow float32
MAX_BYTES_PER_VALUE = 64  # of JSON: 25 for the longest float64, the rest for white space


class Prediction(msgspec.Struct, forbid_unknown_fields=True):
    """The result for one row: its class, and the probability of every class."""

    label: int = msgspec.field(name="class")
    probabilities: list[Annotated[float, msgspec.Meta(ge=0, le=1)]]


class Predictions(msgspec.Struct, forbid_unknown_fields=True):
    """One prediction per row, in order."""

    predictions: list[Prediction]


class Status(msgspec.Struct, forbid_unknown_fields=True):
    """What runs in a worker that is ready."""

    status: str
    backend: str
    device: str


class Error(msgspec.Struct, forbid_unknown_fields=True):
    """Why a request was rejected."""

    error: str


def features_type(in_features: int) -> type[msgspec.Struct]:
    """Return the type of a request: 1 to MAX_BATCH_ROWS rows of `in_features` values."""
    value = Annotated[float, msgspec.Meta(ge=-MAX_ABS_VALUE, le=MAX_ABS_VALUE)]
    row = Annotated[list[value], msgspec.Meta(min_length=in_features, max_length=in_features)]  # type: ignore[valid-type]
    rows = Annotated[list[row], msgspec.Meta(min_length=1, max_length=MAX_BATCH_ROWS)]  # type: ignore[valid-type]
    return msgspec.defstruct("Features", [("features", rows)], forbid_unknown_fields=True)


def preprocess(body: bytes, decoder: msgspec.json.Decoder) -> np.ndarray:
    """Return the features of a request, (rows, in_features) float32."""
    try:
        return np.array(decoder.decode(body).features, dtype=np.float32)
    except msgspec.ValidationError as error:
        message = str(error)[:200]  # it can contain a key of the request, however long
        raise HTTPException(422, f"invalid features, see /openapi.json: {message}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None


def postprocess(probabilities: np.ndarray) -> bytes:
    """Return JSON with the class and the probabilities of every row, (rows, classes) float32."""
    classes = probabilities.argmax(axis=1).tolist()
    predictions = Predictions(list(map(Prediction, classes, probabilities.tolist())))
    return msgspec.json.encode(predictions) + b"\n"


def openapi_schema(in_features: int) -> dict[str, Any]:
    """Return the OpenAPI description, from the types that are decoded and encoded."""
    (features, predictions, status, error), components = msgspec.json.schema_components(
        [features_type(in_features), Predictions, Status, Error],
        ref_template="#/components/schemas/{name}",
    )

    def response(description: str, schema: dict) -> dict:
        return {"description": description, "content": {"application/json": {"schema": schema}}}

    predict = {
        "requestBody": {"required": True, **response("One row per sample", features)},
        "responses": {
            "200": response("One prediction per row", predictions),
            "400": response("Not JSON", error),
            "408": response("The body did not arrive in time", error),
            "413": response("Body too large", error),
            "415": response("Compressed body", error),
            "422": response("JSON, but not features of this model", error),
            "500": response("A failure of the model, or a bug", error),
        },
    }
    ready = {"responses": {"200": response("The worker is ready", status)}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "The lesson's model", "version": "1"},
        "components": {"schemas": components},
        "paths": {
            "/predict": {"post": predict},
            "/ready": {"get": ready},
        },
    }
