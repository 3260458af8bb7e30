"""The in-flight window: how much is sent to the engine and not answered, by rows and by bytes, and its mean over time.

One window serves all open shards of a worker, so that the last rows of one shard overlap the first of the next. A
request larger than the byte bound passes alone instead of waiting for ever. Counts only: who waits is the sender's affair.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Window:
    """`read_integral` is rows x seconds in flight; a mean is a difference of it over a time. `on_room` is for those who
    share an engine: called when one of the others made room."""

    def __init__(self, max_rows: int, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_rows, self.max_bytes = max_rows, max_bytes
        self.on_room: Callable[[], None] = lambda: None
        self.num_rows = 0
        self.num_bytes = 0
        self._clock = clock
        self._integral, self._since = 0.0, clock()

    def fits(self, num_bytes: int) -> bool:
        return self.num_rows == 0 or (self.num_rows < self.max_rows and self.num_bytes + num_bytes <= self.max_bytes)

    def enter(self, num_bytes: int) -> None:
        """A request is sent. Raises ValueError where there is no room: ask `fits` first."""
        if not self.fits(num_bytes):
            raise ValueError(f"{self.num_rows} rows and {self.num_bytes} bytes are in flight: no room for {num_bytes}")
        self._add(1, num_bytes)

    def leave(self, num_bytes: int) -> None:
        """Its answer arrived."""
        self._add(-1, -num_bytes)

    def rest(self) -> None:
        """Nothing more is sent from here on: whoever shares the engine need not wait for it."""

    @contextmanager
    def apart(self) -> Iterator[None]:
        """While suspected rows are tried: whoever shares the engine keeps away. Here nobody does."""
        yield

    @property
    def is_alone(self) -> bool:
        """Has whoever shares the engine nothing in flight?"""
        return True

    def read_integral(self) -> float:
        """Row-seconds in flight since the start."""
        return self._integral + self.num_rows * (self._clock() - self._since)

    def _add(self, rows: int, num_bytes: int) -> None:
        now = self._clock()
        self._integral += self.num_rows * (now - self._since)
        self._since = now
        self.num_rows += rows
        self.num_bytes += num_bytes
