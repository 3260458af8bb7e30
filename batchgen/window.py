"""The in-flight window: how much is sent to the engine and not answered, by rows and by bytes, and its mean over time.

One window serves all open shards of a worker, so that the last rows of one shard overlap the first of the next. A
request larger than the byte bound passes alone instead of waiting for ever.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable


class Window:
    """Belongs to one event loop. `integral` is rows x seconds in flight; a mean is a difference of it over a time."""

    def __init__(self, max_rows: int, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_rows, self.max_bytes = max_rows, max_bytes
        self.num_rows = 0
        self.num_bytes = 0
        self._clock = clock
        self._integral, self._since = 0.0, clock()
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def acquire(self, num_bytes: int) -> None:
        """Wait for room, first come first served."""
        if not self._waiters and self._fits(num_bytes):
            self._add(1, num_bytes)
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((num_bytes, waiter))
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.release(num_bytes)
            else:
                self._wake()  # those behind it may fit
            raise

    def release(self, num_bytes: int) -> None:
        """An answer arrived."""
        self._add(-1, -num_bytes)
        self._wake()

    def read_integral(self) -> float:
        """Row-seconds in flight since the start."""
        return self._integral + self.num_rows * (self._clock() - self._since)

    def _wake(self) -> None:
        while self._waiters and (self._waiters[0][1].done() or self._fits(self._waiters[0][0])):
            wanted, waiter = self._waiters.popleft()
            if not waiter.done():
                self._add(1, wanted)
                waiter.set_result(None)

    def _fits(self, num_bytes: int) -> bool:
        return self.num_rows == 0 or (self.num_rows < self.max_rows and self.num_bytes + num_bytes <= self.max_bytes)

    def _add(self, rows: int, num_bytes: int) -> None:
        self._integral, self._since = self.read_integral(), self._clock()
        self.num_rows += rows
        self.num_bytes += num_bytes
