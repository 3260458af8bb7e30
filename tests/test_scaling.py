"""How many workers to start: enough, never too many, none that would come too late."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.queue.scaling import Facts, choose_num_to_start, choose_to_release
from batchgen.spec import ClusterSpec, WorkersSpec


def make_cluster(least: int = 1, most: int = 10, max_starting: int = 4) -> ClusterSpec:
    return ClusterSpec(workers=WorkersSpec(min=least, max=most), max_starting=max_starting)


def choose(least: int = 1, most: int = 10, max_starting: int = 4, **facts: Any) -> int:
    plain = {"num_ready": 0, "num_starting": 0, "num_shards_waiting": 100, "num_rows_left": 1000}
    return choose_num_to_start(Facts(**{**plain, **facts}), make_cluster(least, most, max_starting))


KNOWN = {"rows_per_s": 1.0, "startup_s": 60.0}


@pytest.mark.parametrize(
    ("facts", "number"),
    [
        ({}, 1),
        ({"least": 3}, 3),
        ({"least": 8}, 4),  # a few at a time
        ({"least": 8, "num_starting": 3}, 1),
        ({"least": 8, "num_starting": 4}, 0),
        ({"least": 3, "num_ready": 2}, 1),
        ({"least": 3, "num_ready": 1, "num_starting": 1}, 1),
        ({"least": 3, "num_rows_left": 0}, 0),
        ({"least": 3, "num_shards_waiting": 0}, 3),  # what was lost may come back to be done
    ],
)
def test_the_least_are_started_whatever_is_known(facts: dict[str, Any], number: int) -> None:
    assert choose(**facts) == number


@pytest.mark.parametrize(
    ("facts", "number"),
    [
        ({"num_ready": 1}, 0),  # nothing measured yet
        ({"num_ready": 1, "rows_per_s": 1.0}, 0),
        ({"num_ready": 1, "startup_s": 60.0}, 0),
        ({"num_ready": 1, **KNOWN}, 4),
        ({"num_ready": 1, "num_starting": 3, **KNOWN}, 1),
        ({"num_ready": 9, **KNOWN}, 1),
        ({"num_ready": 10, **KNOWN}, 0),
        ({"num_ready": 12, **KNOWN}, 0),
        ({"num_ready": 1, "num_shards_waiting": 2, **KNOWN}, 2),
        ({"num_ready": 1, "num_starting": 1, "num_shards_waiting": 2, **KNOWN}, 1),
        ({"num_ready": 1, "num_shards_waiting": 0, **KNOWN}, 0),
        ({"num_ready": 1, "num_rows_left": 120, **KNOWN}, 0),  # two workers would be busy for 60 s: no gain
        ({"num_ready": 1, "num_rows_left": 121, **KNOWN}, 1),
        ({"num_ready": 1, "num_rows_left": 181, **KNOWN}, 2),
        ({"num_ready": 1, "num_rows_left": 121, "rows_per_s": 1.0, "startup_s": 0.0}, 4),
        ({"num_ready": 1, "num_rows_left": 0, **KNOWN}, 0),
        ({"num_ready": 1, "num_rows_left": -5, **KNOWN}, 0),
    ],
)
def test_more_are_started_only_where_they_are_worth_their_start(facts: dict[str, Any], number: int) -> None:
    assert choose(**facts) == number


many = st.integers(0, 20)
facts = st.builds(
    Facts, many, many, many, st.integers(0, 10_000), st.none() | st.floats(0.01, 100), st.none() | st.floats(0, 1000)
)
clusters = st.builds(
    lambda least, more, starting: make_cluster(least, least + more, starting),
    st.integers(1, 10), many, st.integers(1, 8),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(facts, clusters)
def test_limits_hold_and_asking_again_at_once_starts_no_more(known: Facts, cluster: ClusterSpec) -> None:
    number = choose_num_to_start(known, cluster)
    assert number >= 0
    if number:
        assert known.num_ready + known.num_starting + number <= cluster.workers.max
        assert known.num_starting + number <= cluster.max_starting
        assert known.num_rows_left > 0
    then = dataclasses.replace(known, num_starting=known.num_starting + number)
    if then.num_ready + then.num_starting >= cluster.workers.min:
        is_at_least = known.num_ready + known.num_starting < cluster.workers.min
        assert choose_num_to_start(then, cluster) == 0 or is_at_least


@settings(max_examples=50, deadline=None)
@given(facts, clusters, st.integers(1, 1000))
def test_more_rows_left_never_start_fewer(known: Facts, cluster: ClusterSpec, more: int) -> None:
    larger = dataclasses.replace(known, num_rows_left=known.num_rows_left + more)
    assert choose_num_to_start(larger, cluster) >= choose_num_to_start(known, cluster)


def test_limits_of_the_run_ask_for_more_or_fewer() -> None:
    cluster = make_cluster(1, 10, 8)
    known = Facts(num_ready=1, num_starting=0, num_shards_waiting=100, num_rows_left=1000)
    assert choose_num_to_start(known, cluster, least=4) == 3
    assert choose_num_to_start(known, cluster, least=40) == 8
    assert choose_num_to_start(dataclasses.replace(known, num_shards_waiting=0), cluster, least=4) == 0
    busy = dataclasses.replace(known, rows_per_s=0.1, startup_s=10.0)
    assert choose_num_to_start(busy, cluster) == 8
    assert choose_num_to_start(busy, cluster, most=3) == 2
    assert choose_num_to_start(dataclasses.replace(busy, num_ready=0), make_cluster(5, 10, 8), most=2) == 2


def test_idle_workers_are_let_go_down_to_the_least_number_longest_idle_first() -> None:
    cluster, idle = make_cluster(2, 10, 4), {"a": 50.0, "b": 10.0, "c": 95.0, "d": 20.0}
    assert choose_to_release(idle, 100.0, 6, cluster, after_s=30.0) == ["b", "d", "a"]
    assert choose_to_release(idle, 100.0, 4, cluster, after_s=30.0) == ["b", "d"]
    assert choose_to_release(idle, 100.0, 2, cluster, after_s=30.0) == []
    assert choose_to_release({}, 100.0, 9, cluster, after_s=30.0) == []
