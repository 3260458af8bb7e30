"""Who tries which suspects and when there is a verdict: the queue and the inquiry, with workers that die (`court`) or
without any."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from court import WINDOW, Court, Row
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import make_job_spec, make_shard, make_worker_info

from batchgen.errors import RunStopped
from batchgen.journal import JournalIndex
from batchgen.queue.events import EngineRestarted, WorkerLost
from batchgen.queue.inquiry import Inquiry
from batchgen.queue.suspects import CHANCE_MEMORY_S, Group, ShardRows, Suspects, accuse
from batchgen.queue.trial_queue import TrialQueue
from batchgen.queue.work_queue import QueuedShard
from batchgen.storage import Storage


def test_a_trial_ends_when_its_shards_turn_out_to_be_committed(tmp_path: Path) -> None:
    """By a worker that was taken for dead and lived. The trial's lease ends by the file that it finds, and its worker gets
    other work: it would wait apart for ever."""
    spec = make_job_spec(output={"path": str(tmp_path / "out")})
    shards = [QueuedShard(make_shard(number)) for number in range(3)]
    queue = TrialQueue(shards, epoch=1, retry=spec.retry, cluster=spec.cluster)
    inquiry = Inquiry(Storage(spec.output.path), spec, queue, JournalIndex(), print)
    suspected = [(0, ((0, 1),)), (1, ((0, 1),))]
    # One group for each half: the second one is tried when the first is done with.
    inquiry.state = accuse(inquiry.state, suspected, max_group=1, now=0.0)
    queue.hold(inquiry.state.shards)
    queue.add_worker(make_worker_info("w1"), 0.0)
    for number in (0, 1):
        (lease,) = inquiry.lend(0.0, num_starting=0)
        assert (lease.shard.number, lease.only) == (number, ((0, 1),))
        assert queue.lease_next(0.0) is None, "nothing beside suspects"
        assert queue.complete("w1", lease.batch_id, number)
        inquiry.note_committed(number)
        inquiry.note_returned("w1", lease.batch_id)
        assert not inquiry.is_trying("w1")
    assert inquiry.state.groups == ()
    last = queue.lease_next(0.0)
    assert last is not None
    assert (last.shard.number, last.worker_id) == (2, "w1")


def test_of_a_trial_over_two_shards_the_other_goes_on(tmp_path: Path) -> None:
    spec = make_job_spec(output={"path": str(tmp_path / "out")})
    shards = [QueuedShard(make_shard(number)) for number in range(4)]
    queue = TrialQueue(shards, epoch=1, retry=spec.retry, cluster=spec.cluster)
    inquiry = Inquiry(Storage(spec.output.path), spec, queue, JournalIndex(), print)
    inquiry.state = accuse(inquiry.state, [(number, ((0, 1),)) for number in range(4)], max_group=8, now=0.0)
    queue.hold(inquiry.state.shards)
    queue.add_worker(make_worker_info("w1"), 0.0)
    first, second = inquiry.lend(0.0, num_starting=0)
    queue.complete("w1", first.batch_id, first.shard.number)
    inquiry.note_committed(first.shard.number)
    inquiry.note_returned("w1", first.batch_id)
    assert inquiry.is_trying("w1")
    assert inquiry.lend(0.0, num_starting=0) == []
    queue.give_back("w1", second.batch_id, 0.0, "its rows are journaled")
    inquiry.note_returned("w1", second.batch_id)
    assert [lease.shard.number for lease in inquiry.lend(0.0, num_starting=0)] == [2, 3]


# ---- the verdict -----------------------------------------------------------------------------------------------------

CULPRIT: tuple[ShardRows, ...] = ((0, ((3, 4),)),)
OTHER: tuple[ShardRows, ...] = ((1, ((13, 14),)),)


def make_inquiry(tmp_path: Path, state: Suspects, num_workers: int = 2) -> tuple[Inquiry, TrialQueue, list[float]]:
    """Two shards of ten rows; `now` is the only item of the list."""
    spec, now = make_job_spec(output={"path": str(tmp_path / "out")}), [0.0]
    shards = [QueuedShard(make_shard(number, 10 * number, 10 * number + 10)) for number in range(2)]
    queue = TrialQueue(shards, epoch=1, retry=spec.retry, cluster=spec.cluster)
    inquiry = Inquiry(Storage(spec.output.path), spec, queue, JournalIndex(), print, lambda: now[0])
    inquiry.state = state
    queue.hold(state.shards)
    for number in range(num_workers):
        queue.add_worker(make_worker_info(f"w{number + 1}"), 0.0)
    return inquiry, queue, now


def make_state(*alone: tuple[tuple[ShardRows, ...], int], deaths: tuple[tuple[int, float], ...] = ()) -> Suspects:
    """Rows alone in a group each, with so many deaths."""
    groups = [Group(number, rows, num_alone) for number, (rows, num_alone) in enumerate(alone, 100)]
    return Suspects(groups=tuple(groups), deaths=deaths, next_number=200)


def test_a_row_that_is_being_tried_is_not_judged(tmp_path: Path) -> None:
    """It was lent because another death was by chance; that one is an hour old while the trial goes on, and now the two
    deaths that it has would be enough. The trial ends well: it is cleared."""
    inquiry, queue, now = make_inquiry(tmp_path, make_state((CULPRIT, 2), deaths=((1, 0.0),)))
    now[0] = CHANCE_MEMORY_S - 1
    (lease,) = inquiry.lend(now[0], num_starting=0)
    now[0] = CHANCE_MEMORY_S + 1
    assert inquiry.lend(now[0], num_starting=0) == []
    assert inquiry.state.num_quarantined == 0
    queue.give_back(lease.worker_id, lease.batch_id, now[0], "its rows are journaled")
    inquiry.note_returned(lease.worker_id, lease.batch_id)
    inquiry.lend(now[0], num_starting=0)
    assert (inquiry.state.groups, inquiry.state.num_quarantined) == ((), 0)


def test_a_row_that_is_not_being_tried_is_judged_when_chance_is_forgotten(tmp_path: Path) -> None:
    inquiry, _, now = make_inquiry(tmp_path, make_state((CULPRIT, 2), deaths=((1, 0.0),)), num_workers=0)
    now[0] = CHANCE_MEMORY_S + 1
    assert inquiry.lend(now[0], num_starting=0) == []
    assert inquiry.state.quarantined == CULPRIT


def test_while_another_is_tried_nobody_is_judged(tmp_path: Path) -> None:
    """Row 3 is convicted, row 13 would be at its next death: until that trial has ended the answer is open."""
    inquiry, _, _ = make_inquiry(tmp_path, make_state((CULPRIT, 2), (OTHER, 1)))
    (lease,) = inquiry.lend(0.0, num_starting=0)
    assert (lease.shard.number, lease.only) == OTHER[0]
    assert inquiry.lend(1.0, num_starting=0) == [], "who is convicted is tried no more"
    assert inquiry.state.num_quarantined == 0
    inquiry.note_restart(EngineRestarted(lease.worker_id, "died", OTHER, (lease.batch_id,)), WINDOW)
    assert inquiry.state.quarantined == (*CULPRIT, *OTHER)


@pytest.mark.parametrize("is_known", [True, False])
def test_rows_of_a_shard_that_was_committed_meanwhile_are_no_suspects(tmp_path: Path, is_known: bool) -> None:
    """By a worker that was taken for dead, during their trial; then the engine dies with them in flight. Nobody could try
    them any more, and the verdict over the other would wait for ever (seed 152622)."""
    inquiry, queue, _ = make_inquiry(tmp_path, make_state((OTHER, 0), (CULPRIT, 2)))
    (lease,) = inquiry.lend(0.0, num_starting=0)
    assert (lease.shard.number, lease.only) == OTHER[0]
    assert queue.complete("zombie", "shard-000000001-e1-a1", 1)
    inquiry.note_committed(1)
    inquiry.note_loss(WorkerLost(lease.worker_id, "died", OTHER if is_known else None), WINDOW)
    queue.lose(lease.worker_id, 0.0, "died")
    assert [group.rows for group in inquiry.state.groups] == [CULPRIT], "one more death, by chance: it is tried again"
    (again,) = inquiry.lend(1.0, num_starting=0)
    assert (again.shard.number, again.only) == CULPRIT[0]


def test_what_a_driver_knew_is_tried_by_the_next(tmp_path: Path) -> None:
    """Written down at each change, before anything is lent on its account."""
    inquiry, queue, _ = make_inquiry(tmp_path, Suspects())
    lease = queue.lease_next(0.0)
    assert lease is not None
    inquiry.note_restart(EngineRestarted(lease.worker_id, "died", ((0, ((0, 4),)),), (lease.batch_id,)), WINDOW)
    again, _, _ = make_inquiry(tmp_path, Suspects())
    again.load([0, 1])
    assert again.state == inquiry.state
    assert [lease.only for lease in again.lend(1.0, num_starting=0)] == [((0, 2),)]
    quarantined = replace(inquiry.state, quarantined=OTHER)
    inquiry._change(quarantined)
    again.spec = make_job_spec(retry={"errors": "all"})
    again.load([0, 1])
    assert again.state == replace(quarantined, quarantined=())


def test_lost_machines_and_stores_that_fail_blame_nobody(tmp_path: Path) -> None:
    state = make_state((CULPRIT, 1))
    inquiry, queue, _ = make_inquiry(tmp_path, state)
    (lease,) = inquiry.lend(0.0, num_starting=0)
    queue.fail(lease.worker_id, lease.batch_id, 0.0, "the store is away")
    inquiry.note_failed(lease.worker_id, lease.batch_id)
    assert not inquiry.is_trying(lease.worker_id)
    queue.lease_next(100.0)  # the pause after the failure is over
    (lease,) = inquiry.lend(100.0, num_starting=0)
    gone = WorkerLost(lease.worker_id, "its node is gone", CULPRIT, has_rows_to_blame=False)
    assert not inquiry.note_loss(gone, WINDOW)
    assert inquiry.state == state


def test_more_convicts_than_allowed_stop_the_run(tmp_path: Path) -> None:
    inquiry, _, _ = make_inquiry(tmp_path, make_state((CULPRIT, 1)))
    inquiry.spec = make_job_spec(retry={"max_quarantined": 0})
    (lease,) = inquiry.lend(0.0, num_starting=0)
    with pytest.raises(RunStopped, match=r"retry\.max_quarantined is 0.*the GPU fell off the bus"):
        inquiry.note_restart(
            EngineRestarted(lease.worker_id, "the GPU fell off the bus", CULPRIT, (lease.batch_id,)), WINDOW
        )


# ---- whole runs ------------------------------------------------------------------------------------------------------


def find_bound(num_suspects: int) -> int:
    return math.ceil(math.log2(num_suspects)) + 1


def choose_rows(seed: int, num_rows: int, num_shards: int, shard_rows: int) -> frozenset[Row]:
    rows = random.Random(seed).sample(range(num_shards * shard_rows), num_rows)
    return frozenset((row // shard_rows, row) for row in rows)


@pytest.mark.parametrize("death", ["restart", "lost", "vanished"])
@given(st.integers(0, 10**9), st.integers(1, 5), st.integers(1, 20), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_one_culprit_costs_no_more_deaths_than_it_must(
    death: str, seed: int, num_shards: int, shard_rows: int, num_workers: int
) -> None:
    culprits = choose_rows(seed, 1, num_shards, shard_rows)
    court = Court(seed, num_shards, shard_rows, num_workers, culprits, death).run()
    assert court.quarantined == culprits
    assert court.done == court.rows - culprits
    least = 2 if death == "vanished" else 0  # one row that may not have been in flight must die alone twice
    assert court.num_deaths - 1 <= max(least, find_bound(court.num_first_suspects))


@given(st.integers(0, 10**9), st.integers(1, 5), st.integers(2, 20), st.integers(1, 4), st.integers(2, 4))
@settings(max_examples=60, deadline=None)
def test_without_kills_the_culprits_are_judged_and_nobody_else(
    seed: int, num_shards: int, shard_rows: int, num_workers: int, num_culprits: int
) -> None:
    """However the engines die. That no verdict comes before all suspects were tried is asserted at each turn."""
    culprits = choose_rows(seed, min(num_culprits, num_shards * shard_rows), num_shards, shard_rows)
    court = Court(seed, num_shards, shard_rows, num_workers, culprits).run()
    assert court.quarantined == culprits
    assert court.done == court.rows - culprits


@given(
    st.integers(0, 10**9),
    st.integers(1, 4),
    st.sampled_from([0.0, 1500.0]),
    st.integers(0, 2),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=100, deadline=None)
def test_in_a_storm_of_kills_nobody_is_judged_before_all_were_tried(
    seed: int, num_workers: int, turn_s: float, num_culprits: int, zombies: float, restarts: float
) -> None:
    """Minutes or nothing between two turns: chance deaths are forgotten in the middle of it. All rows end, one way or the
    other, also where others commit what is being tried or the driver dies, and a culprit never ends well."""
    culprits = choose_rows(seed, num_culprits, 6, 10)
    befalls = {"num_kills": 15, "chance": 0.5, "turn_s": turn_s, "zombies": zombies, "restarts": restarts}
    court = Court(seed, 6, 10, num_workers, culprits, **befalls).run()
    assert culprits <= court.quarantined
    assert court.done | court.quarantined | court.elsewhere == court.rows
