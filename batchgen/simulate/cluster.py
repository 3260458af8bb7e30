"""A run in virtual time: the production queue, sharing and scaling over virtual workers, by an event heap. Deterministic.

The loop does what `dispatch` does, in the same order: scale, lend, split, take in what workers say, lose silent ones. They
are looked at every `beat_s` (production polls every 0.5 s), so that a worker without work waits up to that long for more.
Left out: the driver's own time and failures, a store that is slow or away, rows that fail and are tried again.
"""

import heapq
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast

from batchgen.journal import JournalIndex
from batchgen.queue.events import RowsGiven, ShareEnded, WorkerPool
from batchgen.queue.governor import RunFacts, Verdict, govern
from batchgen.queue.orders import Order
from batchgen.queue.roster import Roster
from batchgen.queue.scaling import Facts, choose_num_to_start, choose_to_release
from batchgen.queue.sharing import Sharing
from batchgen.queue.tail import TailPolicy
from batchgen.queue.work_queue import QueuedShard, WorkQueue
from batchgen.simulate.open_rows import Committed, VirtualEvent
from batchgen.simulate.record import ClusterModel, Moment, VirtualRun, Working

MAX_LEASES_PER_TURN = 1000
# A run that lost more workers than this for each it may have, and some, will hardly end.
MAX_LOSSES_EACH, MAX_LOSSES = 100, 1000


class VirtualCluster:
    """See the module. `make_worker` (id, now) gives a worker that is up."""

    def __init__(
        self,
        shards: Iterable[QueuedShard],
        make_worker: Callable[[str, float], Working],
        model: ClusterModel,
        seed: object = 0,
        *,
        follows_hints: bool = True,
    ) -> None:
        shards = list(shards)
        self.queue = WorkQueue(
            shards, epoch=1, retry=model.retry, cluster=model.cluster, n=model.n, follows_hints=follows_hints
        )
        self.roster = Roster(model.gpus_per_worker)
        self.workers: dict[str, Working] = {}
        self.record = VirtualRun()
        self._make_worker, self._model = make_worker, model
        self._draw = random.Random(f"{seed}:cluster")
        self._events: list[tuple[float, int, str]] = []
        self._num_events = 0
        self._lost_at: dict[str, float] = {}
        self._num_rows = sum(queued.shard.num_rows for queued in shards)
        self._tokens_before, self._moment_at, self._look_at = 0, 0.0, 0.0
        self._sharing = None if model.tail is None else self._make_sharing(model.tail)

    def _make_sharing(self, tail: TailPolicy) -> Sharing:
        # It tells workers their orders and asks nothing else of a pool; its index and store are the workers' own here.
        pool = cast(WorkerPool, self)
        return Sharing(self.queue, pool, JournalIndex(), 1, self._model.n, tail, delete=lambda _: None)

    def tell(self, worker_id: str, order: Order) -> None:
        if (worker := self.workers.get(worker_id)) is not None:
            worker.obey(order)

    def run(self) -> VirtualRun:
        """Until all shards are committed, or the spec's deadline or GPU-hours end it."""
        self.roster.turn(0.0)
        self._turn(0.0)
        while not self.queue.is_done and self.record.stop is None:
            now, _, worker_id = heapq.heappop(self._events)
            self.roster.turn(now)  # before anything changes who is up
            if worker_id in self.roster.starting:
                self._start(worker_id, now)
            elif worker_id in self.workers:
                self._beat(worker_id, now)
            self._turn(now)
        return self._end()

    # ---- one turn ----------------------------------------------------------------------------------------------------

    def _turn(self, now: float) -> None:
        facts = self._make_facts()
        verdict = self._govern(facts, now)
        if verdict.stop is not None:
            self._stop(verdict.stop, now)
            return
        for _ in range(choose_num_to_start(facts, self._model.cluster, verdict.min_workers, verdict.max_workers)):
            self._ask_for_worker(now)
        if self.queue.num_waiting == 0 and now >= self._look_at:
            self._look_at = now + self._model.beat_s  # looks at every worker
            self._release_idle(now)
        for _ in range(MAX_LEASES_PER_TURN):
            lease = self.queue.lease_next(now)
            if lease is None:
                break
            self.workers[lease.worker_id].assign(lease)
        if self._sharing is not None:
            self._sharing.split(now)
        for worker_id, _ in self.queue.list_silent(now):
            self._lose(worker_id, now)
        if now >= self._moment_at:
            self._note_moment(now)

    def _make_facts(self) -> Facts:
        rows, roster = self.record.num_rows + self.queue.count_open_rows()[0], self.roster
        return Facts(
            num_ready=len(roster.workers),
            num_starting=len(roster.starting),
            num_shards_waiting=self.queue.num_waiting,
            num_rows_left=self._num_rows - rows,
            rows_per_s=rows / roster.ready_worker_s if rows and roster.ready_worker_s else None,
            startup_s=roster.mean_startup_s,
        )

    def _govern(self, facts: Facts, now: float) -> Verdict:
        is_limited = self._model.cluster.max_gpu_hours is not None  # else nobody asks, and it is a sum over all workers
        known = RunFacts(
            now=self._model.began_at + now,
            num_rows_left=facts.num_rows_left,
            num_rows=self._num_rows,
            num_ready=facts.num_ready,
            num_starting=facts.num_starting,
            gpu_s=self.roster.count_gpu_s(now) if is_limited else 0.0,
            rows_per_s=facts.rows_per_s,
            startup_s=facts.startup_s,
        )
        return govern(known, self._model.cluster)

    def _stop(self, reason: str, now: float) -> None:
        """The drain itself is not modelled: what is in flight is lost, what was committed stands."""
        self.record.stop = reason
        self.record.makespan_s = max(self.record.makespan_s, now)

    def _ask_for_worker(self, now: float) -> None:
        self.record.num_workers += 1
        around = self._model.surroundings
        spread = self._draw.uniform(1 - around.startup_spread, 1 + around.startup_spread)
        self._push(now + around.startup_s * spread, self.roster.make_worker_id(now))

    def _release_idle(self, now: float) -> None:
        busy = {worker.info.worker_id for worker in self.queue.look_at_workers() if worker.is_busy}
        self.roster.note_idle(busy, now)
        after_s = (self._model.tail or TailPolicy()).release_after_s
        idle, ready = self.roster.idle_since, len(self.roster.workers)
        for worker_id in choose_to_release(idle, now, ready, self._model.cluster, after_s=after_s):
            self._remove(worker_id, now)
            self.roster.num_released += 1
            self.queue.lose(worker_id, now, "released")

    def _push(self, at: float, worker_id: str) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (at, self._num_events, worker_id))

    # ---- events ------------------------------------------------------------------------------------------------------

    def _start(self, worker_id: str, now: float) -> None:
        worker = self._make_worker(worker_id, now)
        self.roster.greet(replace(worker.info, startup_s=math.inf), now)
        self.workers[worker_id] = worker
        losses = self._model.surroundings.losses_per_hour
        self._lost_at[worker_id] = now + self._draw.expovariate(losses / 3600) if losses else math.inf
        self.queue.add_worker(worker.info, now)
        self._push(now + self._model.beat_s, worker_id)

    def _beat(self, worker_id: str, now: float) -> None:
        worker, lost_at = self.workers[worker_id], self._lost_at[worker_id]
        worker.advance(min(now, lost_at))
        if now >= lost_at:  # what it said last came through, what it did after its last flush did not
            self._handle(worker.take_events(), now)
            self._lose(worker_id, now)
            return
        self.queue.renew(worker.make_heartbeat(), now)
        self._handle(worker.take_events(), now)
        self._push(now + self._model.beat_s, worker_id)

    def _handle(self, events: Iterable[VirtualEvent], now: float) -> None:
        for event in events:
            if isinstance(event, Committed):
                self._commit(event, now)
            elif self._sharing is not None and isinstance(event, RowsGiven):
                self.record.num_shares += event.num_requests > 0
                self._sharing.note_given(event, now)
            elif self._sharing is not None and isinstance(event, ShareEnded):
                self._sharing.note_ended(event)

    def _commit(self, event: Committed, now: float) -> None:
        lease, record = event.lease, self.record
        if not self.queue.complete(lease.worker_id, lease.batch_id, lease.shard.number):
            raise AssertionError(f"{lease.shard.id} was committed twice")
        record.num_rows += lease.shard.num_rows
        record.num_shards += 1
        record.makespan_s = max(record.makespan_s, event.at)
        if self._sharing is not None:
            self._sharing.note_committed(lease.shard.number, now)

    def _lose(self, worker_id: str, now: float) -> None:
        self.record.num_losses += 1
        if self.record.num_losses > MAX_LOSSES + MAX_LOSSES_EACH * self._model.cluster.workers.max:
            self._stop(f"{self.record.num_losses:,} workers were lost; at that rate the job hardly ends", now)
        self.record.lost_tokens += self.workers[worker_id].count_lost()
        self._remove(worker_id, now)
        shares = self.queue.list_shares(worker_id)
        self.queue.lose(worker_id, now, "lost")
        if self._sharing is not None:
            self._sharing.note_lost(worker_id, shares, now, "lost")

    def _remove(self, worker_id: str, now: float) -> None:
        self._tokens_before += self.workers.pop(worker_id).count_tokens()
        self.roster.remove(worker_id, now)

    # ---- what it knows -----------------------------------------------------------------------------------------------

    def _note_moment(self, now: float) -> None:
        self._moment_at = now + self._model.moment_s
        running = sum(worker.count_running() for worker in self.workers.values())
        ready, starting = len(self.workers), len(self.roster.starting)
        self.record.moments.append(Moment(now, self._count_tokens(), running, ready, starting))

    def _count_tokens(self) -> int:
        return self._tokens_before + sum(worker.count_tokens() for worker in self.workers.values())

    def _end(self) -> VirtualRun:
        self._note_moment(self.record.makespan_s)
        self.record.tokens = self._count_tokens()
        self.record.gpu_s = self.roster.count_gpu_s(self.record.makespan_s)
        return self.record
