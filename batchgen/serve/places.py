"""The places of one engine, shared by the workers of several jobs and by interactive requests. Belongs to one event loop.

Each worker has a window of its own that asks here before a row goes. Rows of the job whose deadline is first go first: a
later one gets what the earlier ones leave. Interactive requests enter at once, up to their limit; `room` says what bulk may
take beside them. While a worker tries suspected rows apart, nothing else is in flight: else an engine's death would be
blamed on a row that did nothing.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from batchgen.serve.errors import too_many
from batchgen.serve.room import Peak, count_bulk_room
from batchgen.worker.sender import MAX_INFLIGHT_BYTES
from batchgen.worker.window import Window

RETRY_AFTER_S = 2


class Places:
    """`max_urgent`: interactive requests at once; more are refused with 429."""

    def __init__(
        self,
        num_places: int,
        max_urgent: int,
        *,
        has_urgency: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_places, self._max_urgent, self._has_urgency = num_places, max_urgent, has_urgency
        self._clock = clock
        self._windows: list[SharedWindow] = []
        self._numbers = itertools.count()
        self._apart: list[SharedWindow] = []
        self._is_whole = asyncio.Event()
        self._is_whole.set()
        self._peak = Peak()
        self.num_urgent = 0  # here, of which so many were sent to the engine:
        self.num_sent = 0

    @property
    def num_bulk(self) -> int:
        return sum(window.num_rows for window in self._windows)

    def join(self, deadline: float) -> "SharedWindow":
        """A window for one more worker."""
        window = SharedWindow(self, (deadline, next(self._numbers)), self._num_places, self._clock)
        self._windows = sorted([*self._windows, window], key=lambda each: each.order)
        return window

    def leave(self, window: "SharedWindow") -> None:
        """Its worker is gone. Twice is a no-op."""
        self._windows = [each for each in self._windows if each is not window]
        self._stop_apart(window)
        self.wake()

    @asynccontextmanager
    async def urgent(self) -> AsyncIterator[None]:
        """An interactive request's place. Raises ApiError (429) where too many are here."""
        if self.num_urgent >= self._max_urgent:
            raise too_many("Too many interactive requests are under way; try again soon.", RETRY_AFTER_S)
        self.num_urgent += 1
        self._peak = self._peak.note(self.num_urgent, self._clock())
        try:
            while self._apart:
                await self._is_whole.wait()
            self.num_sent += 1
            try:
                yield
            finally:
                self.num_sent -= 1
        finally:
            self.num_urgent -= 1
            self.wake()

    def may_enter(self, window: "SharedWindow") -> bool:
        """And remembers who may not, to call it when there is room."""
        is_first = not any(each.is_hungry for each in self._windows if each.order < window.order)
        is_held = bool(self._apart) and self._apart[0] is not window
        window.is_hungry = is_held or not is_first or self.num_bulk >= self._count_room()
        return not window.is_hungry

    def wake(self) -> None:
        """Call those who could not enter, the first deadline first."""
        if self.num_bulk < self._count_room():
            for window in self._windows:
                if window.is_hungry:
                    window.on_room()

    @contextmanager
    def apart(self, window: "SharedWindow") -> Iterator[None]:
        self._apart.append(window)
        self._is_whole.clear()
        try:
            yield
        finally:
            self._stop_apart(window)
            self.wake()

    def is_alone(self, window: "SharedWindow") -> bool:
        """Interactive requests that wait for the end of it are not in flight: they came after."""
        others = sum(each.num_rows for each in self._windows if each is not window)
        return self._apart[0] is window and others == 0 and self.num_sent == 0

    def _stop_apart(self, window: "SharedWindow") -> None:
        self._apart = [each for each in self._apart if each is not window]
        if not self._apart:
            self._is_whole.set()

    def _count_room(self) -> int:
        now = self._clock()
        return count_bulk_room(self._num_places, self.num_urgent, self._peak, now, has_urgency=self._has_urgency)


class SharedWindow(Window):
    """One worker's window on shared places."""

    def __init__(self, places: Places, order: tuple[float, int], max_rows: int, clock: Callable[[], float]) -> None:
        super().__init__(max_rows, MAX_INFLIGHT_BYTES, clock)
        self._places, self.order = places, order
        self.is_hungry = False

    def fits(self, num_bytes: int) -> bool:
        return super().fits(num_bytes) and self._places.may_enter(self)

    def enter(self, num_bytes: int) -> None:
        self._add(1, num_bytes)
        self._places.wake()

    def leave(self, num_bytes: int) -> None:
        super().leave(num_bytes)
        self._places.wake()

    def rest(self) -> None:
        """Its worker drains, and may be hungry no more: those after it would wait until it is gone."""
        self.on_room = lambda: None
        self.is_hungry = False
        self._places.wake()

    @contextmanager
    def apart(self) -> Iterator[None]:
        with self._places.apart(self):
            yield

    @property
    def is_alone(self) -> bool:
        return self._places.is_alone(self)
