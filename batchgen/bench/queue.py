"""What the driver costs: `jobs/bench_queue.py`. The real queue and the real loop over workers that are only counted.

First the queue alone, each step timed: leases, heartbeats, commits. Then a whole run through `Dispatcher`, whose pool
answers every lease with the commit that a worker would send, stats and sketches of real rows included, pickled as Ray
would: what the driver holds in the end is what it holds of a real run.
"""

import json
import pickle
import random
import resource
import tempfile
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchgen.batches import BatchStats, FileFooter, GateCounts
from batchgen.build import build_id
from batchgen.driver.dispatch import Dispatcher
from batchgen.journal import JournalIndex
from batchgen.manifest import write_committed
from batchgen.queue.events import Heartbeat, PoolEvent, ShardCommitted, WorkerStarted
from batchgen.queue.inquiry import Inquiry
from batchgen.queue.orders import Order
from batchgen.queue.trial_queue import TrialQueue
from batchgen.queue.work_queue import QueuedShard, WorkQueue
from batchgen.records import InputFile, Lease, Shard, ShardProgress, WorkerInfo
from batchgen.spec import JobSpec
from batchgen.stats import count_rows, make_batch_stats
from batchgen.storage import Storage
from batchgen.write import make_result_schema

ROWS_PER_SHARD = 500
WINDOW = 256
# Workers heard of in one turn of the loop.
BEATS_PER_TURN = 50


def make_shards(num_shards: int) -> list[QueuedShard]:
    """Of many files, their costs all different."""
    draw, shards, groups = random.Random(1), [], (ROWS_PER_SHARD,) * 1000
    for number in range(num_shards):
        if number % 1000 == 0:
            file = InputFile(f"s3://bucket/in/{number}.parquet", 10**8, "v", sum(groups), groups)
        start = number % 1000 * ROWS_PER_SHARD
        shards.append(QueuedShard(Shard(number, file, start, start + ROWS_PER_SHARD), cost=draw.random()))
    return shards


def make_info(number: int) -> WorkerInfo:
    return WorkerInfo(f"worker-{number:04d}", build_id(), f"node-{number}", "simulated", "1", 8.0, WINDOW, 60.0)


def make_beat(worker_id: str, leases: Iterable[Lease], tokens: int) -> Heartbeat:
    progress = tuple(ShardProgress(lease.batch_id, ROWS_PER_SHARD // 2, 0) for lease in leases)
    return Heartbeat(worker_id, tokens, WINDOW, 0.0, progress)


def make_job(path: str, num_workers: int) -> JobSpec:
    return JobSpec.model_validate(
        {
            "input": {"paths": ["s3://bucket/in"]},
            "prompt": {"column": "prompt"},
            "engine": {"kind": "simulated"},
            "output": {"path": path},
            "cluster": {
                "workers": {"min": num_workers, "max": num_workers},
                "max_starting": num_workers,
                "gpus_per_worker": 8,
            },
        }
    )


# ---- the queue alone -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Timer:
    """Seconds of each call."""

    spent: list[float] = field(default_factory=list)

    def call(self, function: Any, *args: Any) -> Any:
        started = time.perf_counter()
        found = function(*args)
        self.spent.append(time.perf_counter() - started)
        return found

    def describe(self) -> dict[str, float]:
        ordered = sorted(self.spent)
        return {
            "mean_us": round(1e6 * sum(ordered) / len(ordered), 2),
            "p99_us": round(1e6 * ordered[int(0.99 * len(ordered))], 2),
            "calls": len(ordered),
        }


def measure_queue(num_shards: int, num_workers: int) -> dict[str, dict[str, float]]:
    """Each step of a whole run: every shard is leased, heard of once and committed."""
    spec = make_job("/out", num_workers)
    queue = WorkQueue(make_shards(num_shards), epoch=1, retry=spec.retry, cluster=spec.cluster)
    lease_time, beat_time, commit_time = Timer(), Timer(), Timer()
    for number in range(num_workers):
        queue.add_worker(make_info(number), 0.0)
    draw, now, held = random.Random(2), 0.0, list[Lease]()
    while not queue.is_done:
        now += 0.001
        while (lease := lease_time.call(queue.lease_next, now)) is not None:
            held.append(lease)
        place = draw.randrange(len(held))
        held[place], held[-1] = held[-1], held[place]
        lease = held.pop()
        beat_time.call(queue.renew, make_beat(lease.worker_id, [lease], len(held)), now)
        commit_time.call(queue.complete, lease.worker_id, lease.batch_id, lease.shard.number)
    return {"lease": lease_time.describe(), "heartbeat": beat_time.describe(), "commit": commit_time.describe()}


# ---- the whole loop --------------------------------------------------------------------------------------------------


def make_rows(spec: JobSpec) -> pa.Table:
    """Result rows of one shard with lengths and latencies of a long tail."""
    draw, schema = random.Random(3), make_result_schema(spec)
    tokens = [1 + int(draw.lognormvariate(7.5, 1.0)) for _ in range(ROWS_PER_SHARD)]
    known: dict[str, list[Any]] = {
        "source_row": list(range(ROWS_PER_SHARD)),
        "sample_index": [0] * ROWS_PER_SHARD,
        "text": [""] * ROWS_PER_SHARD,
        "finish_reason": ["stop"] * ROWS_PER_SHARD,
        "prompt_tokens": [1 + int(draw.lognormvariate(5.5, 1.0)) for _ in tokens],
        "completion_tokens": tokens,
        "status": ["ok"] * ROWS_PER_SHARD,
        "num_attempts": [1] * ROWS_PER_SHARD,
        "queued_s": [draw.random() for _ in tokens],
        "ttft_s": [draw.lognormvariate(0.0, 0.5) for _ in tokens],
        "latency_s": [5 + num * draw.uniform(0.02, 0.03) for num in tokens],
        "batch_id": ["b"] * ROWS_PER_SHARD,
    }
    columns = [pa.array(known.get(each.name, [None] * ROWS_PER_SHARD), each.type) for each in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def copy_texts(stats: BatchStats) -> BatchStats:
    """The same with texts of its own: pickle would share one among all commits of a poll, which workers can't."""
    sketches = {name: bytes(text, "ascii").decode() for name, text in (stats.sketches or {}).items()}
    latency = {name: value if value is None else value + 1e-9 for name, value in (stats.latency or {}).items()}
    return replace(stats, sketches=sketches, latency=latency, lengths=bytes(stats.lengths or "", "ascii").decode())


@dataclass(slots=True)
class CountingPool:
    """A pool of workers that commit every lease, in turn. `commit` is what each of them says, but for its names."""

    rows: pa.Table
    stats: BatchStats
    _started: list[str] = field(default_factory=list)
    _open: dict[str, dict[str, Lease]] = field(default_factory=dict)
    _queue: deque[Lease] = field(default_factory=deque)
    _tokens: int = 0
    outside_s: float = 0.0

    def start_worker(self, worker_id: str) -> None:
        self._started.append(worker_id)
        self._open[worker_id] = {}

    def assign(self, lease: Lease) -> None:
        self._open[lease.worker_id][lease.batch_id] = lease
        self._queue.append(lease)

    def tell(self, worker_id: str, order: Order) -> None:
        """Nothing is ever given: every shard is committed at once."""

    def kill(self, worker_id: str) -> None:
        self._open.pop(worker_id, None)

    def poll(self, timeout_s: float) -> list[PoolEvent]:  # noqa: ARG002 - there is always news
        started = time.perf_counter()
        events: list[PoolEvent] = [
            WorkerStarted(replace(make_info(0), worker_id=worker_id)) for worker_id in self._started
        ]
        self._started.clear()
        for _ in range(min(BEATS_PER_TURN, len(self._queue))):
            lease = self._queue.popleft()
            del self._open[lease.worker_id][lease.batch_id]
            self._tokens += 1
            events.append(self._make_commit(lease))
            events.append(make_beat(lease.worker_id, self._open[lease.worker_id].values(), self._tokens))
        events = pickle.loads(pickle.dumps(events))
        self.outside_s += time.perf_counter() - started
        return events

    def drain(self, timeout_s: float) -> list[PoolEvent]:  # noqa: ARG002 - nothing is left
        return []

    def close(self) -> None:
        """Nothing to end."""

    def _make_commit(self, lease: Lease) -> ShardCommitted:
        own = copy_texts(self.stats)
        stats = replace(
            own, batch_id=lease.batch_id, shard=lease.shard.id, attempt=lease.attempt, worker=lease.worker_id
        )
        counts, gates = (ROWS_PER_SHARD, 0, 0), GateCounts(f"{lease.shard.number:016d}", 0, 10**6)
        footer = FileFooter(1, "f" * 32, lease.shard.number, lease.attempt, 1, lease.batch_id, *counts, (stats,), gates)
        version = f"etag-{lease.shard.number:032d}"
        return ShardCommitted(
            lease.worker_id, lease.batch_id, stats, 10**7, version, footer, f"{lease.shard.number:064d}"
        )


def measure_driver(num_shards: int, num_workers: int) -> dict[str, float]:
    """A whole run through the driver's loop, and what it holds at its end."""
    with tempfile.TemporaryDirectory() as folder:
        spec = make_job(folder, num_workers)
        shards = make_shards(num_shards)
        rows = make_rows(spec)
        pool = CountingPool(rows, make_sample_stats(shards[0].shard, rows))
        turns: list[float] = []
        queue, index = TrialQueue(shards, epoch=1, retry=spec.retry, cluster=spec.cluster), JournalIndex()
        dispatcher = Dispatcher(
            spec=spec,
            storage=Storage(folder),
            queue=queue,
            pool=pool,
            epoch=1,
            index=index,
            inquiry=Inquiry(Storage(folder), spec, queue, index, lambda _: None),
            num_rows=num_shards * ROWS_PER_SHARD,
            num_rows_done_before=0,
            check=lambda: None,
            on_progress=lambda _: turns.append(time.perf_counter()),
            on_warning=lambda _: None,
        )

        def put(path: str, data: bytes) -> None:
            dispatcher.storage.put(path, data)

        started = time.perf_counter()
        dispatcher.run()
        spent = time.perf_counter() - started - pool.outside_s
        held = read_rss_mb()
        write_committed(put, dispatcher.ledger.committed.values())
    return {
        "us_a_shard": round(1e6 * spent / num_shards, 1),
        "turns": len(turns),
        "longest_turn_ms": round(1e3 * max(b - a for a, b in pairwise(turns)), 1),
        "rss_mb": held,
        "peak_rss_mb": read_peak_mb(),
    }


def read_peak_mb() -> float:
    """The most that the process ever held."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def read_rss_mb() -> float:
    """What the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / 2**20, 1)


def make_sample_stats(shard: Shard, rows: pa.Table) -> BatchStats:
    assert count_rows(rows)["num_rows_ok"] == ROWS_PER_SHARD
    return make_batch_stats(
        Lease(shard, 1, 1, "worker-0001"),
        make_info(1),
        rows,
        started_at=1.8e9,
        wall_s=1200.0,
        mean_inflight=200.0,
        num_from_journal=0,
        num_copied=0,
        read_s=1.0,
        write_s=0.5,
    )


def run_bench(num_shards: int, num_workers: int, *, is_queue_only: bool = False) -> None:
    """Prints both measurements for people, and a JSON line."""
    queue = measure_queue(num_shards, num_workers)
    for name, figures in queue.items():
        mean, p99 = figures["mean_us"], figures["p99_us"]
        print(f"queue, {name:9} mean {mean:7.1f} us, p99 {p99:7.1f} us, {figures['calls']:,} calls")
    driver = {"peak_rss_mb": read_peak_mb()} if is_queue_only else measure_driver(num_shards, num_workers)
    print("driver: " + ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in driver.items()))
    print(json.dumps({"shards": num_shards, "workers": num_workers, "queue": queue, "driver": driver}))
