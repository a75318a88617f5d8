"""The service against a plain endpoint, under load."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import lesson_code as lesson
from real_world import lesson_checkpoint
from real_world.benchmark import BLUE, RED, ROOT, Entry, drawing, markdown

if TYPE_CHECKING:
    from fastapi import FastAPI


def plain_endpoint() -> FastAPI:
    """Return what a tutorial would write: FastAPI, and the network called inside the request."""
    from fastapi import Body, FastAPI

    model, _, _ = lesson.load_checkpoint(lesson.OUTPUT / "lesson.pt")
    app = FastAPI()

    @app.post("/predict")
    async def predict(features: list[list[float]] = Body(embed=True)) -> dict:  # noqa: B008
        classes, probabilities = lesson.predict(model, torch.tensor(features))
        return {"classes": classes.tolist(), "probabilities": probabilities.tolist()}

    return app


@contextlib.contextmanager
def started(module: str, *options: str) -> Iterator[str]:
    """Run `python -m module` on a free port until the block ends; yield the URL that it prints."""
    command = [sys.executable, "-m", module, "--port", "0", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as server:
        said = ""
        try:
            while not (found := re.search(r"http://[\d.]+:\d+", said)):
                if not (line := server.stdout.readline()):
                    raise OSError(f"{module} ended; it said: {said}")
                said += line
            yield found[0]
        finally:
            server.terminate()


# wrk, a load generator in C, takes little of the two cores that it shares with the server.
SCRIPT = """
wrk.method = "POST"
wrk.body = '{"features": [[0.5, -1.2, 0.3, 0.8]]}'
wrk.headers["Content-Type"] = "application/json"
function done(summary, latency, requests)
  local errors = summary.errors
  local bad = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format('{"rate": %f, "p50": %f, "p99": %f, "errors": %d}',
    summary.requests / summary.duration * 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, bad))
end
"""


def load(url: str, connections: int, seconds: int) -> dict[str, float]:
    """Return requests a second, the p50 and p99 latency in milliseconds, and the errors."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(SCRIPT)
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "-s", script.name]
        done = subprocess.run([*command, f"{url}/predict"], capture_output=True, check=True)
    return json.loads(done.stdout[done.stdout.rindex(b"{") :])


def until_answered(url: str) -> None:
    """Wait until the endpoint at `url` answers: its workers import PyTorch first."""
    body = b'{"features": [[0.5, -1.2, 0.3, 0.8]]}'
    request = urllib.request.Request(f"{url}/predict", body, {"Content-Type": "application/json"})
    for _ in range(600):
        try:
            urllib.request.urlopen(request, timeout=60).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise OSError(f"{url} does not answer")


CONNECTIONS = (1, 32, 128)


def measure(quick: bool) -> dict[str, Any]:
    """Load `serve` and a plain FastAPI endpoint, in turn; return the medians by connections."""
    rounds, seconds = (1, 1) if quick else (5, 3)
    if not shutil.which("wrk"):
        raise OSError("this entry needs wrk: apt install wrk, or brew install wrk")
    lesson_checkpoint(lesson.OUTPUT / "lesson.pt")
    plain = ("uvicorn", "--factory", f"{__name__}:plain_endpoint", "--no-access-log")
    cores = str(os.cpu_count())
    servers = {
        f"serve, {cores} workers": ("real_world.serve", "--workers", cores),
        "serve, 1 worker": ("real_world.serve", "--workers", "1"),
        "FastAPI, 1 worker": plain,
        f"FastAPI, {cores} workers": (*plain, "--workers", cores),
    }
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        urls = {name: stack.enter_context(started(*server)) for name, server in servers.items()}
        for url in urls.values():
            until_answered(url)
        turns = list(itertools.product(range(rounds), CONNECTIONS, urls.items()))
        for _, connections, (name, url) in tqdm(turns, "service", leave=False, disable=None):
            runs.setdefault((name, connections), []).append(load(url, connections, seconds))
    results: dict[str, Any] = {name: {} for name in servers}
    for (name, connections), measured in runs.items():
        columns = {key: [round(run[key], 3) for run in measured] for key in measured[0]}
        medians = {key: statistics.median(values) for key, values in columns.items()}
        lowest, highest = min(columns["rate"]), max(columns["rate"])
        spread = {"lowest": lowest, "highest": highest, "errors": sum(columns["errors"])}
        results[name][str(connections)] = medians | spread
    return results


def headline(results: dict[str, Any]) -> str:
    """Return what the README's table of claims says."""
    ours, plain = (next(iter(results.values()))["128"], results["FastAPI, 1 worker"]["128"])
    alike = list(results.values())[-1]["128"]  # a plain endpoint with as many workers
    times = f"{ours['rate'] / plain['rate']:.1f} times the requests of a plain FastAPI endpoint"
    more = f"{ours['rate'] / alike['rate']:.1f} times those of one with as many workers"
    slowest = f"{ours['p99']:.0f} ms instead of {plain['p99']:.0f} and {alike['p99']:.0f}"
    return f"{times}, {more}; 99 of 100 within {slowest}"


def table(results: dict[str, Any]) -> str:
    """Return the README's table: by connections, what each server does."""
    base, rows = results["FastAPI, 1 worker"], []
    for connections in base:
        for name, measured in ((name, by[connections]) for name, by in results.items()):
            low, middle, high = (f"{measured[key]:,.0f}" for key in ("lowest", "rate", "highest"))
            ratio = f"{measured['rate'] / base[connections]['rate']:.2f} x"
            latency = (f"{measured[key]:.2f} ms" for key in ("p50", "p99"))
            rate = f"{middle} ({low} to {high})"
            rows.append((connections, name, rate, ratio, *latency, f"{measured['errors']:.0f}"))
    header = ("connections", "server", "requests a second", "ratio", "p50", "p99", "errors")
    return markdown(header, rows, left=2)


def chart(results: dict[str, Any], path: Path) -> None:
    """Draw throughput and tail latency by the number of connections, as a PNG."""
    styles = ((BLUE, "o-"), (BLUE, "o--"), (RED, "s--"), (RED, "s-"))
    with drawing(path, 12, 4, columns=2) as (rates, tails):
        for (name, by), (color, style) in zip(results.items(), styles, strict=True):
            look = {"color": color, "label": name, "mfc": "white" if "--" in style else color}
            rates.plot(list(by), [by[c]["rate"] for c in by], style, **look)
            tails.plot(list(by), [by[c]["p99"] for c in by], style, **look)
        rates.set(title="Throughput", xlabel="connections", ylabel="requests a second", ylim=0)
        tails.set(title="99 of 100 are answered within", xlabel="connections", ylabel="ms")
        tails.set_yscale("log")
        for axes in (rates, tails):
            axes.legend(frameon=False, loc="upper left")
            axes.yaxis.set_major_formatter("{x:,g}")


ENTRY = Entry(
    "Requests arrive via an API gateway ... and are batched", measure, headline, table, chart
)
