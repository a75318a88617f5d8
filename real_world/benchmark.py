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
import copy
import functools
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import lesson_code as lesson
from real_world import (
    Batches,
    distributed,
    lesson_checkpoint,
    llama,
    parser,
    quiet,
    run,
    shown,
    stable_diffusion,
    static_graph,
)
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


def service(rounds: int, seconds: int = 3) -> dict[str, Any]:
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


def scaling(rounds: int) -> dict[str, Any]:
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


# %% The lesson over what it cannot do without


FLOOR = """
import sys, torch, numpy
from matplotlib.figure import Figure
model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
optimizer = torch.optim.Adam(model.parameters())
torch.nn.functional.cross_entropy(model(torch.randn(9, 4)), torch.zeros(9).long()).backward()
optimizer.step()
figure = Figure(figsize=(12, 4), dpi=120)
for axes in figure.subplots(1, 3):
    axes.plot([1, 2])
figure.savefig(sys.argv[1] + "/floor.png")
state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
torch.save(state, sys.argv[1] + "/floor.pt")
torch.load(sys.argv[1] + "/floor.pt", weights_only=True)
"""


def alternate(ways: dict[str, Callable[[], float]], rounds: int, title: str) -> dict[str, Any]:
    """Let every way measure itself, in turn, `rounds` times; return the median and the spread."""
    runs: dict[str, list[float]] = {name: [] for name in ways}
    turns = list(itertools.product(range(rounds), ways.items()))
    for _, (name, way) in tqdm(turns, title, leave=False, disable=None):
        runs[name].append(way())
    return {
        name: {"median": statistics.median(times), "lowest": min(times), "highest": max(times)}
        for name, times in runs.items()
    }


def the_lesson(rounds: int) -> dict[str, Any]:
    """Run the lesson, its tests and a floor, in turn; return the seconds of each."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "the floor": ["-c", FLOOR, folder],
            "python lesson_code.py": ["lesson_code.py", "--output", folder],
            "pytest test_lesson.py": ["-m", "pytest", "-q", "test_lesson.py"],
        }

        # What the pages need brings plug-ins that pytest would load; the lesson's tests use none.
        alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

        def seconds(words: list[str]) -> float:
            command = [sys.executable, *words]
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, check=True)
            return time.perf_counter() - start

        ways = {name: functools.partial(seconds, words) for name, words in commands.items()}
        return {"seconds": alternate(ways, rounds, "lesson")}


# %% One training step, in every framework


SIZES = {  # samples, features, hidden, classes
    "the lesson's": (100, 4, 16, 3),
    "the digits'": (1437, 64, 128, 10),
    "wide": (4096, 512, 1024, 100),
    "all matrix product": (4096, 2048, 4096, 1000),
}
WAYS = (
    "train()",
    "the step, torch.compile",
    "Keras, fit()",
    "TensorFlow, @tf.function",
    "JAX, jit",
    "scikit-learn, MLPClassifier",
    "NumPy, by hand",
)
LR = static_graph.LR


def numpy_steps(model: lesson.SimpleClassifier, X: np.ndarray, y: np.ndarray) -> Callable:
    """Return the step without any framework: gradients by hand, Adam by hand."""
    W1, b1, W2, b2 = parameters = [w.detach().numpy().copy() for w in model.parameters()]
    averages, squares = ([np.zeros_like(w) for w in parameters] for _ in range(2))
    truth, rows = np.eye(len(b2), dtype=np.float32)[y], np.arange(len(y))
    steps = itertools.count(1)

    def step() -> float:
        hidden = X @ W1.T + b1
        active = np.maximum(hidden, 0)
        logits = active @ W2.T + b2
        logits -= logits.max(axis=1, keepdims=True)
        shares = np.exp(logits)
        shares /= shares.sum(axis=1, keepdims=True)
        slope = (shares - truth) / len(y)
        back = slope @ W2
        back[hidden <= 0] = 0
        gradients = (back.T @ X, back.sum(axis=0), slope.T @ active, slope.sum(axis=0))
        t = next(steps)
        for w, gradient, average, square in zip(
            parameters, gradients, averages, squares, strict=True
        ):
            average += 0.1 * (gradient - average)
            square += 0.001 * (gradient**2 - square)
            scale = (square / (1 - 0.999**t)) ** 0.5 + 1e-8
            w -= LR / (1 - 0.9**t) * average / scale
        return -np.log(shares[rows, y]).mean().item()

    return step


def jax_steps(model: lesson.SimpleClassifier, X: np.ndarray, y: np.ndarray) -> Callable:
    """Return the step in JAX, its gradient and Adam compiled together by jit."""
    import jax
    from jax import numpy as jnp

    parameters = [jnp.asarray(w.detach().numpy()) for w in model.parameters()]
    inputs, labels = jnp.asarray(X), jnp.asarray(y)

    def criterion(parameters: list) -> jax.Array:
        W1, b1, W2, b2 = parameters
        logits = jax.nn.relu(inputs @ W1.T + b1) @ W2.T + b2
        return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()

    @jax.jit
    def update(parameters: list, averages: list, squares: list, t: int) -> tuple:
        loss, gradients = jax.value_and_grad(criterion)(parameters)
        averages = [0.9 * m + 0.1 * g for m, g in zip(averages, gradients, strict=True)]
        squares = [0.999 * v + 0.001 * g**2 for v, g in zip(squares, gradients, strict=True)]
        parameters = [
            w - LR / (1 - 0.9**t) * m / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
            for w, m, v in zip(parameters, averages, squares, strict=True)
        ]
        return parameters, averages, squares, loss

    zeros = [jnp.zeros_like(w) for w in parameters]
    state, times = [parameters, zeros, zeros], itertools.count(1)

    def step() -> jax.Array:
        *state[:], loss = update(*state, next(times))
        return loss.block_until_ready()

    return step


def ways_to_train(size: tuple[int, int, int, int]) -> dict[str, Callable[[int], list[float]]]:
    """Return, by name, what trains the same network on the same data for so many steps.

    Each returns the loss of every step. scikit-learn alone starts from weights of its own.
    """
    samples, features, hidden, classes = size
    X, y = lesson.make_synthetic_data(samples, features, classes)
    X = X / features**0.5
    torch.manual_seed(0)
    first = lesson.SimpleClassifier(features, hidden, classes)
    eager, plain = copy.deepcopy(first), copy.deepcopy(first)
    optimizer = torch.optim.Adam(eager.parameters(), LR)
    other = torch.optim.Adam(plain.parameters(), LR)

    @torch.compile
    def compiled_step() -> torch.Tensor:
        other.zero_grad()
        loss = nn.functional.cross_entropy(plain(X), y)
        loss.backward()
        other.step()
        return loss.detach()

    tf = static_graph.tensorflow()
    from keras import losses, optimizers

    twins = [static_graph.keras_twin(first) for _ in range(2)]
    criterion = losses.SparseCategoricalCrossentropy(from_logits=True)
    twins[0].compile(optimizers.Adam(LR, epsilon=static_graph.EPSILON), criterion)
    whole = {"batch_size": samples, "shuffle": False, "verbose": 0}
    inputs, labels = tf.constant(X.numpy()), tf.constant(y.numpy())
    traced = tf.function(static_graph.keras_step(twins[1]))
    by_hand, by_jax = (make(first, X.numpy(), y.numpy()) for make in (numpy_steps, jax_steps))

    def scikit_learn(steps: int) -> list[float]:
        from sklearn.neural_network import MLPClassifier

        never = {"tol": 0.0, "n_iter_no_change": steps + 1, "learning_rate_init": LR}
        network = MLPClassifier((hidden,), alpha=0, batch_size=samples, max_iter=steps, **never)
        with quiet():  # it warns that it has not converged
            return network.fit(X.numpy(), y.numpy()).loss_curve_

    trainings = (
        lambda steps: lesson.train(eager, X, y, optimizer=optimizer, epochs=steps),
        lambda steps: [compiled_step() for _ in range(steps)],
        lambda steps: twins[0].fit(inputs, labels, epochs=steps, **whole).history["loss"],
        lambda steps: [traced(inputs, labels) for _ in range(steps)],
        lambda steps: [by_jax() for _ in range(steps)],
        scikit_learn,
        lambda steps: [by_hand() for _ in range(steps)],
    )
    return dict(zip(WAYS, trainings, strict=True))


def flops_of_a_step(size: tuple[int, int, int, int]) -> int:
    """Return the operations of a step's matrix products; the input needs no gradient."""
    samples, features, hidden, classes = size
    return 2 * samples * hidden * (2 * features + 3 * classes)


def matrix_products(rounds: int, size: int = 4096) -> dict[str, Any]:
    """Time a product of two square matrices in every framework: the most that each can do here."""
    from jax import numpy as jnp

    tf = static_graph.tensorflow()
    pair = torch.randn(2, size, size)
    in_tf, in_jax = ([make(m.numpy()) for m in pair] for make in (tf.constant, jnp.asarray))
    a, b = pair
    ways = {
        "PyTorch": lambda: a @ b,
        "NumPy": lambda: a.numpy() @ b.numpy(),
        "TensorFlow": lambda: tf.matmul(*in_tf).numpy(),
        "JAX": lambda: jnp.matmul(*in_jax).block_until_ready(),
    }

    def seconds(way: Callable[[], object]) -> float:
        start = time.perf_counter()
        way()
        return time.perf_counter() - start

    timed = {name: functools.partial(seconds, way) for name, way in ways.items()}
    for way in ways.values():
        way()
    return alternate(timed, rounds, "products")


def step_worker(size: str, way: str) -> None:
    """Say when `way` is warm; then, for every line that comes in, print the seconds of a step."""
    train = ways_to_train(SIZES[size])[way]
    train(2)  # to trace, to compile
    start = time.perf_counter()
    train(2)
    # Half a second at least: the threads of a process that has slept share a core at first.
    steps = max(2, round(1 / (time.perf_counter() - start)))
    print("warm", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        train(steps)
        print((time.perf_counter() - start) / steps, flush=True)


def step(rounds: int) -> dict[str, Any]:
    """Time a training step of the article's network in every framework and at every size.

    Each in a process of its own: the threads of one framework would be in the way of another's.
    """
    results: dict[str, Any] = {}
    for size in SIZES:
        with contextlib.ExitStack() as stack:
            workers = {}
            for way in WAYS:
                call = f"from real_world import benchmark; benchmark.step_worker({size!r}, {way!r})"
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
                pipes["stderr"] = subprocess.DEVNULL  # TensorFlow's and XLA's remarks
                command = [sys.executable, "-c", call]
                workers[way] = stack.enter_context(subprocess.Popen(command, cwd=ROOT, **pipes))
                stack.callback(workers[way].stdin.close)
            for way, worker in workers.items():
                if worker.stdout.readline() != "warm\n":
                    raise OSError(f"{way}, {size}: it does not train")

            def seconds(worker: subprocess.Popen) -> float:
                time.sleep(0.5)  # OpenBLAS's threads go on spinning for a while
                worker.stdin.write("\n")
                worker.stdin.flush()
                return float(worker.stdout.readline())

            ways = {way: functools.partial(seconds, worker) for way, worker in workers.items()}
            results[size] = alternate(ways, rounds, f"step, {size}")
    results["products"] = matrix_products(rounds)
    return results


def peaks(results: dict[str, Any]) -> dict[str, float]:
    """Return the operations a second of a matrix product, by framework."""
    products = results["products"].items()
    return {name: 2 * 4096**3 / measured["lowest"] for name, measured in products}


def of_peak(results: dict[str, Any], size: str, way: str, peak: float) -> float:
    """Return what share of `peak` the matrix products of a step reach."""
    return flops_of_a_step(SIZES[size]) / results[size][way]["median"] / peak


def step_headline(results: dict[str, Any]) -> str:
    """Return what the README's table of claims says of `step`."""
    small, peak = results["the lesson's"], peaks(results)
    ours = small["train()"]["median"]
    keras, traced = (
        small[name]["median"] / ours for name in ("Keras, fit()", "TensorFlow, @tf.function")
    )
    own, best = (
        of_peak(results, "all matrix product", "train()", most)
        for most in (peak["PyTorch"], max(peak.values()))
    )
    speed = f"At the lesson's size {keras:.0f} times as fast as `fit()`, {traced:.1f} times as"
    large = (
        f"{own:.0%} of what PyTorch's own matrix product reaches, {best:.0%} of the fastest one's"
    )
    return f"{speed} `@tf.function`; at the largest {large}"


def step_table(results: dict[str, Any]) -> str:
    """Return the README's table of `step`'s results."""
    lines = ["| a training step | " + " | ".join(SIZES) + " |", "| --- |" + " ---: |" * len(SIZES)]
    sizes = (" x ".join(f"{part:,}" for part in size) for size in SIZES.values())
    lines.append("| samples x features x hidden x classes | " + " | ".join(sizes) + " |")
    best = max(peaks(results).values())
    for way in results["the lesson's"]:
        cells = []
        for name in SIZES:
            median, ours = (results[name][which]["median"] for which in (way, "train()"))
            share = of_peak(results, name, way, best)
            cells.append(f"{median * 1000:,.4g} ms, {median / ours:.2f} x, {share:.0%}")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    lines += ["", "| a 4,096 x 4,096 matrix product | " + " | ".join(peaks(results)) + " |"]
    lines.append("| --- |" + " ---: |" * len(peaks(results)))
    rates = (f"{rate / 1e9:,.0f}" for rate in peaks(results).values())
    lines.append(f"| billion operations a second | {' | '.join(rates)} |")
    return "\n".join(lines)


def step_chart(results: dict[str, Any], path: Path) -> None:
    """Draw the time of a step by the operations in it, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), dpi=120, layout="constrained")
    times, shares = figure.subplots(1, 2)
    flops = [flops_of_a_step(size) / 1e9 for size in SIZES.values()]
    peak = peaks(results)
    best = max(peak.values())
    for way in results["the lesson's"]:
        look = {"lw": 2.5, "color": "#0969da", "zorder": 3} if way == "train()" else {"lw": 1}
        medians = [results[name][way]["median"] * 1000 for name in SIZES]
        times.plot(flops, medians, "o-", label=way, **look)
        reached = [100 * of_peak(results, name, way, best) for name in SIZES]
        shares.plot(flops, reached, "o-", **look)
    own = 100 * peak["PyTorch"] / best
    shares.axhline(own, color="#6e7781", ls=":", lw=1)
    shares.text(flops[0], own + 1, "PyTorch's own matrix product", color="#6e7781")
    times.set(title="A training step", ylabel="ms", yscale="log")
    shares.set(title="Of the fastest matrix product", ylabel="%", ylim=(0, 105))
    for axes in (times, shares):
        axes.set(xlabel="billion operations in a step", xscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    times.legend(frameon=False)
    figure.savefig(path)


# %% Llama and Stable Diffusion, against the libraries


class Logits(nn.Module):
    """transformers' Llama, with tokens in and logits out, which is what train() takes."""

    def __init__(self, twin: nn.Module) -> None:
        super().__init__()
        self.twin = twin

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits, (batch, length, vocab_size)."""
        return self.twin(tokens).logits


def language(rounds: int) -> dict[str, Any]:
    """Time a token, in training and in cached generation, of the Llama and of transformers'."""
    torch.manual_seed(0)
    model = llama.Llama(llama.MINIATURE)
    twin = llama.hugging_face_twin(model)
    text, steps, count = llama.library_text(), 10, 256
    prompt = llama.encoded("The with statement is")

    def training(network: nn.Module) -> float:
        network = copy.deepcopy(network)
        optimizer = torch.optim.AdamW(network.parameters())
        draw = llama.windows(text, llama.BATCH, llama.CONTEXT, 0)
        batches = Batches("", draw, steps)
        named = {"criterion": llama.next_token_loss, "optimizer": optimizer, "on_epoch": batches}
        start = time.perf_counter()
        lesson.train(network, batches.X, batches.y, epochs=steps, **named)
        return (time.perf_counter() - start) / (steps * llama.BATCH * llama.CONTEXT)

    def writing(write: Callable[[], object]) -> float:
        start = time.perf_counter()
        write()
        return (time.perf_counter() - start) / count

    def ours() -> list:
        return list(llama.generate(model, prompt, count))

    def theirs() -> torch.Tensor:
        return twin.generate(prompt, max_new_tokens=count, do_sample=False)

    ways = {"llama.py": lambda: training(model), "transformers": lambda: training(Logits(twin))}
    trained = alternate(ways, rounds, "language, training")
    ways = {"llama.py": lambda: writing(ours), "transformers": lambda: writing(theirs)}
    return {"training": trained, "generation": alternate(ways, rounds, "language, generation")}


def pictures(rounds: int) -> dict[str, Any]:
    """Time an image of the denoiser, drawn by the page and by diffusers' DDIM scheduler."""
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    diffusion, prompts = stable_diffusion.Diffusion(), torch.arange(100) % 10
    same = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = DDIMScheduler(**same, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(50)
    both = torch.cat((torch.full_like(prompts, stable_diffusion.EMPTY), prompts))

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(len(prompts), 2, 4, 4, generator=generator)
        for moment in scheduler.timesteps:
            times = moment.expand(len(both))
            noisy = stable_diffusion.Noisy(torch.cat((latents, latents)), times, both)
            without, with_prompt = diffusion.denoiser(noisy).chunk(2)
            prediction = without + 3.0 * (with_prompt - without)
            latents = scheduler.step(prediction, moment, latents).prev_sample
        return stable_diffusion.decode(diffusion, latents)

    def ours() -> torch.Tensor:
        return stable_diffusion.draw(diffusion, prompts)

    apart = (ours() - theirs()).abs().max().item()
    lesson.check("the same images", f"differ by {apart:.0e}", apart <= 1e-4)

    def seconds(way: Callable[[], torch.Tensor]) -> float:
        start = time.perf_counter()
        way()
        return (time.perf_counter() - start) / len(prompts)

    ways = {"stable_diffusion.py": ours, "diffusers' scheduler": theirs}
    timed = {name: functools.partial(seconds, way) for name, way in ways.items()}
    return {"an image, 50 steps": alternate(timed, rounds, "pictures")}


# %% What these have in common: a few ways, and which takes how long


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Return, by what is done, how many times as long the last way takes as the first."""
    found = {}
    for what, ways in results.items():
        first, *_, last = (measured["median"] for measured in ways.values())
        found[what] = last / first
    return found


def plain_table(results: dict[str, Any]) -> str:
    """Return a table of ways, their time, and its ratio to that of the first."""
    lines = ["| | takes | against the first |", "| --- | ---: | ---: |"]
    for what, ways in results.items():
        base = next(iter(ways.values()))["median"]
        power, unit = next((p, u) for p, u in ((0, "s"), (3, "ms"), (6, "us")) if base * 10**p >= 1)
        for name, measured in ways.items():
            low, middle, high = (
                f"{measured[key] * 10**power:,.3g}" for key in ("lowest", "median", "highest")
            )
            ratio = f"{measured['median'] / base:.2f} x"
            lines.append(f"| {what}: {name} | {middle} {unit} ({low} to {high}) | {ratio} |")
    return "\n".join(lines)


def plain_chart(results: dict[str, Any], path: Path) -> None:
    """Draw how long each way takes, against the first, as a PNG."""
    from matplotlib.figure import Figure

    bars = [
        (f"{what}: {name}", measured["median"] / next(iter(ways.values()))["median"])
        for what, ways in results.items()
        for name, measured in ways.items()
    ]
    figure = Figure(figsize=(8, 0.6 + 0.4 * len(bars)), dpi=120, layout="constrained")
    axes = figure.subplots()
    names, values = zip(*bars, strict=True)
    drawn = axes.barh(
        names, values, color=["#0969da" if value == 1 else "#6e7781" for value in values]
    )
    axes.bar_label(drawn, [f"{value:.2f} x" for value in values], padding=4)
    axes.set(xlabel="times as long", xlim=(0, 1.2 * max(values)))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def lesson_headline(results: dict[str, Any]) -> str:
    """Return what the README says of `lesson`."""
    floor, script, tests = (ways["median"] for ways in results["seconds"].values())
    return (
        f"the script takes {script / floor:.2f} times as long, its tests {tests / floor:.2f} times"
    )


def language_headline(results: dict[str, Any]) -> str:
    """Return what the README says of `language`."""
    times = ratios(results)
    trained = f"trained at {times['training']:.2f} times the speed of `transformers`'"
    return f"{trained}, writing at {times['generation']:.1f} times"


def pictures_headline(results: dict[str, Any]) -> str:
    """Return what the README says of `pictures`."""
    (ratio,) = ratios(results).values()
    return f"{ratio:.2f} times as fast as by `diffusers`' scheduler"


# %% Three networks, one train()


def call_of_train(function: Callable) -> str:
    """Return the line with which `function` calls train(), as it stands in its source."""
    tree = ast.parse(inspect.getsource(inspect.unwrap(function)))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    named = (call for call in calls if ast.unparse(call.func).split(".")[-1] == "train")
    return ast.unparse(next(named))


def trainings(rounds: int) -> dict[str, Any]:
    """Train the lesson's network, the Llama and the denoiser, once whatever `rounds` says."""
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
    rounds: int
    measure: Callable[[int], dict[str, Any]]
    headline: Callable[[dict[str, Any]], str]
    table: Callable[[dict[str, Any]], str]
    chart: Callable[[dict[str, Any], Path], None]


ENTRIES = {
    "lesson": Entry(
        "all 16 tests should pass in under 30 seconds on CPU",
        *(5, the_lesson, lesson_headline, plain_table, plain_chart),
    ),
    "step": Entry(
        "This explicit loop, as opposed to Keras's model.fit()",
        *(5, step, step_headline, step_table, step_chart),
    ),
    "service": Entry(
        "Requests arrive via an API gateway ... and are batched",
        *(5, service, service_headline, service_table, service_chart),
    ),
    "scaling": Entry(
        "thousands of A100 GPUs coordinated via torch.distributed",
        *(3, scaling, scaling_headline, scaling_table, scaling_chart),
    ),
    "language": Entry(
        "a 70-billion-parameter language model",
        *(7, language, language_headline, plain_table, plain_chart),
    ),
    "pictures": Entry(
        "Stability AI's Stable Diffusion fine-tuning pipelines",
        *(7, pictures, pictures_headline, plain_table, plain_chart),
    ),
    "trainings": Entry(
        "used verbatim",
        *(1, trainings, trainings_headline, trainings_table, trainings_chart),
    ),
}


def picture(name: str) -> Path:
    """Return where the chart of an entry is; docs/lesson.png is the lesson's own."""
    return RESULTS.with_name("lesson-time.png" if name == "lesson" else f"{name}.png")


def with_results(readme: str, results: dict[str, Any], names: Iterable[str] = ENTRIES) -> str:
    """Return `readme` with what each entry says of itself between its marks."""
    for name, entry in ((name, ENTRIES[name]) for name in names):
        measured = results[name]["results"]
        for mark, text in (
            (f"<!-- headline {name} -->", entry.headline(measured)),
            (f"<!-- table {name} -->", f"\n{entry.table(measured)}\n"),
        ):
            head, rest = readme.split(mark)
            readme = head + mark + text + rest[rest.index("<!-- end -->") :]
    return readme


PACKAGES = ("torch", "tensorflow-cpu", "keras", "jax", "scikit-learn", "numpy", "transformers")
PACKAGES += ("diffusers", "uvicorn", "fastapi")


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    described = Path("/proc/cpuinfo")  # of Linux
    found = described.exists() and re.search(r"model name\s*: (.+)", described.read_text())
    cpu = {"processor": found[1] if found else platform.processor(), "cores": os.cpu_count()}
    return {**cpu, "system": platform.platform(), "python": platform.python_version(), **versions}


def benchmark(names: list[str], quick: bool, write: bool) -> None:
    """Measure the entries and print their tables; `write` down results, tables and charts."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        lesson.heading(f"Benchmark: {name}", ENTRIES[name].claim)
        measured = ENTRIES[name].measure(1 if quick else ENTRIES[name].rounds)
        results[name] = {"machine": machine(), "results": measured}
        print(ENTRIES[name].table(measured))
        if write:
            ENTRIES[name].chart(measured, picture(name))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            README.write_text(with_results(README.read_text(), results, [name]))
            written = ", ".join(str(shown(p)) for p in (RESULTS, README))
            print()
            lesson.show("written", f"{written} and {shown(picture(name))}")


def options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exit with status 2, after one sentence, where one is wrong."""
    made = parser("benchmark", "What the README quotes, measured side by side.")
    made.add_argument("names", metavar="ENTRY", nargs="*", help=f"of {', '.join(ENTRIES)}")
    made.add_argument("--quick", action="store_true", help="measure once, which says little")
    made.add_argument("--write", action="store_true", help="into docs/ and the README")
    chosen = made.parse_args(argv)
    if unknown := set(chosen.names) - ENTRIES.keys():
        made.error(f"there is no entry {unknown.pop()!r}; there is {', '.join(ENTRIES)}")
    if chosen.quick and chosen.write:
        made.error(
            "argument --write: what is measured once is not for the README; leave out --quick"
        )
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Run the page; return its exit status."""
    chosen = options(argv)
    return run(
        "benchmark", lambda: benchmark(chosen.names or list(ENTRIES), chosen.quick, chosen.write)
    )


if __name__ == "__main__":
    sys.exit(main())
