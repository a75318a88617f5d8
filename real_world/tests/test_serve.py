"""The service as its clients and its operators meet it: real processes, real sockets, real signals.

pytest real_world/tests/test_serve.py
"""

import asyncio
import contextlib
import http.client
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openapi_spec_validator
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lesson_code as lesson
from real_world import serve

ROOT = Path(__file__).resolve().parents[2]
ROW = [0.5, -1.2, 0.3, 0.8]


class Server:
    """`python -m real_world.serve` in a process of its own, on a free port."""

    def __init__(self, *options: str, cwd: Path = ROOT) -> None:
        command = [sys.executable, "-m", "real_world.serve", "--port", "0", *options]
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.transcript = ""
        workers = self.await_line(r"worker processes +([\d, ]+)")[1]
        self.workers = [int(pid) for pid in workers.split(", ")]
        self.port = int(self.await_line(r"listening on +http://127\.0\.0\.1:(\d+),")[1])

    def await_line(self, pattern: str) -> re.Match:
        """Read the transcript until a line matches."""
        for line in self.process.stdout:
            self.transcript += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"it ended without {pattern!r}:\n{self.transcript}")

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def request(
        self, method: str, path: str, body: bytes | str | None = None
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        """Return status, body and headers of one request on a connection of its own."""
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read(), response.headers

    def ask(self, features: object) -> tuple[int, dict]:
        status, body, _ = self.request("POST", "/predict", json.dumps({"features": features}))
        return status, json.loads(body)

    def metric(self, name: str) -> float:
        """Return a metric, its labels added up."""
        text = self.request("GET", "/metrics")[1].decode()
        return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def listening(self) -> list[str]:
        """Return the addresses that sockets listen on at its port, as the kernel writes them."""
        tables = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        return re.findall(rf" (\w+):{self.port:04X} \w+:0000 0A ", tables)

    def stop(self) -> tuple[int, str]:
        """Send SIGTERM; return the exit status, and the rest of the transcript."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20), self.process.stdout.read()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Train the lesson's network; return its file."""
    path = tmp_path_factory.mktemp("checkpoint") / "lesson.pt"
    X, y = lesson.make_synthetic_data(seed=0)
    model, optimizer = lesson.build_model(0, torch.device("cpu"))
    losses = lesson.train(model, [(X, y)], nn.CrossEntropyLoss(), optimizer, 100)
    lesson.save_checkpoint(path, model, optimizer, losses)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return lesson.load_checkpoint(checkpoint)[0]


@pytest.fixture(scope="module")
def server(checkpoint):
    """Two workers, for the tests that leave them as they are."""
    with Server("--workers", "2", "--checkpoint", str(checkpoint)) as running:
        yield running
        status, rest = running.stop()
        assert status == 0
        assert re.search(r"stopped +all workers have ended\n$", rest)


@pytest.fixture(scope="module")
def waiting(checkpoint):
    """One worker whose batches wait half a second for more requests."""
    with Server("--workers", "1", "--wait", "500", "--checkpoint", str(checkpoint)) as running:
        yield running


def right(model, features: list, answer: dict) -> bool:
    """Tell whether `answer` is what `predict` says of `features`, to 1e-6."""
    expected = lesson.predict(model, torch.tensor(features, dtype=torch.float32))[1]
    given = answer["predictions"]
    if [prediction.keys() for prediction in given] != [{"class", "probabilities"}] * len(expected):
        return False
    probabilities = torch.tensor([prediction["probabilities"] for prediction in given])
    classes = [prediction["class"] for prediction in given]
    # Where two are equal to the last digit, another batch may round the other way.
    chosen = expected[range(len(classes)), classes]
    return (
        classes == probabilities.argmax(dim=1).tolist()
        and bool((expected.amax(dim=1) - chosen <= 1e-6).all())
        and torch.allclose(probabilities, expected, rtol=0, atol=1e-6)
    )


def rows(count: int, seed: int) -> list[list[float]]:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)).tolist()


# What it answers


@pytest.mark.parametrize("count", [1, 2, 17, 1024])
def test_answers_are_what_predict_says_in_the_order_of_the_rows(server, model, count):
    features = rows(count, seed=count)
    status, answer = server.ask(features)
    assert status == 200
    assert right(model, features, answer)


def test_whole_numbers_and_the_largest_values_are_features_too(server, model):
    features = [[1, 0, -3, 2], [1e30, -1e30, 1e30, 0.0]]
    status, answer = server.ask(features)
    assert status == 200
    assert right(model, features, answer)


def test_two_thousand_different_requests_at_once_get_each_its_own_answer(server, model):
    def client(number: int) -> int:
        with contextlib.closing(server.connect()) as connection:
            good = 0
            for seed in range(number * 50, number * 50 + 50):
                features = rows(seed % 5 + 1, seed)
                connection.request("POST", "/predict", json.dumps({"features": features}))
                response = connection.getresponse()
                good += response.status == 200 and right(model, features, json.load(response))
            return good

    with ThreadPoolExecutor(40) as pool:
        assert sum(pool.map(client, range(40))) == 2000


def test_requests_that_wait_share_a_batch_and_a_bad_one_does_not_touch_the_others(waiting, model):
    before = [waiting.metric(f"batch_requests_{name}") for name in ("sum", "count")]
    refused = waiting.metric("refusals_total")
    good = [rows(3, seed) for seed in range(12)]
    bad = [[[1, 2, 3]], [["a", 2, 3, 4]], [[1e39, 0, 0, 0]], []]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(waiting.ask, [*good, *bad]))
    for features, (status, answer) in zip(good, answers[:12], strict=True):
        assert status == 200
        assert right(model, features, answer)
    assert [status for status, _ in answers[12:]] == [422] * 4
    requests, batches = (
        waiting.metric(f"batch_requests_{name}") - value
        for name, value in zip(("sum", "count"), before, strict=True)
    )
    assert requests == 12
    assert batches <= 3, "12 requests within half a second"
    assert waiting.metric("refusals_total") - refused == 4
    assert b'refusals_total{status="422"}' in waiting.request("GET", "/metrics")[1]
    assert waiting.metric("batch_rows_sum") >= 36


def test_a_full_batch_does_not_wait_and_a_larger_one_is_split(waiting, model):
    batches = waiting.metric("batch_rows_count")
    requests = [rows(700, seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(waiting.ask, requests))
    for features, (status, answer) in zip(requests, answers, strict=True):
        assert status == 200
        assert right(model, features, answer)
    assert waiting.metric("batch_rows_count") - batches == 3, "two of 700 are more than 1,024"


def test_a_full_batch_goes_though_the_wait_is_an_hour():
    async def fill() -> np.ndarray:
        batcher = serve.Batcher(wait=3600)
        batcher.network = lambda features: features * 2
        running = asyncio.create_task(batcher.run())
        first, second = (
            batcher.submit(np.full((rows, 4), rows, np.float32)) for rows in (24, 1000)
        )
        answers = await asyncio.wait_for(asyncio.gather(first, second), 60)
        running.cancel()
        return answers

    first, second = asyncio.run(fill())
    assert (first == 48).all()
    assert (second == 2000).all()


def test_a_network_that_fails_tells_those_who_asked_and_answers_the_next():
    async def fail() -> list:
        batcher = serve.Batcher()
        batcher.network = lambda features: 1 / 0
        running = asyncio.create_task(batcher.run())
        gone, asked = (batcher.submit(np.zeros((1, 4), np.float32)) for _ in range(2))
        gone.cancel()
        told = asyncio.gather(asked, return_exceptions=True)
        outcomes = [*await asyncio.wait_for(told, 60)]
        batcher.network = lambda features: features
        outcomes.append(await asyncio.wait_for(batcher.submit(np.ones((1, 4), np.float32)), 60))
        running.cancel()
        return outcomes

    error, answer = asyncio.run(fail())
    assert isinstance(error, ZeroDivisionError)
    assert (answer == 1).all()


@pytest.mark.parametrize("network", ["torchscript", "compile"])
def test_a_compiled_network_answers_the_same(checkpoint, model, network):
    options = ("--workers", "1", "--network", network, "--checkpoint", str(checkpoint))
    with Server(*options) as running:
        assert json.loads(running.request("GET", "/ready")[1])["network"] == network
        for count in (1, 5, 1024):
            features = rows(count, seed=count)
            status, answer = running.ask(features)
            assert status == 200
            assert right(model, features, answer)


def test_liveness_readiness_and_metrics(server):
    assert server.request("GET", "/live")[:2] == (200, b'{"status":"live"}')
    ready = {"status": "ready", "network": "eager", "device": str(lesson.select_device())}
    status, body, _ = server.request("GET", "/ready")
    assert (status, json.loads(body)) == (200, ready)
    answered = server.metric("answer_seconds_count")
    for _ in range(20):  # both workers count, whichever is asked
        server.ask([ROW])
    assert server.metric("answer_seconds_count") == answered + 20
    assert server.metric("answer_seconds_sum") > 0


# What it refuses


ODD = {
    "nothing": (b"", 400, "the body is not JSON: it is empty"),
    "no JSON": (b"features", 400, "the body is not JSON: JSON is malformed"),
    "cut short": (
        b'{"features": [[0.5, -1.2',
        400,
        "the body is not JSON: Input data was truncated",
    ),
    "no UTF-8": (b'{"\xff\xfe": 1}', 400, "the body is not JSON"),
    "nan": (b'{"features": [[NaN, 0, 0, 0]]}', 400, "the body is not JSON: JSON is malformed"),
    "infinity": (b'{"features": [[0, -Infinity, 0, 0]]}', 400, "the body is not JSON"),
    "deep": (b"[" * 200_000, 422, "Expected `object`, got `array`"),
    "no object": (b"[[0.5, -1.2, 0.3, 0.8]]", 422, "Expected `object`, got `array`"),
    "null": (b"null", 422, "Expected `object`, got `null`"),
    "no features": (b"{}", 422, "missing required field `features`"),
    "a misspelling": (b'{"feature": [[0, 0, 0, 0]]}', 422, "unknown field `feature`"),
    "more": (b'{"features": [[0, 0, 0, 0]], "x": 1}', 422, "unknown field `x`"),
    "one row bare": (b'{"features": [0, 0, 0, 0]}', 422, "Expected `array`, got `int`"),
    "a string": (b'{"features": [[0, 0, 0, 0], [0, 0, "1", 0]]}', 422, "$.features[1][2]"),
    "a nan string": (b'{"features": [[0, "nan", 0, 0]]}', 422, "Expected `float`, got `str`"),
    "true": (b'{"features": [[true, 0, 0, 0]]}', 422, "Expected `float`, got `bool`"),
    "too large": (
        b'{"features": [[0, 1e31, 0, 0]]}',
        422,
        "Expected `float` <= 1e+30 - at `$.features[0][1]`",
    ),
    "beyond": (b'{"features": [[0, 1e999, 0, 0]]}', 422, "Number out of range"),
    "no rows": (b'{"features": []}', 422, "Expected `array` of length >= 1 - at `$.features`"),
    "an empty row": (
        b'{"features": [[]]}',
        422,
        "Expected `array` of length >= 4 - at `$.features[0]`",
    ),
    "a short row": (
        b'{"features": [[0,0,0,0],[1,2,3]]}',
        422,
        "Expected `array` of length >= 4 - at `$.features[1]`",
    ),
    "a long row": (
        b'{"features": [[1,2,3,4,5]]}',
        422,
        "Expected `array` of length <= 4 - at `$.features[0]`",
    ),
    "rows": (
        json.dumps({"features": [ROW] * 1025}),
        422,
        "Expected `array` of length <= 1024 - at `$.features`",
    ),
    "length": (b" " * (2**18 + 1), 413, "the body is longer than 262,144 bytes"),
    "far too long": (b" " * 2**25, 413, "the body is longer than 262,144 bytes"),
}


@pytest.mark.parametrize(("body", "status", "sentence"), ODD.values(), ids=ODD.keys())
def test_a_bad_body_gets_a_sentence(server, body, status, sentence):
    answered, content, headers = server.request("POST", "/predict", body)
    error = json.loads(content)
    assert (answered, headers["Content-Type"], error.keys()) == (
        status,
        "application/json",
        {"error"},
    )
    assert sentence in error["error"]
    assert server.ask([ROW])[0] == 200


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(server):
    with contextlib.closing(server.connect()) as connection:
        chunks = (b" " * 2**16 for _ in range(32))
        connection.request("POST", "/predict", chunks, encode_chunked=True)
        assert connection.getresponse().status == 413


def test_a_body_without_an_end_is_refused_before_it_ends(server):
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head + (b"10000\r\n" + b" " * 2**16 + b"\r\n") * 5)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("method", "path", "status", "sentence"),
    [
        (
            "GET",
            "/",
            404,
            "there is no / here; there is /predict, /live, /ready, /metrics, /openapi.json",
        ),
        ("POST", "/predict/", 404, "there is no /predict/ here; there is /predict, "),
        ("POST", "/predictions", 404, "there is no /predictions here; there is /predict, "),
        ("GET", "/../../etc/passwd", 404, "there is no /../../etc/passwd here"),
        ("GET", "/predict", 405, "/predict takes POST, not GET"),
        ("DELETE", "/predict", 405, "/predict takes POST, not DELETE"),
        ("POST", "/live", 405, "/live takes GET, HEAD, not POST"),
        ("PUT", "/metrics", 405, "/metrics takes GET, HEAD, not PUT"),
    ],
)
def test_a_wrong_path_or_method_gets_a_sentence(server, method, path, status, sentence):
    answered, content, headers = server.request(method, path)
    assert answered == status
    assert sentence in json.loads(content)["error"]
    assert ("Allow" in headers) == (status == 405)


def test_what_is_not_http_is_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert server.ask([ROW])[0] == 200


def test_clients_that_stall_or_leave_hold_nobody_up(server):
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
            stack.enter_context(connection)
            connection.sendall(head + b'{"features"')
        assert {server.ask([ROW])[0] for _ in range(20)} == {200}
    assert {server.ask([ROW])[0] for _ in range(20)} == {200}
    whole = json.dumps({"features": rows(1024, 0)}).encode()
    for _ in range(50):  # these leave when their request is whole, before the answer
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(head.replace(b"1000", str(len(whole)).encode()) + whole)
    assert {server.ask([ROW])[0] for _ in range(20)} == {200}


NUMBERS = st.one_of(
    st.integers(-5, 5), st.floats(width=32), st.floats(), st.just("1"), st.booleans()
)
REQUESTS = st.one_of(
    st.fixed_dictionaries(
        {"features": st.lists(st.lists(NUMBERS, min_size=3, max_size=5), max_size=3)},
        optional={"more": st.none()},
    ).map(lambda body: json.dumps(body).encode()),
    st.lists(st.lists(st.floats(-1e30, 1e30), min_size=4, max_size=4), min_size=1, max_size=9).map(
        lambda features: json.dumps({"features": features}).encode()
    ),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["features", "x"]), inner),
    ).map(lambda body: json.dumps(body).encode()),
    st.binary(max_size=200),
)


def acceptable(body: bytes) -> list | None:
    """Return the features of `body` where they should be answered; decided without its code."""
    try:
        content = json.loads(body, parse_constant=lambda name: name)
    except ValueError:
        return None
    if not isinstance(content, dict) or content.keys() != {"features"}:
        return None
    features = content["features"]
    if not isinstance(features, list) or not features:
        return None
    for row in features:
        if not isinstance(row, list) or len(row) != 4:
            return None
        if not all(type(value) in (int, float) and abs(value) <= 1e30 for value in row):
            return None
    return features


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=REQUESTS)
def test_whatever_is_sent_is_answered_right_or_refused(server, model, body):
    status, content, _ = server.request("POST", "/predict", body)
    features = acceptable(body)
    if features is None:
        assert status in (400, 422)
        assert json.loads(content)["error"]
    else:
        assert status == 200
        assert right(model, features, json.loads(content))


def test_the_description_is_valid_openapi_and_true(server, tmp_path):
    description = json.loads(server.request("GET", "/openapi.json")[1])
    openapi_spec_validator.validate(description)
    url = f"http://127.0.0.1:{server.port}/openapi.json"
    command = [sys.executable, "-m", "schemathesis.cli", "run", url, "--checks", "all"]
    done = subprocess.run(
        [*command, "--max-examples", "100"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "No issues found" in done.stdout


# How it lives and ends


class Load:
    """Eight clients that ask without pause, and note what happens to them."""

    def __init__(self, server: Server, model: torch.nn.Module) -> None:
        self.server, self.model = server, model
        self.outcomes: Counter[str] = Counter()
        self.go_on = True
        self.threads = [threading.Thread(target=self.ask, args=(seed,)) for seed in range(8)]

    def ask(self, seed: int) -> None:
        connection = self.server.connect()
        seeds = itertools.count(seed, step=8)
        while self.go_on:
            features = rows(2, next(seeds))
            try:
                connection.request("POST", "/predict", json.dumps({"features": features}))
                response = connection.getresponse()
                answer = json.load(response)
                good = response.status == 200 and right(self.model, features, answer)
                self.outcomes["right" if good else f"{response.status} {answer}"] += 1
            except ConnectionRefusedError:
                self.outcomes["refused"] += 1
            except http.client.IncompleteRead:
                self.outcomes["cut short"] += 1
            except (ConnectionError, http.client.HTTPException):
                self.outcomes["cut"] += 1
            else:
                continue
            connection.close()
        connection.close()

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        self.until(lambda: self.outcomes["right"] > 200)
        return self

    def until(self, condition) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, self.outcomes
            time.sleep(0.01)

    def __exit__(self, *error: object) -> None:
        self.go_on = False
        for thread in self.threads:
            thread.join()


def test_a_worker_killed_under_load_is_replaced_and_only_its_clients_notice(checkpoint, model):
    with (
        Server("--workers", "2", "--checkpoint", str(checkpoint)) as running,
        Load(running, model) as load,
    ):
        for victim in running.workers:
            answered = running.metric("answer_seconds_count")
            os.kill(victim, signal.SIGKILL)
            found = running.await_line(r"a worker died +(\d+); \d+ takes its place")
            assert int(found[1]) == victim
            before = load.outcomes["right"]
            load.until(lambda: len(running.listening()) == 2)
            assert load.outcomes["right"] > before, "the other worker went on"
            assert running.metric("answer_seconds_count") > answered, "what was counted is kept"
        load.go_on = False
        for thread in load.threads:
            thread.join()
        # uvicorn writes the head of an answer, then its body: the kill can come between.
        lost = load.outcomes.keys() - {"right"}
        assert lost <= {"cut", "cut short"}, "never a wrong answer, never a refusal"
        assert sum(load.outcomes[name] for name in lost) <= 32, (
            "one or two of each connection, a kill"
        )
        status, rest = running.stop()
        assert (status, "stopped" in rest) == (0, True)


def test_sigterm_finishes_what_was_accepted(checkpoint, model):
    options = ("--workers", "1", "--wait", "2000", "--checkpoint", str(checkpoint))
    with Server(*options) as running, contextlib.ExitStack() as stack:
        asked = []
        for seed in range(20):
            connection = stack.enter_context(contextlib.closing(running.connect()))
            features = rows(2, seed)
            connection.request("POST", "/predict", json.dumps({"features": features}))
            asked.append((connection, features))
        # When a later connection has its answer, the event loop has seen those that came before.
        assert running.request("GET", "/live")[0] == 200
        status, rest = running.stop()
        assert (status, "stopped" in rest) == (0, True)
        for connection, features in asked:
            response = connection.getresponse()
            assert response.status == 200
            assert right(model, features, json.load(response))


def test_sigterm_under_load_cuts_no_answer_short(checkpoint, model):
    with (
        Server("--workers", "2", "--checkpoint", str(checkpoint)) as running,
        Load(running, model) as load,
    ):
        status, rest = running.stop()
        assert (status, "stopped" in rest) == (0, True)
        load.until(lambda: load.outcomes["refused"] > 8)
    assert load.outcomes.keys() <= {"right", "cut", "refused"}


def test_a_client_that_never_finishes_its_request_does_not_hold_the_end_up(checkpoint):
    with (
        Server("--workers", "1", "--checkpoint", str(checkpoint)) as running,
        socket.create_connection(("127.0.0.1", running.port), timeout=30) as stalled,
    ):
        stalled.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        assert running.request("GET", "/live")[0] == 200
        assert running.stop()[0] == 0


def test_when_it_is_killed_its_workers_end_too(checkpoint):
    with Server("--workers", "2", "--checkpoint", str(checkpoint)) as running:
        running.process.kill()
        running.process.wait()
        assert "Traceback" not in running.process.stdout.read(), (
            "the pipe ends with the last worker"
        )
        for pid in running.workers:
            assert (
                not Path(f"/proc/{pid}").exists()
                or "zombie" in Path(f"/proc/{pid}/status").read_text()
            )


def test_it_listens_on_loopback_alone_and_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Server("--workers", "2", "--checkpoint", str(checkpoint)) as running:
        assert any(tmp_path.iterdir())
        assert set(running.listening()) == {"0100007F"}, "127.0.0.1, its bytes in reverse"
        assert running.stop()[0] == 0
    assert list(tmp_path.iterdir()) == []


def refused(*options: str) -> tuple[int, str]:
    """Return the exit status, and what stands on standard error, of a service that cannot start."""
    command = [sys.executable, "-m", "real_world.serve", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_a_taken_port_and_a_bad_checkpoint_get_a_sentence(server, checkpoint, tmp_path):
    status, error = refused("--port", str(server.port), "--checkpoint", str(checkpoint))
    assert (status, error) == (
        1,
        f"serve: cannot listen on 127.0.0.1 port {server.port}: Address already in use; "
        "--port 0 takes a free one\n",
    )
    status, error = refused("--host", "nowhere.invalid", "--checkpoint", str(checkpoint))
    assert (status, error.count("\n")) == (1, 1)
    assert "serve: cannot listen on nowhere.invalid port 8000: " in error
    torn = tmp_path / "torn.pt"
    torn.write_bytes(checkpoint.read_bytes()[:-100])
    status, error = refused("--port", "0", "--checkpoint", str(torn))
    assert (status, error.count("\n")) == (1, 1)
    assert f"serve: cannot load {torn} (BadZipFile: " in error
    broken, *rest = lesson.load_checkpoint(checkpoint)
    with torch.no_grad():
        broken.fc2.bias[0] = math.nan
    lesson.save_checkpoint(tmp_path / "nan.pt", broken, *rest)
    status, error = refused("--port", "0", "--checkpoint", str(tmp_path / "nan.pt"))
    assert (status, error.count("\n")) == (1, 1)
    assert "holds weights that are not finite" in error


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--port 65536", "'65536' is not a whole number from 0 to 65535"),
        ("--workers 0", "'0' is not a whole number from 1 to 1000"),
        ("--wait -1", "'-1' is not a whole number from 0 to 2000"),
        ("--network onnx", "invalid choice: 'onnx'"),
        ("--device tpu", "'tpu' is not available (choose from auto, cpu"),
        ("--prot 80", "unrecognized arguments: --prot"),
    ],
)
def test_a_wrong_option_gets_one_sentence_and_status_2(options, sentence):
    status, error = refused(*options.split())
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("serve: ")
    assert sentence in error


def test_without_a_compiler_a_compiled_network_gets_a_sentence(checkpoint, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    options = ("--port", "0", "--network", "compile", "--checkpoint", str(checkpoint))
    status, error = refused(*options)
    assert (status, error.count("\n")) == (1, 1)
    assert error.startswith("serve: --network compile cannot be built: No working")


def test_a_network_that_answers_no_number_and_one_in_float64_are_served(checkpoint, tmp_path):
    large, *rest = lesson.load_checkpoint(checkpoint)
    with torch.no_grad():
        large.fc2.weight *= 1e12
    large.double()
    lesson.save_checkpoint(tmp_path / "large.pt", large, *rest)
    with Server("--workers", "1", "--checkpoint", str(tmp_path / "large.pt")) as running:
        status, answer = running.ask([[1e30, 1e30, 1e30, 1e30]])
        assert (status, answer) == (
            422,
            {"error": "the features are so large that the answer is no number"},
        )
        assert running.ask([[0, 0, 0, 0]])[0] == 200


def test_two_servers_that_start_at_once_do_not_share_a_port(checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
    command = [sys.executable, "-m", "real_world.serve", "--port", port, "--workers", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [
        subprocess.Popen(
            [*command, "--checkpoint", checkpoint], cwd=ROOT, start_new_session=True, **pipes
        )
        for _ in range(2)
    ]
    try:
        while all(process.poll() is None for process in both):
            time.sleep(0.01)
        (loser,) = (process for process in both if process.poll() is not None)
        assert loser.returncode == 1
        assert re.match(
            rf"serve: (another server is starting|cannot listen) on 127.0.0.1 port {port}",
            loser.stderr.read(),
        )
    finally:
        for process in both:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_a_reader_of_the_transcript_who_leaves_does_not_end_the_service(checkpoint):
    with Server("--workers", "2", "--checkpoint", str(checkpoint)) as running:
        running.process.stdout.close()
        os.kill(running.workers[0], signal.SIGKILL)
        end = time.monotonic() + 60
        victim = Path(f"/proc/{running.workers[0]}")
        while victim.exists() or len(running.listening()) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert running.ask([ROW])[0] == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0


def test_workers_that_cannot_start_end_it_and_are_not_replaced_for_ever(checkpoint):
    """A network on the meta device has shapes and no numbers, so its first answer fails."""
    script = textwrap.dedent(
        f"""
        import sys, torch
        from pathlib import Path
        from real_world import run, serve

        where = (Path({str(checkpoint)!r}), "127.0.0.1", 0, 2, "eager", torch.device("meta"), 0.0)
        if __name__ == "__main__":
            sys.exit(run("serve", lambda: serve.serve(*where)))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.endswith("\nserve: a worker could not start; it says above why\n")
    assert "a worker died" not in done.stdout


def test_a_checkpoint_that_is_not_there_gets_a_sentence(tmp_path):
    path = tmp_path / "lessson.pt"
    status, error = refused("--port", "0", "--checkpoint", str(path))
    sentence = f"serve: there is no {path}; without --checkpoint the lesson's is served\n"
    assert (status, error) == (1, sentence)
    assert not path.exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_it_is_ready_ends_it_without_a_traceback(checkpoint, signum):
    command = [sys.executable, "-m", "real_world.serve", "--port", "0", "--checkpoint", checkpoint]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            said = ""
            while " on cpu" not in said and " on cuda" not in said:
                said += process.stdout.readline()
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            while not children.read_text():
                assert process.poll() is None
                time.sleep(0.01)
            os.killpg(process.pid, signum)  # to all, as a terminal does
            rest = process.communicate(timeout=60)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in rest
    assert process.returncode == 0
