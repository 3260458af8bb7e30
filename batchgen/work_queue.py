"""Which worker gets which shard, for how long, and when it is enough. Pure: time is an argument, nothing is awaited.

Invariants: a shard is waiting, leased to one worker, or done, never two of these; a completed shard is never lent again;
an answer for a lease that is no longer held (a zombie's) changes nothing. Longest expected shards go first, a
neighbour of a worker's last shard is preferred among equals. A worker that is not heard of, or that makes no token and
finishes no row, loses its leases. A shard lost too often is lent once more as a last resort: no generation, its missing
rows become error rows. A shard that is held waits apart, and is lent in parts (`lend_rows`) to a worker that has nothing
else. Knows nothing of rows, files or Ray.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from batchgen.events import Heartbeat
from batchgen.records import Lease, Shard, WorkerInfo
from batchgen.row_ranges import RowRanges
from batchgen.spec import ClusterSpec, RetrySpec
from batchgen.suspects import ShardRows

# A neighbour may jump the longest-first order when it is at least this share of the longest waiting shard.
NEIGHBOUR_SHARE = 0.8
# A worker holds leases for this many windows of unfinished rows: one in flight, half a one read and tokenised ahead.
WINDOWS_AHEAD = 1.5
MIN_OPEN_SHARDS = 2
MAX_OPEN_SHARDS = 1024
BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True)
class QueuedShard:
    """A shard to be done. `first_attempt` goes on where earlier runs stopped counting; `replaces` is the version of the
    committed file whose error rows are to be replaced; `cost` orders (expected rows to generate)."""

    shard: Shard
    first_attempt: int = 1
    replaces: str | None = None
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class LostLease:
    """A lease that ended without a commit, with the last that was heard of it."""

    lease: Lease
    started_at: float
    ended_at: float
    num_rows_done: int
    reason: str


@dataclass(slots=True)
class _Open:
    lease: Lease
    started_at: float
    num_rows_done: int = 0
    num_rows_error: int = 0


@dataclass(slots=True)
class _Worker:
    info: WorkerInfo
    heard_at: float
    progress_at: float
    progress: tuple[int, int] = (0, 0)
    last_shard: int = -2
    num_unfinished: int = 0
    is_apart: bool = False
    is_leaving: bool = False
    open: dict[str, _Open] = field(default_factory=dict)

    def count(self) -> None:
        """Keeps the sum that every lease is decided by; called whenever what is open changed, never in a decision."""
        self.num_unfinished = sum(o.lease.shard.num_rows - o.num_rows_done for o in self.open.values())


class WorkQueue:
    """Shards in, leases out, facts back in. `n`: requests a row."""

    def __init__(
        self, shards: Iterable[QueuedShard], *, epoch: int, retry: RetrySpec, cluster: ClusterSpec, n: int = 1
    ) -> None:
        self._epoch, self._retry, self._cluster, self._n = epoch, retry, cluster, n
        self._all = {queued.shard.number: queued for queued in shards}
        self._waiting = set(self._all)
        self._heap = [(-queued.cost, number) for number, queued in self._all.items()]
        heapq.heapify(self._heap)
        self._delayed: list[tuple[float, int]] = []
        self._num_lost: dict[int, int] = {}
        self._most_done: dict[int, int] = {}
        self._num_failed: dict[int, int] = {}
        self._reasons: dict[int, str] = {}
        self._attempts = {number: queued.first_attempt for number, queued in self._all.items()}
        self._workers: dict[str, _Worker] = {}
        self._done: set[int] = set()
        self._held: frozenset[int] = frozenset()
        self._held_waiting: set[int] = set()
        self._reserved: str | None = None

    # ---- facts in ----------------------------------------------------------------------------------------------------

    def add_worker(self, info: WorkerInfo, now: float) -> None:
        self._workers[info.worker_id] = _Worker(info, heard_at=now, progress_at=now)

    def renew(self, beat: Heartbeat, now: float) -> None:
        """A worker was heard of. Its leases' stall clock restarts only when it made a token or finished a row."""
        worker = self._workers.get(beat.worker_id)
        if worker is None:
            return
        worker.heard_at = now
        for shard in beat.shards:
            if (lease := worker.open.get(shard.batch_id)) is not None:
                lease.num_rows_done, lease.num_rows_error = shard.num_rows_done, shard.num_rows_error
        worker.count()
        progress = (beat.total_tokens, sum(o.num_rows_done for o in worker.open.values()))
        if progress != worker.progress or (beat.num_inflight == 0 and not worker.open):
            worker.progress, worker.progress_at = progress, now

    def complete(self, worker_id: str, batch_id: str, shard_number: int) -> bool:
        """The shard's file exists, whoever made it. False when that was known already."""
        if (worker := self._workers.get(worker_id)) is not None:
            self._close(worker, batch_id)
        if shard_number in self._done:
            return False
        self._done.add(shard_number)
        self._waiting.discard(shard_number)
        self._held_waiting.discard(shard_number)
        return True

    def fail(self, worker_id: str, batch_id: str, now: float, reason: str) -> LostLease | None:
        """The lease ended without a commit, its worker lives: lent again after a pause. None for a zombie's."""
        worker = self._workers.get(worker_id)
        held = self._close(worker, batch_id) if worker is not None else None
        if held is None:
            return None
        number = held.lease.shard.number
        self._num_failed[number] = self._num_failed.get(number, 0) + 1
        delay = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (self._num_failed[number] - 1))
        heapq.heappush(self._delayed, (now + delay, number))
        return self._end(held, now, reason)

    def lose(self, worker_id: str, now: float, reason: str, *, is_counted: bool = True) -> list[LostLease]:
        """The worker is gone: its shards wait again at once. `is_counted`: towards the last resort."""
        worker = self._workers.pop(worker_id, None)
        if worker is None:
            return []
        lost = []
        for held in worker.open.values():
            if is_counted:
                self._count_loss(held)
            self._wait(held.lease.shard.number)
            lost.append(self._end(held, now, reason))
        return lost

    def give_back(self, worker_id: str, batch_id: str, now: float, reason: str) -> LostLease | None:
        """The lease ended without a commit and for no fault of its shard, which waits again. None for a zombie's."""
        worker = self._workers.get(worker_id)
        held = self._close(worker, batch_id) if worker is not None else None
        if held is None:
            return None
        self._wait(held.lease.shard.number)
        return self._end(held, now, reason)

    def hold(self, numbers: Iterable[int]) -> None:
        """These shards, and no others, are lent by `lend_rows` only."""
        before, self._held = self._held, frozenset(numbers)
        for number in sorted((self._held - before) & self._waiting):
            self._waiting.discard(number)
            self._held_waiting.add(number)
        for number in sorted((before - self._held) & self._held_waiting):
            self._held_waiting.discard(number)
            self._wait(number)

    def retire(self, worker_id: str) -> None:
        """The worker gets no more leases."""
        if (worker := self._workers.get(worker_id)) is not None:
            worker.is_leaving = True

    def _count_loss(self, held: _Open) -> None:
        """Only losses without progress count towards the last resort: a shard that gets further with every attempt is
        held up by its workers' deaths, it does not cause them."""
        number = held.lease.shard.number
        if held.num_rows_done > self._most_done.get(number, 0):
            self._most_done[number], self._num_lost[number] = held.num_rows_done, 0
        else:
            self._num_lost[number] = self._num_lost.get(number, 0) + 1

    def _close(self, worker: _Worker, batch_id: str) -> _Open | None:
        held = worker.open.pop(batch_id, None)
        if held is not None:
            worker.num_unfinished -= held.lease.shard.num_rows - held.num_rows_done
            worker.is_apart = worker.is_apart and bool(worker.open)
        return held

    def _end(self, held: _Open, now: float, reason: str) -> LostLease:
        self._reasons[held.lease.shard.number] = reason
        return LostLease(held.lease, held.started_at, now, held.num_rows_done, reason)

    def _wait(self, number: int) -> None:
        if number in self._held and number not in self._done:
            self._held_waiting.add(number)
        elif number not in self._done and number not in self._waiting:
            self._waiting.add(number)
            heapq.heappush(self._heap, (-self._all[number].cost, number))

    # ---- decisions out -----------------------------------------------------------------------------------------------

    def lease_next(self, now: float) -> Lease | None:
        """One lease for the worker that needs it most, or None. Call until None."""
        while self._delayed and self._delayed[0][0] <= now:
            self._wait(heapq.heappop(self._delayed)[1])
        if not self._waiting:
            return None
        hungry = [worker for worker in self._workers.values() if self._wants_more(worker)]
        if not hungry:
            return None
        worker = min(hungry, key=lambda w: (w.num_unfinished, w.info.worker_id))
        return self._lend(worker, self._pick(worker), now)

    def find_idle(self) -> str | None:
        """A worker that has nothing open."""
        idle = (worker_id for worker_id, worker in self._workers.items() if not worker.open and not worker.is_leaving)
        return min(idle, default=None)

    def can_lend_rows(self, numbers: Iterable[int]) -> bool:
        """Does none of these held shards lie with a worker?"""
        return all(number in self._held_waiting for number in numbers)

    def lend_rows(self, worker_id: str, rows: Iterable[ShardRows], now: float) -> list[Lease]:
        """These rows of held shards to one idle worker, which gets nothing else until it has given them back."""
        worker = self._workers[worker_id]
        leases = []
        for number, ranges in rows:
            self._held_waiting.discard(number)
            leases.append(self._lend(worker, number, now, ranges))
        worker.is_apart = True
        return leases

    def reserve(self, is_wanted: bool) -> None:
        """Where one is wanted, the worker with the fewest rows left gets no more until it is idle."""
        if not is_wanted:
            self._reserved = None
        elif self._reserved not in self._workers and (
            ready := [worker for worker in self._workers.values() if not worker.is_apart and not worker.is_leaving]
        ):
            self._reserved = min(ready, key=lambda w: (w.num_unfinished, w.info.worker_id)).info.worker_id

    def _wants_more(self, worker: _Worker) -> bool:
        num_open = len(worker.open)
        if worker.is_apart or worker.is_leaving or worker.info.worker_id == self._reserved:
            return False
        if num_open >= MAX_OPEN_SHARDS:
            return False
        return num_open < MIN_OPEN_SHARDS or self._n * worker.num_unfinished < WINDOWS_AHEAD * worker.info.window

    def _pick(self, worker: _Worker) -> int:
        while self._heap[0][1] not in self._waiting:
            heapq.heappop(self._heap)
        longest = -self._heap[0][0]
        neighbour = worker.last_shard + 1
        if neighbour in self._waiting and self._all[neighbour].cost >= NEIGHBOUR_SHARE * longest:
            return neighbour
        return self._heap[0][1]

    def _lend(self, worker: _Worker, number: int, now: float, only: RowRanges = ()) -> Lease:
        self._waiting.discard(number)
        queued, attempt = self._all[number], self._attempts[number]
        self._attempts[number] = attempt + 1
        lease = Lease(
            shard=queued.shard,
            attempt=attempt,
            epoch=self._epoch,
            worker_id=worker.info.worker_id,
            replaces=queued.replaces,
            is_last_resort=not only and self._num_lost.get(number, 0) >= self._retry.max_shard_attempts,
            reason=self._reasons.get(number),
            only=only,
        )
        worker.last_shard = number
        if not worker.open:
            worker.progress_at = now
        worker.open[lease.batch_id] = _Open(lease, now)
        worker.num_unfinished += queued.shard.num_rows
        return lease

    def list_silent(self, now: float) -> list[tuple[str, str]]:
        """(worker, reason) of workers to give up: not heard of, or busy without a sign of progress."""
        silent = []
        for worker_id, worker in self._workers.items():
            if now - worker.heard_at > self._cluster.worker_timeout_s:
                silent.append((worker_id, f"not heard of for {self._cluster.worker_timeout_s:g} s"))
            elif worker.open and now - worker.progress_at > self._cluster.stall_timeout_s:
                silent.append((worker_id, f"no token and no row for {self._cluster.stall_timeout_s:g} s"))
        return silent

    def find_hopeless(self) -> tuple[int, str] | None:
        """A shard whose lease failed too often on live workers (its store or input is at fault), with the reason."""
        for number, count in self._num_failed.items():
            if number not in self._done and count >= self._retry.max_shard_attempts:
                return number, self._reasons[number]
        return None

    # ---- what it knows -----------------------------------------------------------------------------------------------

    @property
    def is_done(self) -> bool:
        return len(self._done) == len(self._all)

    @property
    def num_waiting(self) -> int:
        delayed = sum(number not in self._done for _, number in self._delayed)
        return len(self._waiting) + len(self._held_waiting) + delayed

    @property
    def num_shards(self) -> int:
        return len(self._all)

    @property
    def num_done(self) -> int:
        return len(self._done)

    def count_open_rows(self) -> tuple[int, int]:
        """(done, of these errors) rows of leases that are open now; not of shards that another worker has committed."""
        held = [o for w in self._workers.values() for o in w.open.values() if o.lease.shard.number not in self._done]
        return sum(o.num_rows_done for o in held), sum(o.num_rows_error for o in held)

    def list_open(self) -> list[LostLease]:
        """Open leases as they would be lost now: what a resumed run needs to know of them."""
        return [lost for worker_id in self._workers for lost in self.list_leases(worker_id)]

    def list_leases(self, worker_id: str) -> list[LostLease]:
        """The same of one worker."""
        held = self._workers[worker_id].open.values() if worker_id in self._workers else ()
        return [LostLease(o.lease, o.started_at, o.started_at, o.num_rows_done, "driver ended") for o in held]

    def list_workers(self) -> list[WorkerInfo]:
        return [worker.info for worker in self._workers.values()]
