"""Virtual runs: every row once whatever is lost, the same by seed, and laws that any honest model keeps."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from batchgen.queue.tail import TailPolicy
from batchgen.simulate.engine import EngineModel
from batchgen.simulate.oracle import run_oracle
from batchgen.simulate.policies import Policies, WorkerModel
from batchgen.simulate.record import ClusterModel, Surroundings
from batchgen.simulate.scenario import Scenario, draw_rows, run_exactly
from batchgen.simulate.step_cost import StepCost
from batchgen.simulate.workload import Workload, make_lengths, make_lognormal
from batchgen.spec import ClusterSpec
from batchgen.worker.budget import Ladder

SLOTS = 16
STEP = StepCost(0.02, 1e-4, 1e-8, 1e-8)


def make_scenario(num_workers: int = 4, **changes: Any) -> Scenario:
    """600 rows on small engines, 40 rows a shard, four workers, no start-up time."""
    engine = EngineModel(STEP, num_ranks=2, max_batch_size=SLOTS // 2, kv_tokens=changes.pop("kv_tokens", 1 << 30))
    cluster = ClusterSpec.model_validate(
        {"workers": {"min": changes.pop("min_workers", num_workers), "max": num_workers}, "max_starting": num_workers}
    )
    surroundings = Surroundings(
        changes.pop("startup_s", 0.001), changes.pop("startup_spread", 0.0), changes.pop("losses_per_hour", 0.0)
    )
    workload = Workload(
        make_lognormal(200, 1.0, 100),
        max_tokens=2000,
        hint_sigma=changes.pop("hint_sigma", None),
        lognormal=(200, 1.0),
        num_prefixes=changes.pop("num_prefixes", 0),
        prefix_tokens=64,
    )
    worker = WorkerModel(
        engine,
        Policies(
            is_ordered=changes.pop("is_ordered", True),
            has_placement=changes.pop("has_placement", False),
            ladder=Ladder(changes.pop("rungs", ())),
        ),
        window=SLOTS,
        n=changes.pop("n", 1),
    )
    tail = TailPolicy() if changes.pop("has_split", True) else None
    scenario = Scenario(600, 40, worker, ClusterModel(cluster, surroundings, tail=tail, n=worker.n), workload)
    return replace(scenario, **changes)


def count_output(scenario: Scenario) -> int:
    return scenario.worker.n * sum(row.output_tokens for _, rows in draw_rows(scenario) for row in rows)


@pytest.mark.parametrize("hint_sigma", [None, 0.0, 1.0])
@pytest.mark.parametrize("has_split", [True, False])
@pytest.mark.parametrize("options", [{}, {"rungs": (128, 512)}, {"has_placement": True, "num_prefixes": 5}, {"n": 3}])
def test_every_row_comes_out_once_with_all_its_tokens(
    hint_sigma: float | None, has_split: bool, options: dict[str, Any]
) -> None:
    scenario = make_scenario(hint_sigma=hint_sigma, has_split=has_split, **options)
    record = run_exactly(scenario)
    assert record.num_rows == 600
    assert record.num_shards == 15
    assert record.tokens == count_output(scenario)
    assert record.lost_tokens == 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("has_split", [True, False])
def test_every_row_comes_out_once_though_workers_are_lost(seed: int, has_split: bool) -> None:
    scenario = make_scenario(losses_per_hour=60.0, has_split=has_split, startup_s=20.0).with_seed(seed)
    record = run_exactly(scenario)
    assert record.num_rows == 600
    assert record.tokens >= count_output(scenario)
    # What is generated again is what was in flight and what the journal did not have yet.
    if not record.num_losses:
        assert record.tokens == count_output(scenario)


def test_some_of_the_lossy_runs_lose_workers_and_some_split_shards() -> None:
    """Else the tests above would show nothing."""
    records = [run_exactly(make_scenario(losses_per_hour=60.0, startup_s=20.0).with_seed(seed)) for seed in range(6)]
    assert sum(record.num_losses for record in records) > 5
    assert sum(record.lost_tokens for record in records) > 0
    assert sum(record.num_shares for record in records) > 0


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    first, second = (run_exactly(make_scenario(losses_per_hour=30.0).with_seed(7)) for _ in range(2))
    assert first == second
    assert run_exactly(make_scenario(losses_per_hour=30.0).with_seed(8)).makespan_s != first.makespan_s


def mean_makespan(**options: Any) -> float:
    return sum(run_exactly(make_scenario(**options).with_seed(seed)).makespan_s for seed in range(4)) / 4


def test_more_workers_are_never_slower_beyond_noise() -> None:
    times = [mean_makespan(num_workers=count) for count in (1, 2, 4, 8)]
    assert all(more <= 1.05 * fewer for fewer, more in pairwise(times))
    assert times[2] < 0.5 * times[0]  # its longest row alone takes a quarter


def test_hints_shorten_the_tail_and_useless_ones_cost_nothing() -> None:
    fifo = mean_makespan(is_ordered=False)
    assert mean_makespan(hint_sigma=0.0) < fifo
    assert mean_makespan(hint_sigma=10.0) < 1.1 * fifo  # another order, as good as any: noise of four runs


def make_long_tailed(
    num_workers: int, rows_per_slot: int, sigma: float, hint_sigma: float | None, seed: int
) -> Scenario:
    """64 slots a worker, and four or five shards each; the longest row may take as long as all others together."""
    workload = Workload(make_lognormal(500, sigma, 100), 64_000, hint_sigma, lognormal=(500, sigma), seed=str(seed))
    engine = EngineModel(StepCost(0.02), num_ranks=1, max_batch_size=64, balance_steps=0)
    worker = WorkerModel(engine, Policies(), 64, commit_s=0.0)
    cluster = replace(make_scenario(num_workers).cluster, beat_s=0.5)
    return Scenario(64 * num_workers * rows_per_slot, 64 * 12, worker, cluster, workload)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_useless_hints_never_cost_a_hundredth(num_workers: int) -> None:
    """With rows enough for hints to prove themselves. Which rows end a run is luck, so any other order would show: two
    workers took 1.18 and 1.13 times as long with these seeds, while shards were lent by the hints."""
    for seed in (4, 8):
        none, useless, exact = (
            run_exactly(make_long_tailed(num_workers, 36, 0.8, sigma, seed)).makespan_s for sigma in (None, 10.0, 0.0)
        )
        assert useless <= 1.01 * none
        assert exact < none


@pytest.mark.parametrize("seed", [1, 13])
def test_the_longest_row_begins_soon_once_hints_are_borne_out(seed: int) -> None:
    """In whichever of a lone worker's four shards it is."""
    scenario = make_long_tailed(1, 40, 1.2, 0.0, seed)
    rows = [row for _, some in draw_rows(scenario) for row in some]
    engine = scenario.worker.engine
    best_s = run_oracle(rows, engine, num_engines=1, window=64, max_tokens=64_000, is_longest_first=True)
    assert run_exactly(scenario).makespan_s <= 1.03 * best_s


def test_splitting_shortens_the_tail_of_unequal_shards() -> None:
    # Few large shards: one worker has two, the others one.
    options: dict[str, Any] = {"num_workers": 4, "rows_per_shard": 120}
    assert mean_makespan(has_split=True, **options) < 0.95 * mean_makespan(has_split=False, **options)


def test_losses_cost_time_and_gpus() -> None:
    assert mean_makespan(losses_per_hour=60.0, startup_s=20.0) > mean_makespan(startup_s=20.0)


def test_budgets_help_an_engine_whose_cache_is_reserved_for_long_answers() -> None:
    flat, parts = (mean_makespan(kv_tokens=5000, rungs=rungs) for rungs in ((), (256, 1024)))
    assert parts < 0.7 * flat
    # ... and cost a little where the cache is no limit.
    assert mean_makespan(rungs=(256, 1024)) < 1.1 * mean_makespan()


def test_a_run_that_hardly_needs_a_second_worker_starts_none() -> None:
    short = run_exactly(make_scenario(min_workers=1, startup_s=5000.0))
    assert short.num_workers == 1
    assert run_exactly(make_scenario(min_workers=1, startup_s=5.0)).num_workers > 1


def test_gpu_seconds_count_start_up_and_end_with_the_run() -> None:
    record = run_exactly(make_scenario(num_workers=2, startup_s=100.0))
    assert record.gpu_s == pytest.approx(8 * 2 * record.makespan_s, rel=0.05)
    assert record.moments[0].num_starting == 2
    assert record.moments[-1].tokens == record.tokens


def test_the_longest_first_oracle_is_near_the_bound_and_first_come_first_served_is_not() -> None:
    scenario = make_scenario(hint_sigma=0.0)
    rows = [row for _, rows in draw_rows(scenario) for row in rows]
    engine = EngineModel(StepCost(0.02), num_ranks=1, max_batch_size=SLOTS, balance_steps=0)
    oracle = {
        first: run_oracle(rows, engine, num_engines=4, window=SLOTS, max_tokens=2000, is_longest_first=first)
        for first in (True, False)
    }
    bound = max(0.02 * sum(row.output_tokens for row in rows) / (4 * SLOTS), 0.02 * max(r.output_tokens for r in rows))
    assert bound <= oracle[True] < 1.02 * bound
    assert oracle[False] > 1.1 * oracle[True]


# ---- lengths


def test_a_resampled_sample_has_as_many_rows_and_another_mean() -> None:
    lengths = make_lengths({(10, 5): 40, (20, 50): 40, (30, 500): 20})
    again = lengths.resample("1")
    assert again.num_rows == lengths.num_rows == 100
    assert again != lengths
    assert again == lengths.resample("1")
    assert again.mean() == pytest.approx(lengths.mean(), rel=0.5)


def test_a_resampled_sample_has_longer_rows_than_its_longest_and_none_beyond_the_cut() -> None:
    lengths = make_lengths({(10, tokens): 1 for tokens in range(10, 1000, 10)} | {(10, 2000): 50})
    means, longest = [], []
    for seed in range(200):
        again = lengths.resample(str(seed), 2000)
        means.append(again.mean())
        longest.append(max(output for _, output in again.pairs if output != 2000))
        assert (
            0.2
            < sum(count for pair, count in zip(again.pairs, again.counts, strict=True) if pair[1] == 2000) / 149
            < 0.5
        )
    assert sum(means) / 200 == pytest.approx(lengths.mean(), rel=0.02)
    assert max(longest) > 1000
    assert make_lengths({(1, 7): 9}).resample("1") == make_lengths({(1, 7): 9})


def test_a_lognormal_has_the_mean_that_was_asked_for() -> None:
    assert make_lognormal(4000, 1.0, 100).mean() == pytest.approx(4000, rel=0.01)
    assert make_lognormal(4000, 1.0, 100).mean(8000) < 3500


def test_a_shards_rows_are_the_same_whenever_they_are_drawn() -> None:
    workload = Workload(make_lognormal(100, 1.0, 10), 1000, hint_sigma=0.5, num_prefixes=3, prefix_tokens=5)
    assert workload.draw(3, 300, 50) == workload.draw(3, 300, 50) != workload.draw(4, 300, 50)
