"""What a worker counts and reports to the supervisor, which sums it for Prometheus."""

import asyncio
import os
import pickle
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import prometheus_client
from prometheus_client.core import Metric

prometheus_client.disable_created_metrics()  # timestamps cannot be summed
registry = prometheus_client.CollectorRegistry()
errors = prometheus_client.Counter("http_errors", "By status", ["status"], registry=registry)
for status in (400, 404, 405, 408, 413, 415, 422, 500):
    errors.labels(status)  # 0 from the start: increase() does not count a first value
BUCKETS = [2**n for n in range(11)]
request_latency = prometheus_client.Histogram(
    "request_latency_seconds",
    "Of successful requests",
    buckets=[2**n / 10_000 for n in range(20)],  # 0.1 ms to 52 s: a body may take 30 s
    registry=registry,
)
batch_requests = prometheus_client.Histogram(
    "batch_requests", "Requests per batch", buckets=BUCKETS, registry=registry
)
batch_rows = prometheus_client.Histogram(
    "batch_rows", "Rows per batch", buckets=BUCKETS, registry=registry
)


async def report(reports: socket.socket) -> None:
    """Tell the supervisor, twice per second, that this worker runs, and what it has counted."""
    while True:
        try:
            reports.send(pickle.dumps((os.getpid(), list(registry.collect()))))
        except BlockingIOError:  # the supervisor is suspended
            pass
        except OSError:  # the supervisor is dead: nobody else would end this process
            os._exit(1)
        # At random times: after a suspension, the same workers must not always find it full.
        await asyncio.sleep(random.uniform(0.25, 0.75))


class Totals:
    """A collector of prometheus_client: the sums over all workers, also those that have ended."""

    def __init__(self) -> None:
        self.by_worker: dict[int, list[Metric]] = {}  # the last report of each process id

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        for metrics in zip(*self.by_worker.values(), strict=True):
            totals: Counter[tuple[str, tuple]] = Counter()
            for metric in metrics:
                for sample in metric.samples:
                    totals[sample.name, tuple(sample.labels.items())] += sample.value
            total = Metric(metrics[0].name, metrics[0].documentation, metrics[0].type)
            for (name, labels), value in totals.items():
                total.add_sample(name, dict(labels), value)
            yield total


class MetricsHandler(prometheus_client.MetricsHandler):
    """Answers GET /metrics."""

    timeout = 10  # seconds; a thread waits for each connection
    registry = prometheus_client.CollectorRegistry()

    def do_GET(self) -> None:  # noqa: N802
        """Answer a request."""
        if self.path.partition("?")[0] == "/metrics":
            super().do_GET()
        else:
            self.send_error(404)


def serve_metrics(bound: socket.socket, totals: Totals) -> None:
    """Answer Prometheus on a bound socket, in threads."""
    MetricsHandler.registry.register(totals)
    server = ThreadingHTTPServer(("", 0), MetricsHandler, bind_and_activate=False)
    server.socket.close()
    server.socket = bound
    server.request_queue_size = 128  # connections that wait; with 5, the default, some wait seconds
    server.server_activate()
    threading.Thread(target=server.serve_forever, daemon=True).start()
