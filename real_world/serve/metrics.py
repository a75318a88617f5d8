"""What every worker counts, for Prometheus."""

import prometheus_client

POWERS_OF_TWO = [2**power for power in range(11)]
HTTP_ERRORS = prometheus_client.Counter("http_errors_total", "Rejected requests.", ["status"])
REQUEST_LATENCY = prometheus_client.Histogram(
    "request_latency_seconds",
    "From the head of a request to its response, of successful requests.",
    buckets=[0.0001 * power for power in POWERS_OF_TWO],
)
BATCH_REQUESTS = prometheus_client.Histogram(
    "batch_requests", "Requests per batch.", buckets=POWERS_OF_TWO
)
BATCH_ROWS = prometheus_client.Histogram("batch_rows", "Rows per batch.", buckets=POWERS_OF_TWO)
