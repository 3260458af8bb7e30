"""How many workers to start now, and which to let go. Pure.

A new worker is worth its start-up when the work left, shared by all workers and it, would keep it busy for longer than
it takes to start. Only a few start at a time, so that a cluster that can't place them isn't flooded; start failures in
a row end the run with the first one's reason instead of going on for ever. At the tail, workers that get no more work are
released down to the least number: their GPUs cost as much as busy ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from batchgen.spec import ClusterSpec


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known now. `rows_per_s` is the mean of one ready worker, None before any row was finished; `startup_s`
    the mean of the workers that came up, None before the first."""

    num_ready: int
    num_starting: int
    num_shards_waiting: int
    num_rows_left: int
    rows_per_s: float | None = None
    startup_s: float | None = None


def choose_num_to_start(facts: Facts, cluster: ClusterSpec, least: int = 0, most: int | None = None) -> int:
    """Workers to start now, 0 or more. `least` and `most`: what the run's limits ask for (`governor`)."""
    most = cluster.workers.max if most is None else min(most, cluster.workers.max)
    room = min(most - facts.num_ready, cluster.max_starting) - facts.num_starting
    if room <= 0 or facts.num_rows_left == 0:
        return 0
    up = facts.num_ready + facts.num_starting
    # More than the least number only while shards wait: at the tail they would be let go again.
    least = max(cluster.workers.min, least if facts.num_shards_waiting else 0)
    if up < least:
        return min(room, least - up)
    return sum(1 for extra in range(1, room + 1) if _is_worth_it(facts, up + extra, extra))


def _is_worth_it(facts: Facts, num_workers: int, num_extra: int) -> bool:
    if facts.rows_per_s is None or facts.startup_s is None:
        return False
    # Workers that start already will take a waiting shard each; without one left the new worker would idle.
    if facts.num_shards_waiting < facts.num_starting + num_extra:
        return False
    return facts.num_rows_left / (facts.rows_per_s * num_workers) > facts.startup_s


def choose_to_release(
    idle_since: Mapping[str, float], now: float, num_ready: int, cluster: ClusterSpec, *, after_s: float
) -> list[str]:
    """Of the workers that are idle since then, while no shard waits: those to end now, longest idle first. The time of
    grace is for a shard that comes back from a lost worker, and for rows of another's that are moved."""
    ripe = sorted((since, worker_id) for worker_id, since in idle_since.items() if now - since >= after_s)
    return [worker_id for _, worker_id in ripe[: max(0, num_ready - cluster.workers.min)]]
