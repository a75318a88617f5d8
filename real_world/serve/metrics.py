"""What a worker counts and reports to the supervisor, which sums it for Prometheus."""

import asyncio
import os
import pickle
import socket
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

SIZES = [2**n for n in range(11)]
BUCKETS = {
    "request_latency_seconds": [size / 10_000 for size in SIZES],  # of successful requests
    "batch_requests": SIZES,
    "batch_rows": SIZES,
}
counts: Counter[tuple[str, object]] = Counter()  # by metric, and bucket, "sum" or HTTP status


def observe(metric: str, value: float) -> None:
    """Count a value in its bucket of a histogram."""
    counts[metric, bisect_left(BUCKETS[metric], value)] += 1
    counts[metric, "sum"] += value  # type: ignore[assignment]


async def report(reports: socket.socket) -> None:
    """Tell the supervisor, twice per second, that this worker runs, and what it counted."""
    while True:
        try:
            reports.send(pickle.dumps((os.getpid(), dict(counts))))
            counts.clear()
        except BlockingIOError:  # the supervisor is suspended
            pass
        except OSError:  # the supervisor is dead: nobody else would end this process
            os._exit(1)
        await asyncio.sleep(0.5)


class Totals:
    """A collector of prometheus_client: the sums over all workers."""

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics. The buckets of Prometheus are cumulative."""
        totals = Counter(dict(counts))  # a copy, as another thread goes on counting
        errors = CounterMetricFamily("http_errors_total", "Responses by status", labels=["status"])
        for (metric, status), count in totals.items():
            if metric == "http_errors_total":
                errors.add_metric([str(status)], count)
        yield errors
        for metric, bounds in BUCKETS.items():
            buckets = []
            cumulative = 0
            for bucket, bound in enumerate([*bounds, "+Inf"]):
                cumulative += totals[metric, bucket]
                buckets.append((str(bound), cumulative))
            yield HistogramMetricFamily(metric, metric, buckets, totals[metric, "sum"])
