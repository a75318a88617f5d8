"""The throughput and latency of serve, FastAPI and LitServe, under load by wrk."""

import contextlib
import functools
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from real_world.benchmark import harness
from real_world.common import OUTPUT, CheckFailed, load_lesson_model

QUOTE = "Requests arrive via an API gateway ... and are batched"

CORES = str(os.cpu_count())
SERVE = ("real_world.serve", "--metrics-port", "0")
APP = "real_world.benchmark.fastapi_app:create_app"
FASTAPI = ("uvicorn", "--factory", APP, "--log-level", "warning", "--no-access-log")
SERVERS = {
    f"serve, {CORES} workers": (*SERVE, "--workers", CORES),
    "serve, 1 worker": (*SERVE, "--workers", "1"),
    f"FastAPI, {CORES} workers": (*FASTAPI, "--workers", CORES),
    "FastAPI, 1 worker": FASTAPI,
    f"LitServe, {CORES} workers": ("real_world.benchmark.litserve_app", "--workers", CORES),
}
BASELINE = "FastAPI, 1 worker"
CONNECTIONS = (1, 32, 128)
BODY = b'{"features": [[0.5, -1.2, 0.3, 0.8]]}'


# %% Measure
def free_port() -> int:
    """Return a port that no process uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    """Return whether a server answers yet; its workers first import torch.

    Raises RuntimeError if it refuses the request.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/predict", BODY, {"Content-Type": "application/json"})
        response = connection.getresponse()
    except OSError:
        return False
    finally:
        connection.close()
    if 400 <= response.status < 500:
        raise RuntimeError(f"status {response.status} for {BODY.decode()}")
    return response.status == 200


class Server(NamedTuple):
    """A server that runs in a process group of its own."""

    url: str
    process_group: int


@contextlib.contextmanager
def run_server(module: str, *options: str) -> Iterator[Server]:
    """Run `python -m module` on a free port until the block ends, suspended at first."""
    port = free_port()
    command = [sys.executable, "-m", module, "--port", str(port), *options]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        command, cwd=harness.ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    ) as server:
        try:
            while not answers(port):
                if server.poll() is not None:
                    raise RuntimeError(f"{module} ended with status {server.returncode}")
                time.sleep(0.1)
            os.killpg(server.pid, signal.SIGSTOP)
            yield Server(url, server.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # also the workers, which LitServe leaves


def generate_load(server: Server, connections: int, seconds: int) -> dict[str, float]:
    """Return the requests per second, and the p50 and p99 latencies in ms.

    The other servers are suspended: some use the CPU even without requests.
    """
    script = str(Path(__file__).with_name("predict.lua"))
    options = ["-t1", f"-c{connections}", f"-d{seconds}", "--timeout", "10s", "-s", script]
    command = ["wrk", *options, f"{server.url}/predict"]
    os.killpg(server.process_group, signal.SIGCONT)
    output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    os.killpg(server.process_group, signal.SIGSTOP)
    measured = json.loads(output[output.rindex("{") :])
    if errors := measured.pop("errors"):
        raise CheckFailed(f"check failed: {errors} of wrk's requests to {server.url} failed")
    return measured


def measure(quick: bool) -> dict[str, Any]:
    """Load all servers, by number of connections, in five rounds of three seconds each."""
    if shutil.which("wrk") is None:
        sys.exit("error: the entry serve needs wrk (apt install wrk, or brew install wrk)")
    rounds, seconds = (1, 1) if quick else (5, 3)
    load_lesson_model(OUTPUT / "lesson.pt")  # trains and saves one if there is none
    results: dict[str, Any] = {name: {} for name in SERVERS}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(run_server(*args)) for name, args in SERVERS.items()}
        for connections in CONNECTIONS:
            candidates = {
                name: functools.partial(generate_load, server, connections, seconds)
                for name, server in servers.items()
            }
            runs = harness.interleave(candidates, rounds, f"serve, {connections} connections")
            for name, measured in runs.items():
                results[name][str(connections)] = {
                    key: harness.summarize([run[key] for run in measured]) for key in measured[0]
                }
    return results


# %% Show
def table(results: dict[str, Any]) -> str:
    """Return requests per second by server and connections; the rest at most connections."""
    most = str(CONNECTIONS[-1])
    header = ["requests per second at", *(f"{n:,} connection{'s' * (n > 1)}" for n in CONNECTIONS)]
    header += [f"{most}, relative to FastAPI", f"{most}, p99 latency (ms)"]
    baseline = results[BASELINE][most]["rate"]["median"]
    rows = []
    for server, by_connections in results.items():
        rates = [f"{load['rate']['median']:,.0f}" for load in by_connections.values()]
        load = by_connections[most]
        ratio = harness.format_ratio(load["rate"]["median"], baseline)
        rows.append([server, *rates, ratio, harness.format_number(load["p99"]["median"])])
    return harness.markdown_table(header, rows)


def plot(results: dict[str, Any], path: Path) -> None:
    """Save a figure: throughput and p99 latency by the number of connections."""
    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = ("C0o-", "C0o--", "C1s-", "C1s--", "C2^-")
    for (server, by_connections), style in zip(results.items(), styles, strict=True):
        loads = by_connections.values()
        left.plot(
            list(by_connections), [load["rate"]["median"] for load in loads], style, label=server
        )
        right.plot(list(by_connections), [load["p99"]["median"] for load in loads], style)
    left.set(title="Throughput", xlabel="connections", ylabel="requests per second", ylim=0)
    left.yaxis.set_major_formatter("{x:,.0f}")
    left.legend(frameon=False)
    right.set(title="p99 latency", xlabel="connections", ylabel="ms", yscale="log")
    right.yaxis.set_major_formatter("{x:g}")
    figure.savefig(path)
