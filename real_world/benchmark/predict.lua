-- For wrk: what it sends, and what it prints at the end, as JSON. Latencies in ms.
wrk.method = "POST"
wrk.body = '{"features": [[0.5, -1.2, 0.3, 0.8]]}'
wrk.headers["Content-Type"] = "application/json"

function done(summary, latency, requests)
  local e = summary.errors
  local errors = e.connect + e.read + e.write + e.status + e.timeout
  io.write(string.format('{"rate": %f, "p50": %f, "p99": %f, "errors": %d}',
    summary.requests / summary.duration * 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, errors))
end
