"""The service as its clients and operators meet it: real processes, sockets and signals."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openapi_spec_validator
import pytest
import torch

import lesson_code as lesson
from real_world.common import load_lesson_model
from real_world.serve.batcher import Batcher

ROOT = Path(__file__).resolve().parents[2]
ROW = [0.5, -1.2, 0.3, 0.8]


class Server:
    """`python -m real_world.serve` in its own process, on a free port."""

    def __init__(self, *options: object) -> None:
        command = [sys.executable, "-m", "real_world.serve", "--port", "0", *map(str, options)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.stdout = self.process.stdout
        self.watchdog = threading.Timer(600, self.kill)
        self.watchdog.start()
        self.output = ""
        self.workers = [int(pid) for pid in self.read_until(r"processes +(.*)")[1].split(", ")]
        self.port = int(self.read_until(r"http://127\.0\.0\.1:(\d+)")[1])

    def read_until(self, pattern: str) -> re.Match:
        for line in self.stdout:
            self.output += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"the server ended without {pattern!r}:\n{self.output}")

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def request(self, method: str, path: str, body=None) -> tuple[int, bytes]:
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()

    def predict(self, features: object) -> tuple[int, dict]:
        status, body = self.request("POST", "/predict", json.dumps({"features": features}))
        return status, json.loads(body)

    def metric(self, name: str) -> float:
        """Return a metric, summed over its labels."""
        text = self.request("GET", "/metrics")[1].decode()
        return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def stop(self, signum: int = signal.SIGTERM) -> tuple[int, str]:
        """Return the exit status and the rest of the output."""
        self.process.send_signal(signum)
        rest = self.stdout.read()
        return self.process.wait(), rest

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self.watchdog.cancel()
        self.kill()
        self.process.wait()
        self.stdout.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "lesson.pt"
    load_lesson_model(path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_lesson_model(checkpoint)


@pytest.fixture(scope="module")
def server(checkpoint) -> Iterator[Server]:
    with Server("--workers", 2, "--checkpoint", checkpoint) as running:
        yield running
        assert running.stop()[0] == 0


@pytest.fixture(scope="module")
def slow_server(checkpoint) -> Iterator[Server]:
    """One worker whose batches wait half a second."""
    with Server("--workers", 1, "--batch-timeout-ms", 500, "--checkpoint", checkpoint) as running:
        yield running


def random_rows(count: int, seed: int) -> list[list[float]]:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)).tolist()


def assert_correct(model, features: list, response: tuple[int, dict]) -> None:
    status, body = response
    assert status == 200
    _, expected = lesson.predict(model, torch.tensor(features, dtype=torch.float32))
    probabilities = torch.tensor([row["probabilities"] for row in body["predictions"]])
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-6)
    classes = [row["class"] for row in body["predictions"]]
    assert classes == probabilities.argmax(dim=1).tolist()


# Predictions


@pytest.mark.parametrize("count", [1, 17, 1024])
def test_predictions_equal_predict(server, model, count):
    features = random_rows(count, seed=count)
    assert_correct(model, features, server.predict(features))


def test_integers_and_large_values(server, model):
    features = [[1, 0, -3, 2], [1e30, -1e30, 1e30, 0.0]]
    assert_correct(model, features, server.predict(features))


def test_concurrent_clients_get_their_own_responses(server, model):
    requests = [random_rows(seed % 5 + 1, seed) for seed in range(400)]
    with ThreadPoolExecutor(40) as pool:
        for features, response in zip(requests, pool.map(server.predict, requests), strict=True):
            assert_correct(model, features, response)


def test_waiting_requests_share_a_batch(slow_server, model):
    batches = slow_server.metric("batch_requests_count")
    good = [random_rows(3, seed) for seed in range(12)]
    invalid = [[[1, 2, 3]], [["a", 2, 3, 4]], [[1e39, 0, 0, 0]], []]
    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(slow_server.predict, [*good, *invalid]))
    for features, response in zip(good, responses[:12], strict=True):
        assert_correct(model, features, response)
    assert [status for status, _ in responses[12:]] == [422] * 4
    assert slow_server.metric("batch_requests_count") - batches <= 3
    assert slow_server.metric("batch_requests_sum") == 12
    assert slow_server.metric("batch_rows_sum") == 36
    assert slow_server.metric("http_errors_total") == 4


def test_full_batch_does_not_wait_and_a_larger_one_is_split():
    async def submit_three() -> list[np.ndarray]:
        batcher = Batcher(timeout=3600)
        batcher.predict = lambda features: features + len(features)
        running = asyncio.create_task(batcher.run())
        futures = [batcher.submit(np.zeros((rows, 4), np.float32)) for rows in (24, 1000, 1024)]
        results = await asyncio.wait_for(asyncio.gather(*futures), 60)
        running.cancel()
        return results

    assert [len(result) for result in asyncio.run(submit_three())] == [24, 1000, 1024]


def test_failure_of_the_model_reaches_only_its_batch():
    async def fail_once() -> list:
        batcher = Batcher()
        batcher.predict = lambda features: features / [1, 2]  # wrong shape
        running = asyncio.create_task(batcher.run())
        cancelled, failed = (batcher.submit(np.zeros((1, 4), np.float32)) for _ in range(2))
        cancelled.cancel()
        results = [*await asyncio.gather(failed, return_exceptions=True)]
        batcher.predict = lambda features: features
        results.append(await asyncio.wait_for(batcher.submit(np.ones((1, 4), np.float32)), 60))
        running.cancel()
        return results

    error, result = asyncio.run(fail_once())
    assert isinstance(error, ValueError)
    assert (result == 1).all()


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
    "not JSON": (b"features", 400),
    "truncated": (b'{"features": [[0.5, -1.2', 400),
    "not UTF-8": (b'{"\xff\xfe": 1}', 400),
    "NaN": (b'{"features": [[NaN, 0, 0, 0]]}', 400),
    "deep": (b"[" * 200_000, 422),
    "unknown field": (b'{"features": [[0, 0, 0, 0]], "x": 1}', 422),
    "string": (b'{"features": [[0, 0, "1", 0]]}', 422),
    "bool": (b'{"features": [[true, 0, 0, 0]]}', 422),
    "too large a value": (b'{"features": [[0, 1e31, 0, 0]]}', 422),
    "no rows": (b'{"features": []}', 422),
    "short row": (b'{"features": [[0, 0, 0, 0], [1, 2, 3]]}', 422),
    "too many rows": (json.dumps({"features": [ROW] * 1025}).encode(), 422),
    "too long": (b" " * 2**25, 413),
}


@pytest.mark.parametrize(("body", "expected"), INVALID.values(), ids=INVALID.keys())
def test_invalid_body(server, body, expected):
    status, content = server.request("POST", "/predict", body)
    assert status == expected
    assert json.loads(content).keys() == {"error"}


@pytest.mark.parametrize(
    ("method", "path", "expected"), [("GET", "/", 404), ("GET", "/predict", 405)]
)
def test_unknown_path_or_method(server, method, path, expected):
    assert server.request(method, path)[0] == expected


def test_openapi_description_is_valid_and_true(server, tmp_path):
    openapi_spec_validator.validate(json.loads(server.request("GET", "/openapi.json")[1]))
    url = f"http://127.0.0.1:{server.port}/openapi.json"
    command = [sys.executable, "-m", "schemathesis.cli", "run", url, "--checks", "all"]
    done = subprocess.run(
        [*command, "--max-examples", "50"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "No issues found" in done.stdout, done.stdout


# Processes


def test_killed_worker_is_replaced(checkpoint, model):
    with Server("--workers", 2, "--checkpoint", checkpoint) as running:
        for _ in range(20):
            running.predict([ROW])
        os.kill(running.workers[0], signal.SIGKILL)
        found = running.read_until(r"worker died +(\d+)")
        assert int(found[1]) == running.workers[0]
        assert_correct(model, [ROW], running.predict([ROW]))
        assert running.metric("request_latency_seconds_count") == 21
        assert running.stop()[0] == 0


def test_sigterm_answers_accepted_requests(checkpoint, model):
    options = ("--workers", 1, "--batch-timeout-ms", 2000, "--checkpoint", checkpoint)
    with Server(*options) as running, contextlib.ExitStack() as stack:
        sent = []
        for seed in range(20):
            connection = stack.enter_context(contextlib.closing(running.connect()))
            features = random_rows(2, seed)
            connection.request("POST", "/predict", json.dumps({"features": features}))
            sent.append((connection, features))
        # A later request has its response: the event loop has seen the earlier ones.
        assert running.request("GET", "/live")[0] == 200
        assert running.stop()[0] == 0
        for connection, features in sent:
            response = connection.getresponse()
            assert_correct(model, features, (response.status, json.load(response)))


def test_stalled_client_does_not_block_the_shutdown(checkpoint):
    with (
        Server("--workers", 1, "--checkpoint", checkpoint) as running,
        socket.create_connection(("127.0.0.1", running.port), timeout=30) as stalled,
    ):
        stalled.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        assert running.request("GET", "/live")[0] == 200
        assert running.stop(signal.SIGINT)[0] == 0


def test_workers_end_when_the_supervisor_is_killed(checkpoint):
    with Server("--workers", 2, "--checkpoint", checkpoint) as running:
        running.process.kill()
        assert "Traceback" not in running.stdout.read()  # until the last worker ends


def run_serve(*options: object) -> tuple[int, str]:
    """Return the exit status and the error output of a server that cannot start."""
    command = [sys.executable, "-m", "real_world.serve", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def test_port_in_use(server, checkpoint):
    status, error = run_serve("--port", server.port, "--checkpoint", checkpoint)
    assert (status, error.count("\n")) == (1, 1)
    assert "in use" in error


def test_missing_checkpoint(tmp_path):
    status, error = run_serve("--checkpoint", tmp_path / "lessson.pt")
    assert (status, error) == (1, f"error: there is no {tmp_path}/lessson.pt\n")


def test_wrong_option():
    status, error = run_serve("--workers", 0)
    assert status == 2
    assert "'0' is not an integer from 1 to 1000" in error
