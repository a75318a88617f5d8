"""Dynamic batching: requests that wait at the same time share one forward pass."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

import numpy as np

from real_world.serve.codec import MAX_BATCH_ROWS
from real_world.serve.metrics import BATCH_REQUESTS, BATCH_ROWS

Request = tuple[np.ndarray, asyncio.Future[np.ndarray]]


class Batcher:
    """Collects requests while the model works on others.

    A batch that is not full waits up to `timeout` seconds for more requests.
    """

    predict: Callable[[np.ndarray], np.ndarray]

    def __init__(self, timeout: float = 0.0) -> None:
        self.timeout = timeout
        self.queue: deque[Request] = deque()
        self.queued_rows = 0
        self.not_empty = asyncio.Event()
        self.full = asyncio.Event()

    def submit(self, features: np.ndarray) -> asyncio.Future[np.ndarray]:
        """Return a future of the probabilities of `features`, (rows, classes) float32."""
        future = asyncio.get_running_loop().create_future()
        self.queue.append((features, future))
        self.add_queued_rows(len(features))
        return future

    def add_queued_rows(self, rows: int) -> None:
        """Add to the number of queued rows, or subtract from it."""
        self.queued_rows += rows
        for event, minimum in ((self.not_empty, 1), (self.full, MAX_BATCH_ROWS)):
            if self.queued_rows >= minimum:
                event.set()
            else:
                event.clear()

    async def next_batch(self) -> list[Request]:
        """Return the requests of the next batch, in order of arrival."""
        await self.not_empty.wait()
        if self.timeout:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.full.wait(), self.timeout)
        batch: list[Request] = []
        rows = 0
        while self.queue and rows + len(self.queue[0][0]) <= MAX_BATCH_ROWS:
            batch.append(self.queue.popleft())
            rows += len(batch[-1][0])
        self.add_queued_rows(-rows)
        return batch

    async def run(self) -> None:
        """Run the model on batch after batch, until cancelled."""
        while True:
            batch = await self.next_batch()
            features = np.concatenate([rows for rows, _ in batch])
            BATCH_REQUESTS.observe(len(batch))
            BATCH_ROWS.observe(len(features))
            try:
                probabilities = self.predict(features)
            except Exception as error:  # only these requests fail, not those of the next batch
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            start = 0
            for rows, future in batch:
                if not future.done():  # cancelled if the client left
                    future.set_result(probabilities[start : start + len(rows)])
                start += len(rows)
