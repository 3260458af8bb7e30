"""The shards of a run by what is to become of them: which is next, which must wait, which are done. Pure.

Longest expected first, or in the input's order while what is expected is not borne out. A shard that failed on a live
worker waits for a time that doubles; one that is lost without progress too often is lent as a last resort; one that failed
too often is hopeless. Knows no workers: the queue says who holds what.
"""

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass

from batchgen.queue.lazy_heap import LazyHeap
from batchgen.records import Lease, Shard
from batchgen.spec import RetrySpec

# A neighbour may jump the longest-first order when it is at least this share of the longest waiting shard.
NEIGHBOUR_SHARE = 0.8
BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True)
class QueuedShard:
    """A shard to be done. `first_attempt` goes on where earlier runs stopped counting; `replaces` is the version of the
    committed file whose error rows are to be replaced; `cost` orders, one that is infinite always, and `work` balances
    (`lengths`), which is the same where it is not told."""

    shard: Shard
    first_attempt: int = 1
    replaces: str | None = None
    cost: float = 0.0
    work: float | None = None


def get_work(queued: QueuedShard) -> float:
    return queued.cost if queued.work is None else queued.work


def find_row_work(shards: Iterable[QueuedShard]) -> float:
    """Of a row, in the mean over all shards that are done for the first time."""
    new = [queued for queued in shards if queued.replaces is None and math.isfinite(get_work(queued))]
    return sum(map(get_work, new)) / max(1, sum(queued.shard.num_rows for queued in new))


class Backlog:
    """See the module. Every step costs O(log n), but for the change of what they are ordered by."""

    def __init__(
        self, shards: Iterable[QueuedShard], *, epoch: int, retry: RetrySpec, follows_costs: bool = True
    ) -> None:
        self._epoch, self._retry, self.follows_costs = epoch, retry, follows_costs
        self._all = {queued.shard.number: queued for queued in shards}
        self._row_work = find_row_work(self._all.values())
        self._waiting: LazyHeap[int, float] = LazyHeap()
        self._due: list[tuple[float, int]] = []
        self._delayed: set[int] = set()
        self._num_lost: dict[int, int] = {}
        self._most_done: dict[int, int] = {}
        self._num_failed: dict[int, int] = {}
        self._hopeless: dict[int, None] = {}
        self._reasons: dict[int, str] = {}
        self._attempts: dict[int, int] = {}
        self._done: set[int] = set()
        self._held: frozenset[int] = frozenset()
        self._held_waiting: set[int] = set()
        self.is_hinted = any(queued.shard.expected_tokens is not None for queued in self._all.values())
        for number in self._all:
            self.put_back(number)

    # ---- which is next -----------------------------------------------------------------------------------------------

    def pick(self, neighbour: int, now: float) -> int | None:
        """The longest, or this neighbour where it is nearly as long; None where none may be lent now."""
        while self._due and self._due[0][0] <= now:
            number = heapq.heappop(self._due)[1]
            self._delayed.discard(number)
            self.put_back(number)
        if (longest := self._waiting.peek()) is None:
            return None
        is_near = neighbour in self._waiting and self._rank(neighbour) <= NEIGHBOUR_SHARE * longest[0]
        return neighbour if is_near else longest[1]

    def take(self, number: int, worker_id: str) -> Lease:
        """It waits no more: the worker has it."""
        self._waiting.discard(number)
        self._held_waiting.discard(number)
        return self.make_lease(number, worker_id)

    def hold(self, numbers: Iterable[int]) -> None:
        """These shards, and no others, wait apart: they are not picked."""
        before, self._held = self._held, frozenset(numbers)
        for number in sorted(self._held - before):
            if number in self._waiting:
                self._waiting.discard(number)
                self._held_waiting.add(number)
        for number in sorted((before - self._held) & self._held_waiting):
            self.put_back(number)

    def waits_apart(self, number: int) -> bool:
        return number in self._held_waiting

    def make_lease(self, number: int, worker_id: str) -> Lease:
        """The shard's next attempt, whoever holds it."""
        queued = self._all[number]
        attempt = self._attempts.get(number, queued.first_attempt)
        self._attempts[number] = attempt + 1
        return Lease(
            shard=queued.shard,
            attempt=attempt,
            epoch=self._epoch,
            worker_id=worker_id,
            replaces=queued.replaces,
            is_last_resort=self._num_lost.get(number, 0) >= self._retry.max_shard_attempts,
            reason=self._reasons.get(number),
        )

    def get_work(self, number: int) -> float:
        """What a worker has to do for it; by its rows alone while what is expected of them is not to be trusted."""
        queued = self._all[number]
        if not self.follows_costs and queued.replaces is None:
            return self._row_work * queued.shard.num_rows
        return get_work(queued)

    def follow_costs(self, is_so: bool) -> None:
        """From here on longest expected first, or in the input's order. O(n log n) where that is new."""
        if is_so == self.follows_costs:
            return
        self.follows_costs = is_so
        for number in self._all:
            if number in self._waiting:
                self._waiting.set(number, self._rank(number))

    # ---- what became of them -----------------------------------------------------------------------------------------

    def put_back(self, number: int) -> None:
        self._held_waiting.discard(number)
        if number in self._done:
            return
        if number in self._held:
            self._held_waiting.add(number)
        else:
            self._waiting.set(number, self._rank(number))

    def _rank(self, number: int) -> float:
        cost = self._all[number].cost
        return -cost if self.follows_costs or math.isinf(cost) else 0.0

    def complete(self, number: int) -> bool:
        """False when that was known already."""
        if number in self._done:
            return False
        self._done.add(number)
        self._waiting.discard(number)
        self._held_waiting.discard(number)
        self._delayed.discard(number)
        self._hopeless.pop(number, None)
        return True

    def note_failure(self, number: int, now: float, reason: str) -> None:
        """It waits for a while, longer each time."""
        self._reasons[number] = reason
        self._num_failed[number] = self._num_failed.get(number, 0) + 1
        if number in self._done:
            return
        delay = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (self._num_failed[number] - 1))
        heapq.heappush(self._due, (now + delay, number))
        self._delayed.add(number)
        if self._num_failed[number] >= self._retry.max_shard_attempts:
            self._hopeless[number] = None

    def note_return(self, number: int, reason: str) -> None:
        """It waits again at once, for no fault of its own."""
        self._reasons[number] = reason
        self.put_back(number)

    def note_loss(self, number: int, num_rows_done: int, reason: str) -> None:
        """It waits again at once. Only losses without progress count towards the last resort: a shard that gets further
        with every attempt is held up by its workers' deaths, it does not cause them."""
        self._reasons[number] = reason
        if num_rows_done > self._most_done.get(number, 0):
            self._most_done[number], self._num_lost[number] = num_rows_done, 0
        else:
            self._num_lost[number] = self._num_lost.get(number, 0) + 1
        self.put_back(number)

    # ---- what it knows -----------------------------------------------------------------------------------------------

    def is_done(self, number: int) -> bool:
        return number in self._done

    def find_hopeless(self) -> tuple[int, str] | None:
        """A shard that failed too often on live workers (its store or input is at fault), with the reason."""
        number = next(iter(self._hopeless), None)
        return None if number is None else (number, self._reasons[number])

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._delayed) + len(self._held_waiting)

    @property
    def num_shards(self) -> int:
        return len(self._all)

    @property
    def num_done(self) -> int:
        return len(self._done)
