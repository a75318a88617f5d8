"""Every ratio that `real_world/README.md` quotes, measured side by side in one run.

    python -m real_world.benchmark            all entries
    python -m real_world.benchmark service    one

What is compared is timed alternately, round after round, and reported as medians: another process
that wakes up then slows all alike. With `--write`, results go to `docs/benchmark.json`, charts
beside it, and headlines and tables into the README.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.metadata
import inspect
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import lesson_code as lesson
from real_world import distributed, lesson_checkpoint, llama, parser, run, shown, stable_diffusion
from real_world.digits import load_digits

if TYPE_CHECKING:
    from fastapi import FastAPI

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "benchmark.json"
README = ROOT / "real_world" / "README.md"


# %% The service against a plain endpoint


def plain_endpoint() -> FastAPI:
    """Return what a tutorial would write: FastAPI, and the network called inside the request."""
    from fastapi import Body, FastAPI

    model = lesson.load_checkpoint(lesson.CHECKPOINTS / "lesson.pt").model
    app = FastAPI()

    @app.post("/predict")
    async def predict(features: list[list[float]] = Body(embed=True)) -> dict:  # noqa: B008
        classes, probabilities = lesson.predict(model, features)
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
    if not shutil.which("wrk"):
        raise OSError("this entry needs wrk: apt install wrk, or brew install wrk")
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


def service(rounds: int = 5, seconds: int = 3) -> dict[str, Any]:
    """Load `serve` and a plain FastAPI endpoint, in turn; return the medians by connections."""
    lesson_checkpoint(lesson.CHECKPOINTS / "lesson.pt")
    plain = ("uvicorn", "--factory", "real_world.benchmark:plain_endpoint", "--no-access-log")
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


def service_headline(results: dict[str, Any]) -> str:
    """Return what the README's table of claims says of `service`."""
    ours, plain = (next(iter(results.values()))["128"], results["FastAPI, 1 worker"]["128"])
    alike = list(results.values())[-1]["128"]  # a plain endpoint with as many workers
    times = f"{ours['rate'] / plain['rate']:.1f} times the requests of a plain FastAPI endpoint"
    more = f"{ours['rate'] / alike['rate']:.1f} times those of one with as many workers"
    return f"{times}, {more}; 99 of 100 within {ours['p99']:.0f} ms instead of {plain['p99']:.0f}"


def service_table(results: dict[str, Any]) -> str:
    """Return the README's table of `service`'s results."""
    base = results["FastAPI, 1 worker"]
    lines = ["| connections | server | requests a second | ratio | p50 | p99 | errors |"]
    lines.append("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for connections in base:
        for name, measured in ((name, by[connections]) for name, by in results.items()):
            rate = (
                f"{measured['rate']:,.0f} ({measured['lowest']:,.0f} to {measured['highest']:,.0f})"
            )
            ratio = f"{measured['rate'] / base[connections]['rate']:.2f} x"
            latency = f"{measured['p50']:.2f} ms | {measured['p99']:.2f} ms"
            row = (connections, name, rate, ratio, latency, f"{measured['errors']:.0f}")
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def service_chart(results: dict[str, Any], path: Path) -> None:
    """Draw throughput and tail latency by the number of connections, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    rates, tails = figure.subplots(1, 2)
    styles = (("#0969da", "o-"), ("#0969da", "o--"), ("#cf222e", "s--"), ("#cf222e", "s-"))
    for (name, by), (color, style) in zip(results.items(), styles, strict=True):
        look = {"color": color, "label": name, "mfc": "white" if "--" in style else color}
        rates.plot(list(by), [by[c]["rate"] for c in by], style, **look)
        tails.plot(list(by), [by[c]["p99"] for c in by], style, **look)
    rates.set(title="Throughput", xlabel="connections", ylabel="requests a second", ylim=0)
    tails.set(
        title="99 of 100 are answered within", xlabel="connections", ylabel="ms", yscale="log"
    )
    for axes in (rates, tails):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left")
    figure.savefig(path)


# %% The scaling of distributed


def scaling_worker(network: str, samples: int, steps: int) -> None:
    """Train on this process's share of `samples`; rank 0 prints the seconds of a step."""
    torch.set_num_threads(1)
    group = distributed.join({}, "gloo", torch.device("cpu"), seconds=60)
    model = distributed.wide_network(0) if network == "wide" else lesson.SimpleClassifier()
    width = next(model.parameters()).shape[1]
    X, y = lesson.make_synthetic_data(samples, width, 3)
    own = distributed.share(samples, group.rank, group.world)
    copy = DistributedDataParallel(model) if group.world > 1 else model
    optimizer = torch.optim.Adam(copy.parameters(), lr=0.001)
    times = []
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        lesson.train(copy, X[own], y[own], optimizer=optimizer, epochs=steps)
        times.append((time.perf_counter() - start) / steps)
    print(json.dumps(statistics.median(times[1:])), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    distributed.leave(0)


SCALES = {  # network, samples, steps, processes
    "wide network, 4,096 samples": ("wide", 4096, 2, 1),
    "the same work on 2 processes": ("wide", 4096, 2, 2),
    "twice the work on 2 processes": ("wide", 8192, 2, 2),
    "the lesson's, 100 samples": ("lesson", 100, 200, 1),
    "the lesson's on 2 processes": ("lesson", 100, 200, 2),
}


def scaling(rounds: int = 3) -> dict[str, Any]:
    """Time a training step on one process and on two, a thread each, in turn; return medians."""
    runs: dict[str, list[float]] = {}
    turns = list(itertools.product(range(rounds), SCALES.items()))
    for _, (name, (*work, processes)) in tqdm(turns, "scaling", leave=False, disable=None):
        call = f"from real_world import benchmark; benchmark.scaling_worker(*{work})"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *torchrun, "--no-python", sys.executable, "-c", call]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, check=True)
        runs.setdefault(name, []).append(json.loads(done.stdout))
    return {
        name: {"seconds": statistics.median(times), "lowest": min(times), "highest": max(times)}
        for name, times in runs.items()
    }


def scaling_ratios(results: dict[str, Any]) -> tuple[float, float, float]:
    """Return what two processes gain on the same work, on twice the work, and on the lesson's."""
    one, strong, weak, small, small_two = (measured["seconds"] for measured in results.values())
    return one / strong, 2 * one / weak, small / small_two


def scaling_headline(results: dict[str, Any]) -> str:
    """Return what the README's table of claims says of `scaling`."""
    strong, weak, small = scaling_ratios(results)
    grown = f"{strong:.2f} times the speed on the same work, {weak:.2f} times on twice the work"
    return f"{grown}; at the lesson's own size {small:.2f} times: there it loses"


def scaling_table(results: dict[str, Any]) -> str:
    """Return the README's table of `scaling`'s results."""
    strong, weak, small = scaling_ratios(results)
    gains = ("", f"{strong:.2f} x", f"{weak:.2f} x", "", f"{small:.2f} x")
    lines = ["| a training step of | takes | work done in the time, against one process |"]
    lines.append("| --- | ---: | ---: |")
    for (name, measured), gain in zip(results.items(), gains, strict=True):
        spread = " to ".join(f"{measured[key] * 1000:,.2f}" for key in ("lowest", "highest"))
        lines.append(f"| {name} | {measured['seconds'] * 1000:,.2f} ms ({spread}) | {gain} |")
    return "\n".join(lines)


def scaling_chart(results: dict[str, Any], path: Path) -> None:
    """Draw what two processes gain, beside what two cores could give, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    names = ("wide, the same work", "wide, twice the work", "the lesson's size")
    gains = scaling_ratios(results)
    bars = axes.barh(names, gains, color=["#0969da" if gain > 1 else "#cf222e" for gain in gains])
    axes.bar_label(bars, [f"{gain:.2f} x" for gain in gains], label_type="center", color="white")
    for speed, name in ((1, "one process"), (2, "two cores could")):
        axes.axvline(speed, color="#6e7781", lw=1, ls=":", zorder=0)
        axes.text(speed + 0.02, -0.45, name, color="#6e7781", size=8, va="bottom")
    axes.set(title="Two processes against one", xlabel="times the speed", xlim=(0, 2.4))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


# %% Three networks, one train()


def call_of_train(function: Callable) -> str:
    """Return the line with which `function` calls train(), as it stands in its source."""
    tree = ast.parse(inspect.getsource(inspect.unwrap(function)))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    named = (call for call in calls if ast.unparse(call.func).split(".")[-1] == "train")
    return ast.unparse(next(named))


def trainings() -> dict[str, Any]:
    """Train the lesson's network, the Llama and the denoiser; return what each was and became."""
    cpu, digits, text = torch.device("cpu"), load_digits(), llama.library_text()
    torch.manual_seed(0)
    small, model, diffusion = (
        lesson.SimpleClassifier(),
        llama.Llama(llama.MINIATURE),
        stable_diffusion.Diffusion(),
    )
    stable_diffusion.train_autoencoder(diffusion.autoencoder, digits.X, 600)
    with torch.no_grad():
        latents, _ = diffusion.autoencoder.encode(stable_diffusion.as_images(digits.X))
    latents /= latents.std()
    schedule = diffusion.schedule
    runs = {
        "SimpleClassifier": (
            small,
            lesson.trained,
            lambda: lesson.trained.__wrapped__(0, cpu, 100)[0].losses,
        ),
        "Llama": (
            model,
            llama.train_llama,
            lambda: llama.train_llama(model, text[: len(text) * 9 // 10], llama.STEPS, seed=0),
        ),
        "Denoiser, of Stable Diffusion": (
            diffusion.denoiser,
            stable_diffusion.train_denoiser,
            lambda: stable_diffusion.train_denoiser(
                diffusion.denoiser, latents, digits.y, schedule, stable_diffusion.STEPS
            ),
        ),
    }
    results = {}
    for name, (network, trainer, training) in runs.items():
        start = time.perf_counter()
        losses = training()
        results[name] = {
            "parameters": sum(weights.numel() for weights in network.parameters()),
            "line": call_of_train(trainer),
            "seconds": time.perf_counter() - start,
            "steps": len(losses),
            "first": losses[0],
            "last": statistics.mean(losses[-len(losses) // 50 :]),  # of batches, which differ
            "losses": [round(loss, 4) for loss in losses[:: max(1, len(losses) // 200)]],
        }
    return results


def trainings_headline(results: dict[str, Any]) -> str:
    """Return what the README's table of claims says of `trainings`."""
    *sizes, last = (f"{measured['parameters']:,}" for measured in results.values())
    return f"networks of {', '.join(sizes)} and {last} parameters, trained by one `train()`"


def trainings_table(results: dict[str, Any]) -> str:
    """Return the README's table of `trainings`' results."""
    lines = ["| network | parameters | the line that trains it | steps | loss | takes |"]
    lines.append("| --- | ---: | --- | ---: | ---: | ---: |")
    for name, measured in results.items():
        loss = f"{measured['first']:.2f} to {measured['last']:.2f}"
        row = (
            name,
            f"{measured['parameters']:,}",
            f"`{measured['line']}`",
            f"{measured['steps']:,}",
        )
        lines.append(f"| {' | '.join(row)} | {loss} | {measured['seconds']:.2g} s |")
    return "\n".join(lines)


def trainings_chart(results: dict[str, Any], path: Path) -> None:
    """Draw the three losses side by side, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), dpi=120, layout="constrained")
    for axes, (name, measured) in zip(figure.subplots(1, 3), results.items(), strict=True):
        steps = torch.linspace(1, measured["steps"], len(measured["losses"])).tolist()
        axes.plot(steps, measured["losses"], color="#0969da", lw=1)
        axes.set(title=f"{name}: {measured['parameters']:,}", xlabel="step", ylabel="loss", ylim=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


# %% Running it


@dataclass(frozen=True)
class Entry:
    """What is measured, and how it is shown in the README and in a picture."""

    claim: str
    measure: Callable[[], dict[str, Any]]
    headline: Callable[[dict[str, Any]], str]
    table: Callable[[dict[str, Any]], str]
    chart: Callable[[dict[str, Any], Path], None]


ENTRIES = {
    "service": Entry(
        "Requests arrive via an API gateway ... and are batched",
        service,
        service_headline,
        service_table,
        service_chart,
    ),
    "scaling": Entry(
        "thousands of A100 GPUs coordinated via torch.distributed",
        scaling,
        scaling_headline,
        scaling_table,
        scaling_chart,
    ),
    "trainings": Entry(
        "used verbatim",
        trainings,
        trainings_headline,
        trainings_table,
        trainings_chart,
    ),
}


def with_results(readme: str, results: dict[str, Any]) -> str:
    """Return `readme` with what each entry says of itself between its marks."""
    for name, entry in ENTRIES.items():
        measured = results[name]["results"]
        for mark, text in (
            (f"<!-- headline {name} -->", entry.headline(measured)),
            (f"<!-- table {name} -->", f"\n{entry.table(measured)}\n"),
        ):
            head, rest = readme.split(mark)
            readme = head + mark + text + rest[rest.index("<!-- end -->") :]
    return readme


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "uvicorn", "fastapi")}
    described = Path("/proc/cpuinfo")  # of Linux
    found = described.exists() and re.search(r"model name\s*: (.+)", described.read_text())
    cpu = {"processor": found[1] if found else platform.processor(), "cores": os.cpu_count()}
    return {**cpu, "system": platform.platform(), "python": platform.python_version(), **versions}


def benchmark(names: list[str], write: bool) -> None:
    """Measure the entries and print their tables; `write` down results, tables and charts."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        lesson.heading(f"Benchmark: {name}", ENTRIES[name].claim)
        measured = ENTRIES[name].measure()
        results[name] = {"machine": machine(), "results": measured}
        print(ENTRIES[name].table(measured))
        if write:
            ENTRIES[name].chart(measured, RESULTS.with_name(f"{name}.png"))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            README.write_text(with_results(README.read_text(), results))
            written = ", ".join(str(shown(p)) for p in (RESULTS, README))
            print()
            lesson.show("written", f"{written} and docs/{name}.png")


def options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exit with status 2, after one sentence, where one is wrong."""
    made = parser("benchmark", "What the README quotes, measured side by side.")
    made.add_argument("names", metavar="ENTRY", nargs="*", help=f"of {', '.join(ENTRIES)}")
    made.add_argument("--write", action="store_true", help="into docs/ and the README")
    chosen = made.parse_args(argv)
    if unknown := set(chosen.names) - ENTRIES.keys():
        made.error(f"there is no entry {unknown.pop()!r}; there is {', '.join(ENTRIES)}")
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Run the page; return its exit status."""
    chosen = options(argv)
    return run("benchmark", lambda: benchmark(chosen.names or list(ENTRIES), chosen.write))


if __name__ == "__main__":
    sys.exit(main())
