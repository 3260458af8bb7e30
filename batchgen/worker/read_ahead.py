"""Which of the rows that were read ahead goes next. Pure: no rows in it, no I/O, no time.

What is read of a shard at once is a `Stretch`: consecutive rows, each with the completion tokens expected of it where
that is known. `ReadAhead` gives them out longest expected first over all open shards: so the last rows of a run are short
ones, and few slots idle while one waits for the last answer. Where nothing is known, or all hints are equal, the order is
that in which they were added. A row whose hint is missing counts as an average one.

Bounds: in input order no more than `MAX_ROWS_IN_ORDER` rows are read ahead, for seeing further would change nothing; to
sort, `MAX_ROWS` rows or `MAX_BYTES` of them as Arrow, whichever is less. That is what sorting costs of memory however
large the shards are, and how far it sees.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

MAX_ROWS_IN_ORDER = 1024
MAX_ROWS = 2**16
MAX_BYTES = 256 * 2**20

SourceT = TypeVar("SourceT")


@dataclass(slots=True, eq=False)
class Stretch(Generic[SourceT]):
    """Rows of `source`, whatever that is, by their place in it. `left`: those not given out yet, the next one last.
    `expected`: completion tokens of each row of the source, by place; None where no row has a hint."""

    source: SourceT
    left: list[int]
    row_bytes: float
    expected: Sequence[float | None] | None = None


class ReadAhead(Generic[SourceT]):
    """See the module. Each row added is given out once."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._num_bytes = 0.0
        self._is_sorted = True
        self._num_added, self._num_hints, self._sum_hints = 0, 0, 0.0
        # (-length of its next row, order of adding, stretch): the smallest goes first, and stretches are never compared.
        self._heap: list[tuple[float, int, Stretch[SourceT]]] = []

    @property
    def is_full(self) -> bool:
        max_rows = MAX_ROWS if self._is_sorted and self._num_hints else MAX_ROWS_IN_ORDER
        return self.num_rows >= max_rows or self._num_bytes >= MAX_BYTES

    def add(self, stretch: Stretch[SourceT]) -> None:
        """Rows in `left` may be in any order yet."""
        known = [hint for place in stretch.left if (hint := _get_hint(stretch, place)) is not None]
        self._num_hints += len(known)
        self._sum_hints += sum(known)
        self._count(stretch, len(stretch.left))
        self._num_added += 1
        self._sort(stretch)
        self._push(self._num_added, stretch)

    def take(self, max_rows: int, max_bytes: float) -> list[tuple[Stretch[SourceT], list[int]]]:
        """(stretch, places in its source) of the next rows, in order; one row at least, where there is any."""
        runs: list[tuple[Stretch[SourceT], list[int]]] = []
        while self._heap and max_rows > 0 and max_bytes > 0:
            _, number, stretch = heapq.heappop(self._heap)
            run = self._take_run(stretch, number, min(max_rows, math.ceil(max_bytes / max(1.0, stretch.row_bytes))))
            max_rows -= len(run)
            max_bytes -= len(run) * stretch.row_bytes
            self._count(stretch, -len(run))
            self._push(number, stretch)
            runs.append((stretch, run))
        return runs

    def sort(self, is_sorted: bool) -> None:
        """From here on longest expected first, or in the order they were added."""
        if is_sorted == self._is_sorted:
            return
        self._is_sorted = is_sorted
        stretches, self._heap = self._heap, []
        for _, number, stretch in stretches:
            self._sort(stretch)
            self._push(number, stretch)

    # ----

    def _take_run(self, stretch: Stretch[SourceT], number: int, max_rows: int) -> list[int]:
        """Until another stretch has the longer row."""
        other = self._heap[0][:2] if self._heap else (math.inf, 0)
        run = [stretch.left.pop()]
        while stretch.left and len(run) < max_rows and (-self._length(stretch, stretch.left[-1]), number) < other:
            run.append(stretch.left.pop())
        return run

    def _push(self, number: int, stretch: Stretch[SourceT]) -> None:
        if stretch.left:
            heapq.heappush(self._heap, (-self._length(stretch, stretch.left[-1]), number, stretch))

    def _sort(self, stretch: Stretch[SourceT]) -> None:
        stretch.left.sort(reverse=True)
        if self._is_sorted and stretch.expected is not None:
            stretch.left.sort(key=lambda place: self._length(stretch, place))  # stable: equal rows keep their order

    def _length(self, stretch: Stretch[SourceT], place: int) -> float:
        if not self._is_sorted:
            return 0.0
        hint = _get_hint(stretch, place)
        return hint if hint is not None else self._sum_hints / max(1, self._num_hints)

    def _count(self, stretch: Stretch[SourceT], num_rows: int) -> None:
        self.num_rows += num_rows
        self._num_bytes += num_rows * stretch.row_bytes


def _get_hint(stretch: Stretch[SourceT], place: int) -> float | None:
    """None for what is no number, too."""
    hint = stretch.expected[place] if stretch.expected is not None else None
    return hint if hint is not None and math.isfinite(hint) else None
