"""Answers so far of rows that are asked for in parts: kept for a row's next try, journaled so that a lost worker costs a
row one part, and taken over from another worker that had the row before. Pure, one thread; no I/O.

A row's entry stands from the end of its first part until it is answered. What is kept is bounded: the longest untouched
goes first, and its row begins anew if it ever comes back.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from batchgen.records import Partial, RowId
from batchgen.worker.answer import count_values

# Token ids and logprobs kept, all rows together: about 150 MB of the former, and three times that of the latter, of which
# each token may have twenty.
MAX_KEPT_VALUES = 2**22


@dataclass(frozen=True, slots=True)
class Kept:
    """A row's answer so far, and the rank whose cache may have it. `is_own`: this worker's engine generated the last of it;
    else it is to be seen whether that engine can go on with it."""

    partial: Partial
    rank: int | None = None
    is_own: bool = True


class Partials:
    """See the module."""

    def __init__(self, max_values: int = MAX_KEPT_VALUES) -> None:
        self._kept: OrderedDict[RowId, Kept] = OrderedDict()
        self._max_values, self._num_values = max_values, 0
        self._new: dict[RowId, Partial] = {}

    def get(self, row_id: RowId) -> Kept | None:
        return self._kept.get(row_id)

    def note(self, row_id: RowId, partial: Partial, rank: int | None) -> None:
        """A part ended here, and the row goes on."""
        self._new[row_id] = partial
        self._put(row_id, Kept(partial, rank))

    def load(self, found: Iterable[tuple[RowId, Partial]]) -> None:
        """What other workers had of rows that come here now. The longest of a row counts."""
        for row_id, partial in found:
            known = self._kept.get(row_id)
            if known is None or len(known.partial.token_ids) < len(partial.token_ids):
                self._new.pop(row_id, None)  # it is journaled, and so is more than we have
                self._put(row_id, Kept(partial, is_own=False))

    def forget(self, row_id: RowId) -> None:
        """The row is answered, or begins anew."""
        self._new.pop(row_id, None)
        self._drop(row_id)

    def list_new(self) -> list[tuple[RowId, Partial]]:
        """What is not journaled yet."""
        return list(self._new.items())

    def note_journaled(self, written: Iterable[tuple[RowId, Partial]]) -> None:
        for row_id, partial in written:
            if self._new.get(row_id) is partial:  # else it has grown meanwhile
                del self._new[row_id]

    def iter_all(self) -> Iterator[tuple[RowId, Partial]]:
        return ((row_id, kept.partial) for row_id, kept in self._kept.items())

    def _put(self, row_id: RowId, kept: Kept) -> None:
        self._drop(row_id)
        self._kept[row_id] = kept
        self._num_values += count_values(kept.partial)
        while self._num_values > self._max_values:
            self.forget(next(iter(self._kept)))

    def _drop(self, row_id: RowId) -> None:
        if (kept := self._kept.pop(row_id, None)) is not None:
            self._num_values -= count_values(kept.partial)
