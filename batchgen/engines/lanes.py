"""Two lanes through one model: urgent requests, and all others behind them. Belongs to the decode thread.

Each lane is a batch of its own, for a step of sixty-four rows takes three times as long as a step of one. While the
urgent lane has work it gets the turns, but for one in `BULK_EVERY`, so that no other row ever stands still. An idle urgent
lane costs nothing: neither turns nor cache. While it is not idle, the other lane keeps to what it leaves of the cache.

A turn under way is never broken off: whoever comes waits for the rest of it. Where something urgent came lately, more is
about to come, and the other lane's prefills are kept about as short as its steps; one long prompt still is one turn. And
where requests travel on the cores that decode, the thread rests after each of the other lane's turns.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchgen.engines.decode import DecodeBatch
    from batchgen.engines.sampling import Row

# With a step of the full lane three times as long as an urgent one, it takes a tenth of the urgent lane's time.
BULK_EVERY = 32
# Of the cache, while something is urgent.
URGENT_SHARE = 0.25
# So long after something urgent the other lane's prefills stay short, and are of so many tokens for each row of a full
# batch: measured with the embedded model, 64 rows of 14 tokens took 22 ms, 12 of them 3.5 ms, and a step of 64 rows 3.7 ms.
# Bulk then makes up to a third fewer rows, so it is for those who ask one thing after another, and soon over.
URGENT_MEMORY_S = 2.0
SHORT_PREFILL_TOKENS = 3
# How much longer than a turn of bulk's the rest after it is.
REST_SHARE = 2.0


class Lane:
    """A batch and what waits for it."""

    def __init__(self, batch: "DecodeBatch") -> None:
        self.batch = batch
        self.waiting: deque[Row] = deque()

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.batch.rows

    def turn(self) -> "tuple[list[Row], list[Row]]":
        """One prefill of newcomers, or one step for all: (who began or came back, who ended)."""
        self.waiting.extendleft(self.batch.preempt())
        group = self.batch.pick(self.waiting)
        return group, self.batch.admit(group) if group else self.batch.step()


class Lanes:
    """`max_row_cells`: what one row may need of the cache alone, which each lane can always give."""

    def __init__(
        self,
        urgent: "DecodeBatch",
        bulk: "DecodeBatch",
        max_row_cells: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._urgent, self._bulk, self._clock = Lane(urgent), Lane(bulk), clock
        self._short_until = float("-inf")
        self._max_cells, self._max_row_cells = bulk.max_cells, max_row_cells
        urgent.max_cells = max(max_row_cells, int(URGENT_SHARE * self._max_cells))
        self._num_urgent_turns = 0
        self._was_bulk = False

    @property
    def is_idle(self) -> bool:
        return self._urgent.is_idle and self._bulk.is_idle

    @property
    def is_urgent(self) -> bool:
        """Is there anything urgent?"""
        return not self._urgent.is_idle

    @property
    def num_tokens(self) -> int:
        return self._urgent.batch.num_tokens + self._bulk.batch.num_tokens

    def add(self, row: "Row", *, is_urgent: bool) -> None:
        (self._urgent if is_urgent else self._bulk).waiting.append(row)

    def find_rest_s(self, turn_s: float) -> float:
        """How long to rest after the last turn, which took so long."""
        return REST_SHARE * turn_s if self._was_bulk and self._clock() < self._short_until else 0.0

    def turn(self) -> "tuple[list[Row], list[Row]]":
        """(who began or came back, who ended) of the lane whose turn it is. A no-op when idle."""
        now = self._clock()
        if not self._urgent.is_idle:
            self._short_until = now + URGENT_MEMORY_S
        is_short = now < self._short_until
        self._bulk.batch.max_prefill = SHORT_PREFILL_TOKENS * self._bulk.batch.max_rows if is_short else None
        self._was_bulk = self._urgent.is_idle
        if self._urgent.is_idle:
            self._bulk.batch.max_cells, self._num_urgent_turns = self._max_cells, 0
            return self._bulk.turn()
        left = max(self._max_row_cells, self._max_cells - self._urgent.batch.max_cells)
        if self._bulk.batch.max_cells != left:  # whoever has to go for it goes before anybody comes in
            self._bulk.batch.max_cells = left
            self._bulk.waiting.extendleft(self._bulk.batch.preempt())
        self._num_urgent_turns += 1
        if self._num_urgent_turns % BULK_EVERY == 0 and not self._bulk.is_idle:
            return self._bulk.turn()
        return self._urgent.turn()
