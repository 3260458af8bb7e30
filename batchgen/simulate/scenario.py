"""A whole virtual run from its parts: shards cut, their rows' expectations summed, queue and workers put together.

Shards are ranges of one virtual file, cut into equal pieces; what the plan would know of their rows' lengths (sum and
longest, where there are hints) is told to the queue by the production `choose_cost`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from batchgen.lengths import choose_cost, choose_work, must_go_in_order
from batchgen.queue.work_queue import QueuedShard
from batchgen.records import InputFile, Shard
from batchgen.simulate.cluster import VirtualCluster
from batchgen.simulate.open_rows import VirtualStore
from batchgen.simulate.policies import WorkerModel
from batchgen.simulate.record import ClusterModel, VirtualRun
from batchgen.simulate.worker import VirtualWorker
from batchgen.simulate.workload import VirtualRow, Workload


@dataclass(frozen=True, slots=True)
class Scenario:
    """`seed` draws rows, start-up times and losses."""

    num_rows: int
    rows_per_shard: int
    worker: WorkerModel
    cluster: ClusterModel
    workload: Workload

    def with_seed(self, seed: object) -> "Scenario":
        return replace(self, workload=self.workload.with_seed(seed))


def cut_shards(num_rows: int, rows_per_shard: int) -> Iterator[Shard]:
    count = math.ceil(num_rows / rows_per_shard)
    file = InputFile("virtual", 0, "", num_rows, (num_rows,))
    for number in range(count):
        yield Shard(number, file, number * num_rows // count, (number + 1) * num_rows // count)


def draw_rows(scenario: Scenario) -> Iterator[tuple[Shard, list[VirtualRow]]]:
    """Every shard with its rows, as whichever worker has it will draw them."""
    for shard in cut_shards(scenario.num_rows, scenario.rows_per_shard):
        yield shard, scenario.workload.draw(shard.number, shard.row_start, shard.num_rows)


def make_queued(scenario: Scenario) -> list[QueuedShard]:
    """What the driver knows: hints' sums where there are hints, else nothing but numbers of rows."""
    if scenario.workload.hint_sigma is None:
        return list(queue_shards(cut_shards(scenario.num_rows, scenario.rows_per_shard), scenario))
    n = scenario.worker.n
    return list(queue_shards((expect(shard, rows, n) for shard, rows in draw_rows(scenario)), scenario))


def expect(shard: Shard, rows: Sequence[VirtualRow], n: int) -> Shard:
    known = [row.expected_tokens for row in rows if row.expected_tokens is not None]
    return replace(shard, expected_tokens=n * sum(known), max_expected_tokens=max(known))


def queue_shards(shards: Iterable[Shard], scenario: Scenario) -> Iterator[QueuedShard]:
    workload, worker = scenario.workload, scenario.worker
    default_tokens = workload.lengths.mean(workload.max_tokens)
    for shard in shards:
        known: dict[str, Any] = {"n": worker.n, "window": worker.window, "max_tokens": workload.max_tokens}
        known |= {"prior": None, "default_tokens": default_tokens}
        yield QueuedShard(shard, cost=choose_cost(shard, **known), work=choose_work(shard, **known))


def is_in_order(scenario: Scenario) -> bool:
    """As `Job.is_in_order`."""
    worker, is_hinted = scenario.worker, scenario.workload.hint_sigma is not None
    num_workers = scenario.cluster.cluster.workers.max
    return must_go_in_order(scenario.num_rows * worker.n, num_workers, worker.window, is_hinted=is_hinted)


def run_exactly(scenario: Scenario) -> VirtualRun:
    """Row by row. Raises AssertionError where a row comes out twice or not at all."""
    store, max_workers = VirtualStore(), scenario.cluster.cluster.workers.max
    model = replace(scenario.worker, num_requests=scenario.num_rows * scenario.worker.n // max_workers)

    def make_worker(worker_id: str, now: float) -> VirtualWorker:
        return VirtualWorker(worker_id, model, scenario.workload, store, now)

    follows_hints, seed = not is_in_order(scenario), scenario.workload.seed
    cluster = VirtualCluster(make_queued(scenario), make_worker, scenario.cluster, seed, follows_hints=follows_hints)
    record = cluster.run()
    if record.stop is None and record.num_rows != scenario.num_rows:
        raise AssertionError(f"{record.num_rows} rows came out of {scenario.num_rows}")
    return record
