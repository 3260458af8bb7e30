"""How long a job takes and what it costs: many virtual runs of it, and what they agree on.

Each run has its own seed: rows are drawn anew from a sample of lengths that is itself drawn anew (the smoothed bootstrap),
workers start and are lost at other times. The interval holds nine of ten of those runs. It knows nothing of what the
engine's model has wrong: its measured error against published figures (up to a quarter) comes on top, as a factor on all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from batchgen.simulate.fluid import run_aggregated
from batchgen.simulate.profile import measure
from batchgen.simulate.record import VirtualRun
from batchgen.simulate.scenario import Scenario, run_exactly

# More requests than this are simulated by shards. Row by row a run of so many takes some seconds.
MAX_EXACT_REQUESTS = 50_000
# Beats of a whole run: enough that none matters, few enough to be quick.
MAX_BEATS = 2000
LOW, HIGH = 0.05, 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one job. Times in seconds; (low, middle, high) of nine runs in ten. `utilisation`: requests in the engines' work
    over their slots, while workers are up. `runs` keeps the first, to be drawn."""

    makespan_s: tuple[float, float, float]
    gpu_hours: tuple[float, float, float]
    tokens: float
    lost_tokens: float
    utilisation: float
    num_runs: int
    num_losses: float
    num_workers: float
    is_exact: bool
    first: VirtualRun
    stop: str | None


def estimate(scenario: Scenario, *, num_runs: int, seed: object, is_exact: bool | None = None) -> Estimate:
    """`is_exact` None: row by row where that is quick."""
    if is_exact is None:
        is_exact = scenario.num_rows * scenario.worker.n <= MAX_EXACT_REQUESTS
    run = run_exactly if is_exact else _make_aggregated(scenario, seed)
    records = [run(resample(scenario, f"{seed}:{number}")) for number in range(num_runs)]
    return summarise(records, scenario, is_exact=is_exact)


def resample(scenario: Scenario, seed: str) -> Scenario:
    """The same job as another sample of the same lengths would have shown it."""
    workload = scenario.workload
    lengths = workload.lengths.resample(seed, workload.max_tokens)
    return replace(scenario, workload=replace(workload, lengths=lengths)).with_seed(seed)


def _make_aggregated(scenario: Scenario, seed: object) -> Callable[[Scenario], VirtualRun]:
    """One engine is measured once; its rate in rows follows the mean of each resampled length."""
    profile = measure(scenario, seed)
    mean = scenario.workload.lengths.mean(scenario.workload.max_tokens)
    workers = scenario.cluster.cluster.workers.max
    expected_s = scenario.num_rows / profile.rows_per_s / workers + scenario.cluster.surroundings.startup_s
    beat_s = max(scenario.cluster.beat_s, expected_s / MAX_BEATS)

    def run(found: Scenario) -> VirtualRun:
        scale = found.workload.lengths.mean(found.workload.max_tokens) / mean
        cluster = replace(found.cluster, beat_s=beat_s, moment_s=max(found.cluster.moment_s, beat_s), tail=None)
        return run_aggregated(replace(found, cluster=cluster), replace(profile, rows_per_s=profile.rows_per_s / scale))

    return run


def summarise(records: Sequence[VirtualRun], scenario: Scenario, *, is_exact: bool) -> Estimate:
    count = len(records)
    return Estimate(
        makespan_s=spread([record.makespan_s for record in records]),
        gpu_hours=spread([record.gpu_s / 3600 for record in records]),
        tokens=sum(record.tokens for record in records) / count,
        lost_tokens=sum(record.lost_tokens for record in records) / count,
        utilisation=sum(find_utilisation(record, scenario) for record in records) / count,
        num_runs=count,
        num_losses=sum(record.num_losses for record in records) / count,
        num_workers=sum(record.num_workers for record in records) / count,
        is_exact=is_exact,
        first=records[0],
        stop=next((record.stop for record in records if record.stop is not None), None),
    )


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(low, middle, high): nine of ten lie between low and high. A run yet to come is one more draw of the same kind, so
    that of n values the ranks are of n + 1 (with fewer than 20 runs: the smallest and the largest)."""
    ordered = sorted(values)
    return _quantile(ordered, LOW), _quantile(ordered, 0.5), _quantile(ordered, HIGH)


def _quantile(ordered: Sequence[float], q: float) -> float:
    place = min(max(q * (len(ordered) + 1) - 1, 0.0), len(ordered) - 1.0)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def find_utilisation(record: VirtualRun, scenario: Scenario) -> float:
    """Requests in work over slots of workers that were up."""
    slots = count_slots(scenario)
    moments = record.moments
    busy = sum(a.running * (b.at - a.at) for a, b in pairwise(moments))
    there = sum(slots * a.num_ready * (b.at - a.at) for a, b in pairwise(moments))
    return busy / there if there else 0.0


def count_slots(scenario: Scenario) -> int:
    """Requests that one worker could work at, if its cache had room for all."""
    return min(scenario.worker.window, scenario.worker.engine.num_slots)
