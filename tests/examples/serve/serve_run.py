"""The service as a process, and what its tests send to it."""

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
from pathlib import Path

import torch
from processes import ROOT

import lesson_code as lesson

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
        self.watchdog.daemon = True
        self.watchdog.start()
        self.output = ""
        self.metrics_port = int(self.read_until(r"GET /metrics on port (\d+)")[1])
        self.workers = [int(pid) for pid in self.read_until(r"processes +(.*)")[1].split(", ")]
        self.port = int(self.read_until(r"listening on .*?(\d*) \(")[1] or 0)

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

    def request(self, method: str, path: str, body=None, port=0, **headers) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()

    def predict(self, features: object) -> tuple[int, dict]:
        status, body = self.request("POST", "/predict", json.dumps({"features": features}))
        return status, json.loads(body)

    def metric(self, name: str) -> float:
        text = self.request("GET", "/metrics", port=self.metrics_port)[1].decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found, f"no {name} in {text}"
        return float(found[1])

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
