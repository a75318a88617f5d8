"""Dynamic batching: requests that wait at the same time share one forward pass."""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable

import numpy as np
from starlette.exceptions import HTTPException

from real_world.serve.codec import MAX_BATCH_ROWS
from real_world.serve.metrics import batch_requests, batch_rows

MAX_FAILURES = 10  # batches in a row; after some CUDA errors, nothing runs in a process any more


class Batcher:
    """Collects requests; a batch that is not full waits up to `timeout` seconds for more."""

    def __init__(self, predict: Callable[[np.ndarray], np.ndarray], timeout: float = 0.0) -> None:
        self.predict = predict
        self.timeout = timeout
        self.queue: deque[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = deque()
        self.queued_rows = 0
        self.timer: asyncio.Handle | None = None  # of the next call of run()
        self.failures = 0  # batches in a row

    def submit(self, features: np.ndarray) -> asyncio.Future[np.ndarray]:
        """Return a future of the probabilities of `features`, (rows, classes) float32."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[np.ndarray] = loop.create_future()
        self.queue.append((features, future))
        self.queued_rows += len(features)
        is_full = self.queued_rows >= MAX_BATCH_ROWS
        if self.timer is None:
            self.timer = loop.call_later(0 if is_full else self.timeout, self.run)
        elif is_full and self.queued_rows - len(features) < MAX_BATCH_ROWS:  # since this request
            self.timer.cancel()
            self.timer = loop.call_soon(self.run)
        return future

    def next_batch(self) -> list[tuple[np.ndarray, asyncio.Future[np.ndarray]]]:
        """Remove the requests of the next batch from the queue, in order of arrival."""
        batch = [self.queue.popleft()]
        rows = len(batch[0][0])
        while self.queue and rows + len(self.queue[0][0]) <= MAX_BATCH_ROWS:
            batch.append(self.queue.popleft())
            rows += len(batch[-1][0])
        self.queued_rows -= rows
        return batch

    def run(self) -> None:
        """Run the model on the next batch."""
        batch = self.next_batch()
        self.timer = asyncio.get_running_loop().call_soon(self.run) if self.queue else None
        features = np.concatenate([rows for rows, _ in batch])
        batch_requests.observe(len(batch))
        batch_rows.observe(len(features))
        try:
            probabilities = self.predict(features)
        except Exception:  # fails the requests of this batch only
            for _, future in batch:
                if not future.done():
                    future.set_exception(HTTPException(500, "the model failed"))
            self.failures += 1
            if self.failures == MAX_FAILURES:
                logging.error("%d batches in a row failed: this worker ends", self.failures)
                # After the responses to this batch. The supervisor replaces the worker.
                asyncio.get_running_loop().call_later(0.5, os._exit, 1)
            raise  # the event loop logs the traceback, once
        self.failures = 0
        start = 0
        for rows, future in batch:
            if not future.done():  # cancelled
                future.set_result(probabilities[start : start + len(rows)])
            start += len(rows)
