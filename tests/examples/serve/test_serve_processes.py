"""The service as its operators meet it: bad clients, signals, lost workers, the command line."""

import contextlib
import json
import os
import pty
import resource
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from processes import ROOT, is_running, wait_until
from serve_run import COMMAND, POST, ROW, Server, assert_correct, random_rows

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
