"""The service as its clients meet it: predictions, and errors."""

import asyncio
import gzip
import json
import signal
import subprocess
import sys
from collections.abc import MutableMapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openapi_spec_validator
import pytest
import torch
from processes import wait_until
from serve_run import ROW, Server, assert_correct, random_rows

import lesson_code as lesson
from real_world.serve.app import Predict
from real_world.serve.batcher import Batcher

# Predictions


@pytest.mark.parametrize(
    "features",
    [random_rows(1, 1), random_rows(1024, 2), [[1, 0, -3, 2], [1e30, -1e30, 1e30, 0.0]]],
    ids=["one row", "1024 rows", "integers and large values"],
)
def test_predictions_equal_predict(server, model, features):
    assert_correct(model, features, server.predict(features))


def test_concurrent_clients_get_their_own_responses(server, model):
    requests = [random_rows(seed % 5 + 1, seed) for seed in range(400)]
    with ThreadPoolExecutor(40) as pool:
        for features, response in zip(requests, pool.map(server.predict, requests), strict=True):
            assert_correct(model, features, response)


def test_waiting_requests_share_a_batch_and_invalid_ones_do_not(checkpoint, model):
    options = ("--workers", 1, "--batch-timeout-ms", 2000, "--checkpoint", checkpoint)
    good = [random_rows(3, seed) for seed in range(12)]
    invalid = [[[1, 2, 3]], [["a", 2, 3, 4]], [[1e39, 0, 0, 0]], []]
    with Server(*options) as running, ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(running.predict, [*good, *invalid]))
        for features, response in zip(good, responses[:12], strict=True):
            assert_correct(model, features, response)
        assert [status for status, _ in responses[12:]] == [422] * 4
        wait_until(lambda: running.metric("batch_requests_sum") == 12)
        assert running.metric("batch_requests_count") < 12
        assert running.metric("batch_rows_sum") == 36
        for seconds, requests in (("1.6384", 0), ("52.4288", 12)):
            name = f'request_latency_seconds_bucket{{le="{seconds}"}}'
            assert running.metric(name) == requests, "requests that waited two seconds"
        assert running.metric('http_errors_total{status="422"}') == 4
        assert running.stop(signal.SIGHUP)[0] == 0


def test_full_batch_does_not_wait_and_a_larger_one_is_split():
    async def submit_four() -> list[np.ndarray]:
        batcher = Batcher(lambda features: features + len(features), timeout=3600)
        sizes = (24, 1000, 1, 1024)
        futures = [batcher.submit(np.zeros((rows, 4), np.float32)) for rows in sizes]
        results = await asyncio.wait_for(asyncio.gather(*futures), 60)
        assert batcher.queued_rows == 0
        return results

    results = asyncio.run(submit_four())
    assert [(len(result), result.max()) for result in results] == [
        (24, 1024),
        (1000, 1024),
        (1, 1),
        (1024, 1024),
    ]


def test_full_request_does_not_wait_and_full_batches_are_not_postponed():
    full = np.zeros((1024, 4), np.float32)
    batches = []

    def predict(features: np.ndarray) -> np.ndarray:
        batches.append(len(features))
        return features

    async def submit_often(batcher: Batcher) -> None:
        for _ in range(50):
            batcher.submit(full)
            await asyncio.sleep(0)

    async def run() -> None:
        batcher = Batcher(predict, timeout=3600)
        await asyncio.wait_for(batcher.submit(full), 60)
        await asyncio.gather(submit_often(batcher), submit_often(batcher))
        assert len(batches) > 40, "about one in every round of the event loop"

    asyncio.run(run())


def test_failing_model_fails_its_batch_only():
    """And a bug of the application is an error 500."""
    sent = []

    async def send(message: MutableMapping) -> None:
        sent.append(message.get("status"))

    async def receive() -> dict:
        body = json.dumps({"features": [ROW]}).encode()
        return {"type": "http.request", "body": body, "more_body": False}

    async def run() -> None:
        batcher = Batcher(lambda features: features / [1, 2])  # wrong shape
        predict = Predict(batcher, 4)
        batcher.submit(np.zeros((1, 4), np.float32)).cancel()
        await predict({"type": "http", "headers": []}, receive, send)
        batcher.predict = lambda features: np.full((1, 3), "bug")
        await predict({"type": "http", "headers": []}, receive, send)
        batcher.predict = lambda features: features
        await predict({"type": "http", "headers": []}, receive, send)
        assert batcher.failures == 0, "no longer in a row"

    asyncio.run(run())
    assert sent[::2] == [500, 500, 200]


@pytest.mark.parametrize("backend", ["torchscript", "compile"])
def test_backends_agree(checkpoint, model, backend):
    with Server("--workers", 1, "--backend", backend, "--checkpoint", checkpoint) as running:
        assert json.loads(running.request("GET", "/ready")[1])["backend"] == backend
        for count in (1, 5, 1024):
            features = random_rows(count, seed=count)
            assert_correct(model, features, running.predict(features))


# Errors


INVALID = {
    "empty": (b"", 400),
    "truncated": (b'{"features": [[0.5, -1.2', 400),
    "not UTF-8": (b'{"\xff\xfe": 1}', 400),
    "NaN": (b'{"features": [[NaN, 0, 0, 0]]}', 400),
    "deep": (b"[" * 200_000, 422),
    "unknown field": (b'{"features": [[0, 0, 0, 0]], "%s": 1}' % (b"x" * 200_000), 422),
    "string": (b'{"features": [[0, 0, "1", 0]]}', 422),
    "bool": (b'{"features": [[true, 0, 0, 0]]}', 422),
    "too large a value": (b'{"features": [[0, 1e31, 0, 0]]}', 422),
    "short row": (b'{"features": [[0, 0, 0, 0], [1, 2, 3]]}', 422),
    "too many rows": (json.dumps({"features": [ROW] * 1025}).encode(), 422),
    "too long": (b" " * 2**25, 413),
}


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        *(("POST", "/predict", *case) for case in INVALID.values()),
        ("GET", "/" + 5000 * "x", None, 404),
        ("POST", "/predict/", b"", 404),
        ("GET", "/predict", None, 405),
    ],
    ids=[*INVALID, "unknown path", "slash at the end", "wrong method"],
)
def test_error_is_short_and_counted(server, method, path, body, expected):
    metric = f'http_errors_total{{status="{expected}"}}'
    count = server.metric(metric)
    status, content = server.request(method, path, body)
    assert status == expected
    assert json.loads(content).keys() == {"error"}
    assert len(content) < 400
    wait_until(lambda: server.metric(metric) == count + 1)


def test_compressed_body_is_refused(server):
    body = gzip.compress(json.dumps({"features": [ROW]}).encode())
    status, content = server.request("POST", "/predict", body, **{"Content-Encoding": "gzip"})
    assert (status, content) == (415, b'{"error":"the body must not be compressed"}')


def test_client_that_waits_for_100_continue(server):
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: "
    for length, response in ((100, b"HTTP/1.1 100 "), (10**12, b"HTTP/1.1 413 ")):
        with server.connect(head + b"%d\r\n\r\n" % length) as connection:
            assert connection.recv(13) == response


def test_openapi_description_is_valid_and_true(server, tmp_path):
    description = json.loads(server.request("GET", "/openapi.json")[1])
    openapi_spec_validator.validate(description)
    ready = json.loads(server.request("GET", "/ready")[1])
    assert description["components"]["schemas"]["Status"]["properties"].keys() == ready.keys()
    url = f"http://127.0.0.1:{server.port}/openapi.json"
    command = [sys.executable, "-m", "schemathesis.cli", "run", url, "--checks", "all"]
    done = subprocess.run(
        [*command, "--max-examples", "50"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "No issues found" in done.stdout, done.stdout


def test_largest_request_of_a_wide_model_in_a_container(tmp_path):
    wide = lesson.SimpleClassifier(64, 16, 3)
    lesson.save_checkpoint(tmp_path / "wide.pt", wide, torch.optim.Adam(wide.parameters()), [])
    options = ("--checkpoint", tmp_path / "wide.pt")
    script = "mount -t tmpfs none /sys/fs/cgroup; echo 50000 100000 > /sys/fs/cgroup/cpu.max"
    quota = ("unshare", "--map-root-user", "--mount", "sh", "-c", f'{script}; exec "$0" "$@"')
    with Server(*options, prefix=quota) as running:
        assert len(running.workers) == 1, "as a container's quota of half a core allows"
        features = (1e-5 * torch.randn(1024, 64, dtype=torch.float64)).tolist()
        assert_correct(wide, features, running.predict(features))
