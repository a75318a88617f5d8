"""The service as its clients and operators meet it: real processes, sockets and signals."""

import asyncio
import contextlib
import http.client
import json
import os
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openapi_spec_validator
import pytest
import torch
from processes import ROOT, is_running, wait_until

import lesson_code as lesson
from real_world.common import load_lesson_model
from real_world.serve.app import Predict
from real_world.serve.batcher import Batcher

ROW = [0.5, -1.2, 0.3, 0.8]
POST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n"
COMMAND = [sys.executable, "-m", "real_world.serve", "--port", "0", "--metrics-port", "0"]


class Server:
    """`python -m real_world.serve` in its own session, on a free port."""

    def __init__(self, *options: object, prefix: tuple = (), **environment: str) -> None:
        self.process = subprocess.Popen(
            [*prefix, *COMMAND, *map(str, options)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.stdout = self.process.stdout
        self.watchdog = threading.Timer(300, self.kill)
        self.watchdog.start()
        self.output = ""
        self.metrics_port = int(self.read_until(r"GET /metrics on port (\d+)")[1])
        self.workers = [int(pid) for pid in self.read_until(r"processes +(.*)")[1].split(", ")]
        self.port = int(self.read_until(r"http://127\.0\.0\.1:(\d+)")[1])

    def read_until(self, pattern: str) -> re.Match:
        for line in self.stdout:
            self.output += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"the server ended without {pattern!r}:\n{self.output}")

    def connect(self, data: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(data)
        return connection

    def request(self, method: str, path: str, body=None, port: int = 0) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()

    def predict(self, features: object) -> tuple[int, dict]:
        status, body = self.request("POST", "/predict", json.dumps({"features": features}))
        return status, json.loads(body)

    def metric(self, name: str) -> float:
        text = self.request("GET", "/metrics", port=self.metrics_port)[1].decode()
        return sum(float(v) for v in re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE))

    def memory(self) -> int:
        """Return the resident memory of all workers, in bytes."""
        statm = [Path(f"/proc/{pid}/statm").read_text().split() for pid in self.workers]
        return sum(int(fields[1]) * 4096 for fields in statm)

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
        status, rest = running.stop()
        assert (status, "Traceback" in running.output + rest) == (0, False)


def random_rows(count: int, seed: int, width: int = 4) -> list[list[float]]:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).tolist()


def assert_correct(model, features: list, response: tuple[int, dict]) -> None:
    status, body = response
    assert status == 200, body
    _, expected = lesson.predict(model, torch.tensor(features, dtype=torch.float32))
    probabilities = torch.tensor([row["probabilities"] for row in body["predictions"]])
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-6)
    classes = [row["class"] for row in body["predictions"]]
    assert classes == probabilities.argmax(dim=1).tolist()


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
    options = ("--workers", 1, "--batch-timeout-ms", 1000, "--checkpoint", checkpoint)
    good = [random_rows(3, seed) for seed in range(12)]
    invalid = [[[1, 2, 3]], [["a", 2, 3, 4]], [[1e39, 0, 0, 0]], []]
    with Server(*options) as running, ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(running.predict, [*good, *invalid]))
        for features, response in zip(good, responses[:12], strict=True):
            assert_correct(model, features, response)
        assert [status for status, _ in responses[12:]] == [422] * 4
        wait_until(lambda: running.metric("batch_requests_sum") == 12)
        assert running.metric("batch_requests_count") <= 3
        assert running.metric("batch_rows_sum") == 36
        assert running.metric("request_latency_seconds_count") == 12
        assert running.metric('http_errors_total{status="422"}') == 4
        assert running.stop(signal.SIGHUP)[0] == 0


def test_full_batch_does_not_wait_and_a_larger_one_is_split():
    async def submit_three() -> list[np.ndarray]:
        batcher = Batcher(lambda features: features + len(features), timeout=3600)
        futures = [batcher.submit(np.zeros((rows, 4), np.float32)) for rows in (24, 1000, 1024)]
        return await asyncio.wait_for(asyncio.gather(*futures), 60)

    results = asyncio.run(submit_three())
    assert [(len(result), result.max()) for result in results] == [
        (24, 1024),
        (1000, 1024),
        (1024, 1024),
    ]


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
        ("GET", "/predict", None, 405),
    ],
    ids=[*INVALID, "unknown path", "wrong method"],
)
def test_error_is_short_and_counted(server, method, path, body, expected):
    metric = f'http_errors_total{{status="{expected}"}}'
    count = server.metric(metric)
    status, content = server.request(method, path, body)
    assert status == expected
    assert json.loads(content).keys() == {"error"}
    assert len(content) < 400
    wait_until(lambda: server.metric(metric) == count + 1)


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


def test_largest_request_of_a_wide_model(tmp_path):
    wide = lesson.SimpleClassifier(64, 16, 3)
    lesson.save_checkpoint(tmp_path / "wide.pt", wide, torch.optim.SGD(wide.parameters()), [])
    options = ("--checkpoint", tmp_path / "wide.pt")
    with Server(*options, prefix=("taskset", "-c", "0")) as running:
        assert len(running.workers) == 1
        features = (1e-5 * torch.randn(1024, 64, dtype=torch.float64)).tolist()
        assert_correct(wide, features, running.predict(features))


# Clients that behave badly


def test_slow_clients_are_closed_and_others_are_served(server, model):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    memory = server.memory()
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(3000)]
        slow.append(stack.enter_context(server.connect(POST)))
        slow.append(stack.enter_context(server.connect(POST + b"\r\n{")))
        endless = stack.enter_context(server.connect(POST + b"X: "))
        with pytest.raises(ConnectionError):  # closed at a limit
            endless.sendall(b"x" * 2**26)
        for _ in range(100):
            assert_correct(model, [ROW], server.predict([ROW]))
        assert server.memory() - memory < 2**27
        responses = [connection.recv(20) for connection in slow]
        assert set(responses[:-1]) <= {b"", b"HTTP/1.1 408 Request"}
        assert responses[-1] == b"HTTP/1.1 408 Request"
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_clients_that_leave_and_those_that_offer_http2(server):
    whole = json.dumps({"features": random_rows(1024, 0)}).encode()
    for body in [whole[:50], whole] * 20:
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(whole)
        server.connect(head + body).close()
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    body = json.dumps({"features": [ROW]}).encode().ljust(99)
    with server.connect(POST + offer + b"\r\n" + body) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


# Processes


def test_lost_workers_are_replaced_without_any_file(checkpoint, model, tmp_path):
    (tmp_path / "tmp").mkdir()
    options = ("--workers", 2, "--checkpoint", checkpoint)
    with Server(*options, TMPDIR=str(tmp_path / "tmp")) as running:
        shutil.rmtree(tmp_path / "tmp")
        for _ in range(20):
            running.predict([ROW])
        wait_until(lambda: running.metric("request_latency_seconds_count") == 20)
        os.kill(running.workers[0], signal.SIGKILL)
        assert running.read_until(r"worker died +(\d+), signal 9")[1] == str(running.workers[0])
        os.kill(running.workers[1], signal.SIGSTOP)
        assert running.read_until(r"worker hangs.* (\d+)")[1] == str(running.workers[1])
        assert running.read_until(r"worker died +(\d+), signal 9")[1] == str(running.workers[1])
        wait_until(lambda: running.predict([[1, 2]])[0] == 422)
        assert_correct(model, [ROW], running.predict([ROW]))
        wait_until(lambda: running.metric("request_latency_seconds_count") == 21)
        assert running.stop()[0] == 0


def test_worker_that_cannot_start_ends_the_service_and_names_its_exit_status(checkpoint):
    options = ("--workers", 1, "--backend", "compile", "--checkpoint", checkpoint)
    with pytest.raises(AssertionError, match=r"worker died +\d+, exit status 1") as ended:
        Server(*options, PATH="/nowhere")
    assert str(ended.value).count("worker died") == 1


def test_sigterm_answers_accepted_requests_and_does_not_wait_for_others(checkpoint):
    options = ("--workers", 1, "--batch-timeout-ms", 2000, "--checkpoint", checkpoint)
    body = json.dumps({"features": [ROW]}).encode().ljust(99)
    with Server(*options) as running, contextlib.ExitStack() as stack:
        stack.enter_context(running.connect(POST + b"\r\n{"))
        accepted = [stack.enter_context(running.connect(POST + b"\r\n" + body)) for _ in range(20)]
        running.request("GET", "/ready")  # came later, and has its response
        assert running.stop()[0] == 0
        for connection in accepted:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def answers(running: Server) -> bool:
    with contextlib.suppress(ConnectionError):  # the killed worker's port may still reset one
        return running.predict([ROW])[0] == 200
    return False


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("supervisor killed", -signal.SIGKILL),
        ("no file left for a new worker", 1),
        ("output closed", 0),
    ],
)
def test_workers_end_with_the_supervisor(checkpoint, how, status):
    with Server("--workers", 2, "--checkpoint", checkpoint) as running:
        if how == "supervisor killed":
            running.process.kill()
        elif how == "no file left for a new worker":
            resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (3, 3))
            os.kill(running.workers[0], signal.SIGKILL)
        else:
            running.stdout.close()
            os.kill(running.workers[0], signal.SIGKILL)
            wait_until(lambda: not is_running(running.workers[0]))
            wait_until(lambda: answers(running))
            running.process.terminate()
        assert running.process.wait() == status
        wait_until(lambda: not any(map(is_running, running.workers)))


def test_closed_terminal_ends_the_service(checkpoint):
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [*COMMAND, "--workers", "1", "--checkpoint", str(checkpoint)])
    with os.fdopen(terminal) as output:
        lines = iter(output.readline, "")
        worker = next(int(line.split()[-1]) for line in lines if "worker processes" in line)
    try:
        wait_until(lambda: not is_running(worker) and not is_running(pid))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# The command line


def run_serve(*options: object) -> tuple[int, str]:
    done = subprocess.run(
        [*COMMAND, *map(str, options)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


def test_mistakes_get_one_line(server, checkpoint, tmp_path):
    status, error = run_serve("--port", server.port, "--checkpoint", checkpoint)
    assert (status, error.count("\n")) == (1, 1)
    assert f"in use: '127.0.0.1 port {server.port}'" in error
    status, error = run_serve("--checkpoint", tmp_path / "lessson.pt")
    assert (status, error) == (1, f"error: there is no {tmp_path}/lessson.pt\n")


@pytest.mark.parametrize("option", [["--host", ""], ["--workers", 0]])
def test_wrong_option(option):
    status, error = run_serve(*option)
    assert status == 2
    assert f"argument {option[0]}: " in error


def test_servers_that_start_at_once_do_not_share_a_port(server, checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [*COMMAND, "--port", str(port), "--checkpoint", str(checkpoint)]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        wait_until(lambda: any(process.poll() is not None for process in both))
        assert sorted(str(process.poll()) for process in both) == ["1", "None"]
    finally:
        for process in both:
            process.terminate()
            process.wait()
