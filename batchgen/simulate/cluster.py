"""A run in virtual time: the production queue and scaling over virtual workers, by an event heap. Deterministic by seed.

The loop does what `dispatch` does, in the same order: scale, lend, take in what workers say, give up silent ones. Workers
are looked at every `beat_s` (production polls every 0.5 s), so that a worker without work waits up to that long for more.
Left out: the driver's own time and failures, a store that is slow or away, rows that fail and are tried again.
"""

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from batchgen.events import Heartbeat
from batchgen.records import Lease, WorkerInfo
from batchgen.scaling import Facts, choose_num_to_start
from batchgen.spec import ClusterSpec, RetrySpec
from batchgen.work_queue import QueuedShard, WorkQueue

MAX_LEASES_PER_TURN = 1000


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the cluster does to a run. `startup_s`: from asking for a worker to its first request, the machine's arrival
    included; it varies by `startup_spread` (a share, evenly). `losses_per_hour`: of one worker, for whatever reason."""

    startup_s: float = 600.0
    startup_spread: float = 0.2
    losses_per_hour: float = 0.0


class Working(Protocol):
    """What the loop needs of a virtual worker."""

    info: WorkerInfo

    def assign(self, lease: Lease) -> None: ...

    def advance(self, until: float) -> None: ...

    def make_heartbeat(self) -> Heartbeat: ...

    def take_committed(self) -> list[tuple[float, Lease]]: ...

    def count_running(self) -> float:
        """Requests that the engine works at."""
        ...

    def count_lost(self) -> int:
        """Tokens that are generated again if it is lost now."""
        ...


@dataclass(frozen=True, slots=True)
class Moment:
    """Of all workers, at a time: tokens made so far, requests in work, workers up and starting."""

    at: float
    tokens: int
    running: float
    num_ready: int
    num_starting: int


@dataclass(slots=True)
class VirtualRun:
    """What a run came to. Worker seconds count from asking for a worker to its end."""

    makespan_s: float = 0.0
    worker_s: float = 0.0
    num_rows: int = 0
    num_shards: int = 0
    num_losses: int = 0
    num_workers: int = 0
    tokens: int = 0
    lost_tokens: int = 0
    moments: list[Moment] = field(default_factory=list)


@dataclass(slots=True)
class _Up:
    worker: Working
    since: float
    lost_at: float


class VirtualCluster:
    """See the module. `make_worker` (id, now) gives a worker that is up."""

    def __init__(
        self,
        shards: Iterable[QueuedShard],
        make_worker: Callable[[str, float], Working],
        *,
        cluster: ClusterSpec,
        retry: RetrySpec | None = None,
        surroundings: Surroundings = Surroundings(),  # noqa: B008 - frozen
        n: int = 1,
        seed: object = 0,
        beat_s: float = 2.0,
    ) -> None:
        shards = list(shards)
        self.queue = WorkQueue(shards, epoch=1, retry=retry or RetrySpec(), cluster=cluster, n=n)
        self._make_worker, self._cluster, self._surroundings = make_worker, cluster, surroundings
        self._beat_s = beat_s
        self._draw = random.Random(f"{seed}:cluster")
        self._events: list[tuple[float, int, str, bool]] = []
        self._num_events = 0
        self._starting: dict[str, float] = {}
        self._up: dict[str, _Up] = {}
        self._startups: list[float] = []
        self._num_rows = sum(queued.shard.num_rows for queued in shards)
        self._rows_done = 0
        self._ready_worker_s, self._turned_at = 0.0, 0.0
        self._tokens_before = 0
        self._sampled_at = -1.0
        self.run_record = VirtualRun()

    def run(self) -> VirtualRun:
        """Until all shards are committed."""
        self._turn(0.0)
        while not self.queue.is_done:
            now, _, worker_id, is_start = heapq.heappop(self._events)
            if is_start:
                self._start(worker_id, now)
            elif worker_id in self._up:
                self._beat(worker_id, now)
            self._turn(now)
        return self._end()

    # ---- one turn ----------------------------------------------------------------------------------------------------

    def _turn(self, now: float) -> None:
        self._ready_worker_s += len(self._up) * (now - self._turned_at)
        self._turned_at = now
        for _ in range(choose_num_to_start(self._make_facts(), self._cluster)):
            self._ask_for_worker(now)
        for _ in range(MAX_LEASES_PER_TURN):
            lease = self.queue.lease_next(now)
            if lease is None:
                break
            self._up[lease.worker_id].worker.assign(lease)
        for worker_id, _ in self.queue.list_silent(now):
            self._lose(worker_id, now)
        if now - self._sampled_at >= self._beat_s:
            self._sample(now)

    def _make_facts(self) -> Facts:
        rows = self._rows_done + self.queue.count_open_rows()[0]
        return Facts(
            num_ready=len(self._up),
            num_starting=len(self._starting),
            num_shards_waiting=self.queue.num_waiting,
            num_rows_left=self._num_rows - rows,
            rows_per_s=rows / self._ready_worker_s if rows and self._ready_worker_s else None,
            startup_s=sum(self._startups) / len(self._startups) if self._startups else None,
        )

    def _ask_for_worker(self, now: float) -> None:
        self.run_record.num_workers += 1
        worker_id = f"worker-{self.run_record.num_workers:04d}"
        around, spread = self._surroundings, self._surroundings.startup_spread
        self._starting[worker_id] = now
        self._push(now + around.startup_s * self._draw.uniform(1 - spread, 1 + spread), worker_id, is_start=True)

    def _push(self, at: float, worker_id: str, *, is_start: bool = False) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (at, self._num_events, worker_id, is_start))

    # ---- events ------------------------------------------------------------------------------------------------------

    def _start(self, worker_id: str, now: float) -> None:
        asked_at = self._starting.pop(worker_id)
        self._startups.append(now - asked_at)
        worker = self._make_worker(worker_id, now)
        losses = self._surroundings.losses_per_hour
        lost_at = now + self._draw.expovariate(losses / 3600) if losses else float("inf")
        self._up[worker_id] = _Up(worker, asked_at, lost_at)
        self.queue.add_worker(worker.info, now)
        self._push(now + self._beat_s, worker_id)

    def _beat(self, worker_id: str, now: float) -> None:
        up = self._up[worker_id]
        if now >= up.lost_at:
            up.worker.advance(up.lost_at)
            self._take_committed(up.worker, now)
            self._lose(worker_id, now)
            return
        up.worker.advance(now)
        self.queue.renew(up.worker.make_heartbeat(), now)
        self._take_committed(up.worker, now)
        self._push(now + self._beat_s, worker_id)

    def _take_committed(self, worker: Working, now: float) -> None:
        for at, lease in worker.take_committed():
            if not self.queue.complete(lease.worker_id, lease.batch_id, lease.shard.number):
                raise AssertionError(f"{lease.shard.id} was committed twice")
            self._rows_done += lease.shard.num_rows
            self.run_record.num_rows += lease.shard.num_rows
            self.run_record.num_shards += 1
            self.run_record.makespan_s = max(self.run_record.makespan_s, at, now - self._beat_s)

    def _lose(self, worker_id: str, now: float) -> None:
        up = self._up.pop(worker_id)
        self.run_record.num_losses += 1
        self.run_record.worker_s += now - up.since
        self.run_record.lost_tokens += up.worker.count_lost()
        self._tokens_before += up.worker.make_heartbeat().total_tokens
        self.queue.lose(worker_id, now, "lost")

    # ---- what it knows -----------------------------------------------------------------------------------------------

    def _sample(self, now: float) -> None:
        self._sampled_at = now
        running = sum(up.worker.count_running() for up in self._up.values())
        self.run_record.moments.append(
            Moment(now, self._count_tokens(), running, len(self._up), len(self._starting))
        )

    def _count_tokens(self) -> int:
        return self._tokens_before + sum(up.worker.make_heartbeat().total_tokens for up in self._up.values())

    def _end(self) -> VirtualRun:
        record, end = self.run_record, self.run_record.makespan_s
        record.tokens = self._count_tokens()
        record.worker_s += sum(max(0.0, end - up.since) for up in self._up.values())
        record.worker_s += sum(max(0.0, end - asked_at) for asked_at in self._starting.values())
        return record
