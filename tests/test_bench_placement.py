"""The placement's figures over small workloads; the full ones are `jobs/bench_placement.py`'s."""

import pytest

from batchgen.bench.placement import POLICIES, Cache, Replay, Workload, make_row, measure_ideal

# 48 prompts a prefix, as 200,000 over 4,096 prefixes have.
SMALL = Workload(
    num_rows=4000, num_prefixes=80, prefix_tokens=64, suffix_tokens=32, mean_tokens=40, slots=16, inflight=160
)


def test_prefixes_are_served_nearly_as_by_one_cache_and_the_ranks_are_even() -> None:
    placed, other = make_row(SMALL, "placed"), make_row(SMALL, "random")
    assert placed["served"] >= 0.95
    assert placed["imbalance"] <= 1.05
    assert placed["idle"] == 0
    assert other["served"] < 0.9
    assert other["imbalance"] > 1.05


@pytest.mark.parametrize("policy", POLICIES)
def test_every_row_is_replayed_and_nothing_is_left_over(policy: str) -> None:
    replay = Replay(SMALL, policy)
    outcome = replay.run()
    assert 0 < outcome.hit_rate <= outcome.ideal_rate < 1
    while replay._ending:
        replay._end_one(is_measured=False)
    assert replay.total_tokens == 40 * SMALL.num_rows
    assert [(rank.num_active, round(rank.load, 6), len(rank.waiting)) for rank in replay._ranks] == [(0, 0.0, 0)] * 8


def test_the_ideal_misses_each_prefix_once_where_the_cache_is_large() -> None:
    assert measure_ideal(SMALL) == 1 - SMALL.num_prefixes / SMALL.num_rows


def test_what_was_used_least_recently_goes_first() -> None:
    cache = Cache(10)
    assert [cache.touch(key, 4) for key in "abacb"] == [False, False, True, False, False]
