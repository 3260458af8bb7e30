"""Many engines and many rows by aggregation: a shard is a number of rows and a sum of tokens, an engine a rate.

What is aggregated, and what that costs:

- the rows of a shard are one draw: their tokens sum up to a normal variable with the mean and variance of the lengths
  (central limit; shards of a few hundred rows or more);
- an engine with a full window sends rows at the rate of its `Profile`, measured once row by row on the same workload with
  the same policies. A shard is complete `drain_s` after its last row was sent, which is late for all but the last one;
- an engine that had nothing to send for a while fills its window at once, in proportion to how empty it was;
- shards are not split at the end, and the order of rows inside a shard has no effect. A run's end is overstated by up to
  the time of one shard on one engine.

Against the same run row by row the makespan is within 5 % (`tests/test_simulate_estimate.py`). Queue, leases, losses,
journal and scaling are the production code as in an exact run.
"""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from batchgen.queue.events import Heartbeat
from batchgen.queue.orders import Order
from batchgen.records import Lease, ShardProgress, WorkerInfo
from batchgen.simulate.cluster import VirtualCluster
from batchgen.simulate.open_rows import Committed, VirtualEvent
from batchgen.simulate.profile import Profile, measure
from batchgen.simulate.record import VirtualRun
from batchgen.simulate.scenario import Scenario, cut_shards, queue_shards
from batchgen.simulate.workload import Lengths


@dataclass(slots=True, eq=False)
class _Open:
    lease: Lease
    num_rows: int
    num_unsent: float
    tokens_per_row: float
    ends_at: float | None = None


@dataclass(slots=True)
class FluidStore:
    """Rows of each shard that a lost worker had journaled, about."""

    finished: dict[int, int] = field(default_factory=dict)


class FluidWorker:
    """See the module."""

    def __init__(
        self, worker_id: str, scenario: Scenario, profile: Profile, store: FluidStore, spread: float, now: float
    ) -> None:
        self._scenario, self._profile, self._store, self._spread = scenario, profile, store, spread
        worker = scenario.worker
        self.info = WorkerInfo(worker_id, "", worker_id, "virtual", "", worker.num_gpus, worker.window, 0.0)
        self._window_rows = worker.window / worker.n
        self._now, self._dry_since = now, now - profile.drain_s
        self._open: dict[str, _Open] = {}
        self._sending: deque[_Open] = deque()
        self._ending: deque[_Open] = deque()
        self._events: list[VirtualEvent] = []
        self._tokens = 0.0

    def assign(self, lease: Lease) -> None:
        shard = lease.shard
        num_rows = max(0, shard.num_rows - self._store.finished.get(shard.number, 0))
        draw = random.Random(f"{self._scenario.workload.seed}:{shard.number}")
        mean = self._profile.tokens_per_s / self._profile.rows_per_s
        tokens = max(0.1 * mean, draw.gauss(mean, self._spread / max(1, num_rows) ** 0.5))
        opened = _Open(lease, num_rows, num_rows, tokens)
        self._open[lease.batch_id] = opened
        self._sending.append(opened)

    def obey(self, order: Order) -> None:
        raise NotImplementedError("aggregated shards are not split")

    def advance(self, until: float) -> None:
        if self._sending and self._dry_since < self._now:
            self._refill()
        while self._sending:
            opened = self._sending[0]
            # A shard of longer rows is sent more slowly: the engine's rate is in tokens.
            rate = self._profile.tokens_per_s / opened.tokens_per_row
            seconds = opened.num_unsent / rate
            if self._now + seconds > until:
                sent = max(0.0, until - self._now) * rate
                opened.num_unsent -= sent
                self._tokens += sent * opened.tokens_per_row
                self._now = max(self._now, until)
                break
            self._now += seconds
            self._tokens += opened.num_unsent * opened.tokens_per_row
            self._finish_sending(opened)
        if not self._sending:
            self._now = max(self._now, until)
        else:
            self._dry_since = self._now
        while self._ending and (self._ending[0].ends_at or 0.0) <= until:
            self._commit(self._ending.popleft())

    def _refill(self) -> None:
        """Rows that fit the window as it is empty by now, at once."""
        share = min(1.0, (self._now - self._dry_since) / max(1e-9, self._profile.drain_s))
        room = share * self._window_rows
        while room > 0 and self._sending:
            opened = self._sending[0]
            sent = min(room, opened.num_unsent)
            opened.num_unsent -= sent
            self._tokens += sent * opened.tokens_per_row
            room -= sent
            if opened.num_unsent > 0:
                break
            self._finish_sending(opened)
        self._dry_since = self._now

    def _finish_sending(self, opened: _Open) -> None:
        opened.num_unsent = 0.0
        opened.ends_at = self._now + self._profile.drain_s
        self._sending.popleft()
        self._ending.append(opened)
        self._dry_since = self._now

    def _commit(self, opened: _Open) -> None:
        del self._open[opened.lease.batch_id]
        assert opened.ends_at is not None
        self._events.append(Committed(opened.ends_at + self._scenario.worker.commit_s, opened.lease))

    def take_events(self) -> list[VirtualEvent]:
        events, self._events = self._events, []
        return events

    def make_heartbeat(self) -> Heartbeat:
        progress = tuple(
            ShardProgress(opened.lease.batch_id, done, 0, round(opened.num_unsent))
            for opened, done in self._list_done()
        )
        return Heartbeat(self.info.worker_id, round(self._tokens), round(self.count_running()), 0.0, progress)

    def _list_done(self) -> Iterator[tuple[_Open, int]]:
        """Rows finished of each shard, journaled ones too: what was sent and left the window, of the oldest first."""
        unfinished = self._window_rows * self._share_full()
        sent = sum(opened.num_rows - opened.num_unsent for opened in self._open.values())
        finished = max(0.0, sent - unfinished)
        for opened in self._open.values():
            done = min(finished, opened.num_rows - opened.num_unsent)
            finished -= done
            yield opened, opened.lease.shard.num_rows - opened.num_rows + int(done)

    def _share_full(self) -> float:
        """How much of the window is in use."""
        if self._sending:
            return 1.0
        return max(0.0, 1 - (self._now - self._dry_since) / max(1e-9, self._profile.drain_s)) if self._ending else 0.0

    def count_tokens(self) -> int:
        return round(self._tokens)

    def count_running(self) -> float:
        return self._profile.mean_running * self._share_full()

    def count_lost(self) -> int:
        """About half of what is in its work. What is finished stays for the next lease."""
        for opened, done in self._list_done():
            self._store.finished[opened.lease.shard.number] = done
        mean = self._profile.tokens_per_s / self._profile.rows_per_s
        return round(self.count_running() * mean / self._scenario.worker.n / 2)


def find_spread(lengths: Lengths, max_tokens: int, n: int) -> float:
    """Standard deviation of one row's completion tokens, its n samples together."""
    mean = lengths.mean(max_tokens)
    pairs = zip(lengths.pairs, lengths.counts, strict=True)
    variance = sum(count * (min(pair[1], max_tokens) - mean) ** 2 for pair, count in pairs) / lengths.num_rows
    return float((n * variance) ** 0.5)


def run_aggregated(scenario: Scenario, profile: Profile | None = None) -> VirtualRun:
    """As `run_exactly`, by shards."""
    found = profile or measure(scenario)
    workload, store = scenario.workload, FluidStore()
    spread = find_spread(workload.lengths, workload.max_tokens, scenario.worker.n)

    def make_worker(worker_id: str, now: float) -> FluidWorker:
        return FluidWorker(worker_id, scenario, found, store, spread, now)

    queued = queue_shards(cut_shards(scenario.num_rows, scenario.rows_per_shard), scenario)
    record = VirtualCluster(queued, make_worker, scenario.cluster, workload.seed).run()
    if record.stop is None and record.num_rows != scenario.num_rows:
        raise AssertionError(f"{record.num_rows} rows came out of {scenario.num_rows}")
    return record
