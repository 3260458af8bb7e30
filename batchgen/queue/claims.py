"""The driver's side of exact duplicates: which row of the job is sent, and where the others find its answer.

Workers ask before they send a row that others may have a copy of. The first that asks is sent; the others are told whose
answer they may have, and, as things happen to that row's shard, where it is: in which segment of the journal, or in the
shard's file. Answers never come here. A row is waited for only while a worker has its shard: where a lease ends without a
commit, whoever waits asks again, and the first of them is sent. So nobody waits for a row that nobody works on, and a row
that is waited for waits for none.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

from batchgen.journal import JournalIndex, is_partials, parse_epoch
from batchgen.queue.claim_table import ClaimTable, get_shard
from batchgen.queue.events import ClaimsMade, JournalFlushed, WorkerPool
from batchgen.queue.orders import ClaimsDecided, JournalSoon, LookAt
from batchgen.queue.work_queue import WorkQueue
from batchgen.records import JournalRef

# Rows that are waited for, of shards that are not committed: 300 bytes each. Beyond these each is sent.
MAX_WAITED = 2**20


@dataclass(slots=True)
class Claims:
    """Of one run. Time is in no decision."""

    queue: WorkQueue
    pool: WorkerPool
    index: JournalIndex
    epoch: int
    max_waited: int = MAX_WAITED
    _table: ClaimTable = field(default_factory=ClaimTable)
    # By shard: the rows of it that are waited for, and by which workers.
    _waiters: dict[int, dict[int, set[str]]] = field(default_factory=dict)
    _num_waited: int = 0
    # By shard: which rows each segment holds, by their places in order; 8 bytes a row that is not committed.
    _rows: dict[int, dict[JournalRef, "array[int]"]] = field(default_factory=dict)

    # ---- what workers ask --------------------------------------------------------------------------------------------

    def decide(self, event: ClaimsMade) -> None:
        keys, places, told = (array("Q", packed) for packed in (event.keys, event.places, event.told))
        owners = array("Q", map(self._choose_owner, keys, places, told))
        others: dict[int, list[int]] = {number: [] for number in event.shards}
        for owner, place in zip(owners, places, strict=True):
            if owner != place:
                others.setdefault(get_shard(owner), []).append(owner)
        looks = tuple(
            self._note_waiting(number, {*some, *self._list_mine(number, event)}, event.worker_id)
            for number, some in sorted(others.items())
        )
        self.pool.tell(event.worker_id, ClaimsDecided(event.number, owners.tobytes(), looks))

    def _choose_owner(self, key: int, place: int, told: int) -> int:
        """The place of the row that answers. `told`: that of one whose answer was not to be found."""
        owner = self._table.get(key)
        if owner is None or owner == place or not self._may_answer(owner, told):
            self._table.set(key, place)
            return place
        return owner

    def _may_answer(self, owner: int, told: int) -> bool:
        number = get_shard(owner)
        if self._is_held(number):
            return self._num_waited < self.max_waited
        return owner != told and (
            self.queue.is_shard_done(number) or bool(self._find(number, owner) or self._list_unknown(number))
        )

    def _note_waiting(self, number: int, places: Iterable[int], worker_id: str) -> LookAt:
        """What is to be said of a shard to one who waits for rows of it, and from now on hears more."""
        if not self._is_held(number):
            return self._make_look(number, places, is_open=False)
        if number not in self._waiters and (holder := self.queue.find_holder(number)) is not None:
            self.pool.tell(holder.worker_id, JournalSoon(number))
        waiters = self._waiters.setdefault(number, {})
        for place in places:
            workers = waiters.setdefault(place, set())
            self._num_waited += worker_id not in workers
            workers.add(worker_id)
        return self._make_look(number, places, is_open=True)

    def _list_mine(self, number: int, event: ClaimsMade) -> list[int]:
        """What else a worker waits for there, where it asks for that."""
        waiters = self._waiters.get(number, {}) if number in event.shards else {}
        return [place for place, workers in waiters.items() if event.worker_id in workers]

    # ---- what happens to shards --------------------------------------------------------------------------------------

    def note_flushed(self, event: JournalFlushed) -> None:
        """Rows were journaled; which, is told where rows may be duplicates."""
        refs = dict(event.refs)
        for number, packed in event.rows:
            if self.queue.is_shard_done(number):
                continue
            rows, ref, places = self._rows.setdefault(number, {}), refs[number], array("Q", packed)
            rows[ref] = places
            for worker_id, wanted in self._list_waiting(number).items():
                if some := [place for place in wanted if is_in(places, place)]:
                    self.pool.tell(worker_id, LookAt(number, ((ref, tuple(some)),), is_open=self._is_held(number)))
        for number, paths in event.replaced:
            rows = self._rows.get(number, {})
            for ref in [ref for ref in rows if ref.path in paths]:
                del rows[ref]

    def note_committed(self, number: int) -> None:
        self._rows.pop(number, None)
        for worker_id in self._end_waiting(number):
            self.pool.tell(worker_id, LookAt(number, is_committed=True))

    def note_ended(self, number: int) -> None:
        """A lease of the shard ended without a commit, or a share of it; its journal is known."""
        is_open = self._is_held(number)
        waiting = self._list_waiting(number) if is_open else self._end_waiting(number)
        for worker_id, places in waiting.items():
            self.pool.tell(worker_id, self._make_look(number, places, is_open=is_open))

    def _list_waiting(self, number: int) -> dict[str, list[int]]:
        """By worker, what it waits for."""
        waiting: dict[str, list[int]] = {}
        for place, workers in self._waiters.get(number, {}).items():
            for worker_id in sorted(workers):
                waiting.setdefault(worker_id, []).append(place)
        return waiting

    def _end_waiting(self, number: int) -> dict[str, list[int]]:
        waiting = self._list_waiting(number)
        self._num_waited -= sum(map(len, waiting.values()))
        self._waiters.pop(number, None)
        return waiting

    # ---- what it knows -----------------------------------------------------------------------------------------------

    def _make_look(self, number: int, places: Iterable[int], *, is_open: bool) -> LookAt:
        if self.queue.is_shard_done(number):
            return LookAt(number, is_committed=True)
        found: dict[JournalRef, list[int]] = {}
        unknown = self._list_unknown(number)
        for place in sorted(places):
            for ref in self._find(number, place) or unknown:
                found.setdefault(ref, []).append(place)
        return LookAt(number, tuple((ref, tuple(some)) for ref, some in found.items()), is_open=is_open)

    def _is_held(self, number: int) -> bool:
        """Does a worker have it, to do all of it?"""
        holder = self.queue.find_holder(number)
        return holder is not None and not holder.only and not self.queue.is_shard_done(number)

    def _find(self, number: int, place: int) -> list[JournalRef]:
        """The last segment that is known to hold the row."""
        return [ref for ref, places in self._rows.get(number, {}).items() if is_in(places, place)][-1:]

    def _list_unknown(self, number: int) -> list[JournalRef]:
        """Segments of which nothing is known, for their worker died before it could tell."""
        rows = self._rows.get(number, {})
        return [ref for ref in self.index.get(number) if ref not in rows and self._counts(ref)]

    def _counts(self, ref: JournalRef) -> bool:
        """Of earlier runs the journal holds errors that are tried again, and no row that asked in this one."""
        return parse_epoch(ref.path) == self.epoch and not is_partials(ref.path)


def is_in(places: "array[int]", place: int) -> bool:
    at = bisect_left(places, place)
    return at < len(places) and places[at] == place
