"""The service as its operators meet it: bad clients, signals, lost workers, the command line."""

import contextlib
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from processes import ROOT, children, is_running, start, wait_until
from serve_run import COMMAND, POST, ROW, Server, assert_correct, random_rows

import lesson_code as lesson
from real_world.serve import monitor

# Clients that behave badly


class SlowClients(NamedTuple):
    """Connections, and the workers' memory before them."""

    memory_before: int
    connections: list[socket.socket]
    metrics: list[socket.socket]


@pytest.fixture(scope="module")
def slow_clients(server) -> Iterator[SlowClients]:
    """Connect 3,000 clients that send no request, two that send a part of one, 200 for metrics.

    The service closes them after 30 seconds, in which the other tests of this file run.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    memory = server.memory()
    address = ("127.0.0.1", server.metrics_port)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(address)) for _ in range(200)]
        sent = [b""] * 3000 + [POST, POST + b"\r\n{"]
        slow = [stack.enter_context(server.connect(data)) for data in sent]
        yield SlowClients(memory, slow, idle)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_others_are_served_beside_slow_and_endless_clients(server, model, slow_clients):
    with server.connect(POST + b"X: ") as endless:
        with pytest.raises(ConnectionError):  # closed at a limit
            endless.sendall(b"x" * 2**26)
        for _ in range(100):
            assert_correct(model, [ROW], server.predict([ROW]))
        assert server.memory() - slow_clients.memory_before < 2**27


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


def test_worker_whose_model_always_fails_is_replaced(tmp_path):
    wide = lesson.SimpleClassifier(4, 20_000, 3)  # 1,024 rows need 82 MB
    lesson.save_checkpoint(tmp_path / "wide.pt", wide, torch.optim.Adam(wide.parameters()), [])
    features = random_rows(1024, 0)
    with Server("--workers", 1, "--checkpoint", tmp_path / "wide.pt") as running:
        pid = running.workers[0]
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        resource.prlimit(pid, resource.RLIMIT_AS, (pages * 4096 + 2**24, pages * 4096 + 2**24))
        assert [running.predict(features)[0] for _ in range(10)] == [500] * 10
        assert running.read_until(r"worker died +(\d+), exit status 1")[1] == str(pid)
        wait_until(lambda: answers(running))
        assert_correct(wide, features, running.predict(features))


def test_sigterm_while_a_container_starts():
    """Linux drops a SIGTERM for which PID 1 has no handler."""
    container = ("unshare", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child")
    with start(*container, *COMMAND) as process:
        wait_until(lambda: children(process))
        (pid,) = children(process)
        wait_until(lambda: "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text())
        os.kill(pid, signal.SIGTERM)
        assert process.wait() == 0


def test_worker_that_cannot_start_ends_the_service_and_names_its_exit_status(checkpoint):
    options = ("--workers", 1, "--backend", "compile", "--checkpoint", checkpoint)
    with pytest.raises(AssertionError, match=r"worker died +\d+, exit status 1") as ended:
        Server(*options, PATH="/nowhere")
    assert str(ended.value).count("worker died") == 1
    assert "error: a worker could not start, or workers keep dying" in str(ended.value)


def test_supervisor_gives_up_after_five_deaths_in_five_minutes(monkeypatch):
    received = []
    previous = signal.signal(signal.SIGTERM, lambda signum, _: received.append(signum))
    clock = iter([0, 200, 250, 299, 300, 301])  # the first one is 300 seconds old at the fifth
    monkeypatch.setattr(monitor, "time", SimpleNamespace(monotonic=clock.__next__))
    supervisor = monitor.Monitor(workers=2, url="")
    supervisor.ready = True
    for pid in range(5):
        supervisor.on_exit(pid, -signal.SIGKILL)
        assert (supervisor.failed, received) == (False, [])
    supervisor.on_exit(5, -signal.SIGKILL)
    signal.signal(signal.SIGTERM, previous)
    assert (supervisor.failed, received) == (True, [signal.SIGTERM])


@pytest.mark.parametrize(
    ("send", "signum"), [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGHUP)]
)
def test_accepted_requests_are_answered_and_others_not_waited_for(checkpoint, send, signum):
    options = ("--workers", 1, "--batch-timeout-ms", 2000, "--checkpoint", checkpoint)
    body = json.dumps({"features": [ROW]}).encode().ljust(99)
    with Server(*options) as running, contextlib.ExitStack() as stack:
        stack.enter_context(running.connect(POST + b"\r\n{"))
        accepted = [stack.enter_context(running.connect(POST + b"\r\n" + body)) for _ in range(20)]
        running.request("GET", "/ready")  # came later, and has its response
        send(running.process.pid, signum)  # SIGHUP: of a terminal that is closed, to all processes
        assert running.process.wait() == 0
        for connection in accepted:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def answers(running: Server) -> bool:
    with contextlib.suppress(ConnectionError):  # the killed worker's port may still reset one
        return running.predict([ROW])[0] == 200
    return False


@pytest.mark.parametrize(
    ("how", "workers", "status"),
    [
        ("supervisor killed", 2, -signal.SIGKILL),
        ("no file left for a new worker", 2, 1),
        ("output closed", 1, 0),
    ],
)
def test_workers_end_with_the_supervisor(checkpoint, how, workers, status):
    with Server("--workers", workers, "--checkpoint", checkpoint) as running:
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


def test_unix_domain_socket_and_access_log(checkpoint, tmp_path):
    options = ("--uds", tmp_path / "serve", "--workers", 1, "--checkpoint", checkpoint)
    curl = ["curl", "--silent", "--unix-socket", tmp_path / "serve", "http://localhost/ready"]
    with Server(*options) as killed:
        killed.process.kill()
        wait_until(lambda: not is_running(killed.workers[0]))
    with Server(*options, "--access-log") as running:
        done = subprocess.run([*curl, "--header", "X-Request-ID: 4711"], capture_output=True)
        assert json.loads(done.stdout)["status"] == "ready"
        assert running.read_until(r'"GET /ready" 200 [\d.]+ ms 4711$')
        error = f"error: cannot listen on {tmp_path}/serve: Address already in use\n"
        assert run_serve(*options) == (1, error)
        assert running.stop()[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_few_open_files_limit_the_connections_and_nohup_is_respected(checkpoint):
    options = ("--workers", 1, "--checkpoint", checkpoint)
    with Server(*options, prefix=("nohup", "prlimit", "--nofile=128")) as running:
        os.kill(running.process.pid, signal.SIGHUP)
        assert "connections per worker           28, because `ulimit -Hn` is 128" in running.output
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(running.connect())
        assert running.predict([ROW])[0] == 200


# The command line


def run_serve(*options: object, shell: str = "") -> tuple[int, str]:
    command = ["bash", "-c", f"{shlex.join([*COMMAND, *map(str, options)])} {shell}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def test_mistakes_get_one_line(server, checkpoint, tmp_path):
    options = ("--port", server.port, "--checkpoint", checkpoint)
    in_use = (1, f"error: cannot listen on 127.0.0.1 port {server.port}: Address already in use\n")
    assert run_serve(*options) == run_serve(*options, shell=">&-") == in_use
    assert server.request("GET", "/", port=server.metrics_port)[0] == 404
    status, error = run_serve("--checkpoint", tmp_path / "lessson.pt")
    assert (status, error) == (1, f"error: there is no {tmp_path}/lessson.pt\n")


@pytest.mark.parametrize("option", [["--host", ""], ["--metrics-host", "x"], ["--workers", 0]])
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


def test_slow_clients_are_closed(slow_clients):
    responses = [connection.recv(20) for connection in slow_clients.connections]
    assert set(responses[:-1]) <= {b"", b"HTTP/1.1 408 Request"}
    assert responses[-1] == b"HTTP/1.1 408 Request"
    received = {connection.recv(1) for connection in slow_clients.metrics}
    assert received == {b""}, "closed, with their threads"
