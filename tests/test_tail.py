"""Who gives rows to whom at the end of a run: enough to end together, never what would be gone by then."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.queue.tail import TailPolicy, WorkerLoad, choose_splits

POLICY = TailPolicy(min_gain_s=2.0, full_share=0.8, ahead_share=0.25)


def load(
    worker_id: str, unsent: int, *, inflight: int | None = None, window: int = 10, rate: float | None = 1.0
) -> WorkerLoad:
    """`inflight`: a full window where it has more to send."""
    sent = (window if unsent else 0) if inflight is None else inflight
    return WorkerLoad(worker_id, window, sent, unsent, ((f"{worker_id}-batch", unsent),), rate)


def split(*workers: WorkerLoad) -> list[tuple[str, str, int]]:
    return [(one.owner_id, one.helper_id, one.num_requests) for one in choose_splits(workers, POLICY)]


def test_an_idle_worker_gets_half_of_what_would_make_both_equal() -> None:
    assert split(load("a", 990), load("b", 0)) == [("a", "b", 250)]


def test_a_share_is_a_window_at_least_where_there_is_that_much() -> None:
    assert split(load("a", 30), load("b", 0)) == [("a", "b", 10)]
    assert split(load("a", 4), load("b", 0, inflight=6)) == [("a", "b", 4)]


def test_many_helpers_share_with_many_owners() -> None:
    found = split(load("a", 600), load("b", 400), load("c", 0), load("d", 0), load("e", 0, inflight=10))
    assert [helper for _, helper, _ in found] == ["c", "d", "e"]
    assert {owner for owner, _, _ in found} == {"a", "b"}


@pytest.mark.parametrize(
    "workers",
    [
        (load("a", 100), load("b", 90)),  # nobody runs dry
        (load("a", 0, inflight=10), load("b", 0)),  # what an engine has begun stays with it
        (load("a", 2), load("b", 0)),  # sent within two seconds anyway
        (load("a", 100, inflight=3), load("b", 0)),  # its window is not full: it sends as fast as it reads
        (load("a", 100),),
        (),
    ],
)
def test_nothing_is_moved_where_that_gains_nothing(workers: tuple[WorkerLoad, ...]) -> None:
    assert split(*workers) == []


def test_an_owner_that_never_finished_anything_is_taken_for_slow() -> None:
    assert split(load("a", 2, rate=None), load("b", 0)) == [("a", "b", 2)]


def test_the_slowest_gives_first() -> None:
    assert split(load("fast", 500, rate=100.0), load("slow", 400, rate=1.0), load("c", 0))[0][0] == "slow"


def test_the_largest_of_its_shards_is_split() -> None:
    owner = dataclasses.replace(load("a", 100), leases=(("small", 20), ("large", 80)))
    assert choose_splits([owner, load("b", 0)], POLICY)[0].batch_id == "large"


loads = st.builds(
    lambda number, unsent, share, window, rate: dataclasses.replace(
        load(f"w{number}", sum(unsent), inflight=round(share * window), window=window, rate=rate),
        leases=tuple((f"w{number}-{place}", num) for place, num in enumerate(unsent)),
    ),
    st.integers(0, 10**6),
    st.lists(st.integers(0, 500), max_size=4),
    st.floats(0, 1),
    st.integers(1, 100),
    st.none() | st.floats(0.01, 100),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(loads, max_size=8, unique_by=lambda w: w.worker_id))
def test_no_request_is_given_twice_and_no_helper_ends_above_its_owner(workers: list[WorkerLoad]) -> None:
    known = {w.worker_id: w for w in workers}
    left = {batch_id: num for w in workers for batch_id, num in w.leases}
    after = {w.worker_id: w.load for w in workers}
    level = sum(after.values()) / max(1, len(after))
    splits = choose_splits(workers, POLICY)
    assert len({one.helper_id for one in splits}) == len(splits)
    for one in splits:
        assert one.owner_id != one.helper_id
        assert one.batch_id in dict(known[one.owner_id].leases)
        assert one.num_requests > 0
        left[one.batch_id] -= one.num_requests
        after[one.owner_id] -= one.num_requests
        after[one.helper_id] += one.num_requests
    assert min(left.values(), default=0) >= 0
    assert all(after[one.helper_id] <= level + 1 for one in splits)
    assert all(after[one.owner_id] >= level - 1 for one in splits)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2000), min_size=2, max_size=20))
def test_repeated_it_ends_with_equal_loads(unsent: list[int]) -> None:
    """Each split carried out at once: within a few rounds nobody waits who could be helped."""
    window = 10
    loads = {f"w{n:02}": num for n, num in enumerate(unsent)}
    for _ in range(40):
        found = choose_splits([load(name, num, inflight=window, window=window) for name, num in loads.items()], POLICY)
        for one in found:
            loads[one.owner_id] -= one.num_requests
            loads[one.helper_id] += one.num_requests
        if not found:
            break
    assert sum(loads.values()) == sum(unsent)
    mean = sum(unsent) / len(unsent)
    dry = [num for num in loads.values() if num <= POLICY.ahead_share * window]
    assert not dry or max(loads.values()) <= mean + 1 or max(loads.values()) <= POLICY.min_gain_s
