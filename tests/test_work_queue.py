"""The queue against a model of it, under workers that join, die, fail, fall silent and answer too late."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from makers import make_shard, make_worker_info

from batchgen.queue.events import Heartbeat
from batchgen.queue.hint_votes import HintVotes
from batchgen.queue.work_queue import (
    BACKOFF_S,
    MAX_BACKOFF_S,
    MAX_OPEN_SHARDS,
    MIN_OPEN_SHARDS,
    NEIGHBOUR_SHARE,
    QueuedShard,
    WorkQueue,
)
from batchgen.records import Lease, ShardProgress, Share
from batchgen.spec import ClusterSpec, RetrySpec

ROWS = 10
EPOCH = 7
CLUSTER = ClusterSpec(worker_timeout_s=100, stall_timeout_s=1000)


def make_queue(
    *costs: float, first_attempt: int = 1, max_shard_attempts: int = 3, follows_hints: bool = True
) -> WorkQueue:
    shards = [
        QueuedShard(make_shard(number, row_end=ROWS), first_attempt=first_attempt, cost=cost)
        for number, cost in enumerate(costs)
    ]
    retry = RetrySpec(max_shard_attempts=max_shard_attempts)
    return WorkQueue(shards, epoch=EPOCH, retry=retry, cluster=CLUSTER, follows_hints=follows_hints)


def beat(
    worker_id: str, *leases: Lease, tokens: int = 0, rows: int = 0, errors: int = 0, inflight: int = 1
) -> Heartbeat:
    shards = tuple(ShardProgress(lease.batch_id, rows, errors) for lease in leases)
    return Heartbeat(worker_id, tokens, inflight, 0.0, shards)


def lease_all(queue: WorkQueue, now: float = 0.0) -> list[Lease]:
    leases = []
    while (lease := queue.lease_next(now)) is not None:
        leases.append(lease)
    return leases


def must_lease(queue: WorkQueue, now: float = 0.0) -> Lease:
    lease = queue.lease_next(now)
    assert lease is not None
    return lease


# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass
class ModelWorker:
    heard_at: float
    leases: dict[str, Lease] = field(default_factory=dict)
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    tokens: int = 0
    shares: dict[str, Share] = field(default_factory=dict)


class QueueMachine(RuleBasedStateMachine):
    @initialize(
        costs=st.lists(st.integers(1, 5), min_size=1, max_size=7),
        first_attempt=st.integers(1, 3),
        max_shard_attempts=st.integers(1, 3),
        follows_hints=st.booleans(),
    )
    def start(self, costs: list[int], first_attempt: int, max_shard_attempts: int, follows_hints: bool) -> None:
        self.queue = make_queue(
            *costs, first_attempt=first_attempt, max_shard_attempts=max_shard_attempts, follows_hints=follows_hints
        )
        self.votes = HintVotes(is_followed=follows_hints)
        self.costs = dict(enumerate(costs))
        self.max_shard_attempts = max_shard_attempts
        self.now = 0.0
        self.num_made = 0
        self.last_number: dict[str, int] = {}
        self.workers: dict[str, ModelWorker] = {}
        self.old: list[Lease] = []
        self.done: set[int] = set()
        self.due: dict[int, float] = {}
        self.last_attempt = dict.fromkeys(self.costs, first_attempt - 1)
        self.num_lost: Counter[int] = Counter()
        self.most_done: Counter[int] = Counter()
        self.num_failed: Counter[int] = Counter()
        self.reasons: dict[int, str] = {}
        self.all_shares: list[Share] = []

    def pick_worker(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.workers)))

    def pick_lease(self, data: st.DataObject) -> Lease:
        held = [lease for worker in self.workers.values() for lease in worker.leases.values()]
        return data.draw(st.sampled_from(sorted(held, key=lambda lease: lease.batch_id)))

    def list_held(self) -> list[int]:
        return [lease.shard.number for worker in self.workers.values() for lease in worker.leases.values()]

    def list_free(self) -> set[int]:
        return self.costs.keys() - self.done - set(self.list_held())

    def drop(self, lease: Lease) -> None:
        worker = self.workers[lease.worker_id]
        del worker.leases[lease.batch_id]
        worker.rows.pop(lease.batch_id, None)
        self.old.append(lease)

    def has_workers(self) -> bool:
        return bool(self.workers)

    def has_leases(self) -> bool:
        return bool(self.list_held())

    # ---- what happens

    @rule(window=st.sampled_from([1, 16, 64]))
    def join(self, window: int) -> None:
        if len(self.workers) < 4:
            self.num_made += 1
            worker_id = f"w{self.num_made}"
            self.queue.add_worker(make_worker_info(worker_id, window), self.now)
            self.workers[worker_id] = ModelWorker(self.now)

    @rule()
    def lend(self) -> None:
        while (lease := self.queue.lease_next(self.now)) is not None:
            self.check_lease(lease)
            worker = self.workers[lease.worker_id]
            worker.leases[lease.batch_id] = lease
        if any(len(worker.leases) < MIN_OPEN_SHARDS for worker in self.workers.values()):
            assert all(self.due.get(number, 0) > self.now for number in self.list_free()), "a hungry worker got nothing"

    def check_lease(self, lease: Lease) -> None:
        number = lease.shard.number
        ready = {other for other in self.list_free() if self.due.get(other, 0) <= self.now}
        assert number in ready, "done, held by another, or still to be waited for"
        if self.votes.is_followed:
            assert self.costs[number] >= NEIGHBOUR_SHARE * max(self.costs[other] for other in ready)
        else:
            assert number in {min(ready), self.last_number.get(lease.worker_id, -2) + 1}
        self.last_number[lease.worker_id] = number
        assert lease.attempt == self.last_attempt[number] + 1
        self.last_attempt[number] = lease.attempt
        assert lease.epoch == EPOCH
        assert lease.is_last_resort == (self.num_lost[number] >= self.max_shard_attempts)
        assert lease.reason == self.reasons.get(number)
        assert lease.worker_id in self.workers

    @precondition(has_leases)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        lease = self.pick_lease(data)
        is_new = lease.shard.number not in self.done
        assert self.queue.complete(lease.worker_id, lease.batch_id, lease.shard.number) is is_new
        self.done.add(lease.shard.number)
        self.drop(lease)

    @precondition(has_leases)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        lease = self.pick_lease(data)
        number = lease.shard.number
        lost = self.queue.fail(lease.worker_id, lease.batch_id, self.now, "store")
        assert lost is not None
        assert (lost.lease, lost.reason, lost.ended_at) == (lease, "store", self.now)
        self.num_failed[number] += 1
        self.due[number] = self.now + min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (self.num_failed[number] - 1))
        self.reasons[number] = "store"
        self.drop(lease)

    def count_loss(self, number: int, rows_done: int) -> None:
        if rows_done > self.most_done[number]:
            self.most_done[number], self.num_lost[number] = rows_done, 0
        else:
            self.num_lost[number] += 1

    def lose(self, worker_id: str, reason: str) -> None:
        lost = self.queue.lose(worker_id, self.now, reason)
        self.votes.forget(worker_id)
        worker = self.workers[worker_id]
        assert {one.lease.batch_id for one in lost} == worker.leases.keys()
        for lease in list(worker.leases.values()):
            self.count_loss(lease.shard.number, worker.rows.get(lease.batch_id, (0, 0))[0])
            self.reasons[lease.shard.number] = reason
            self.due.pop(lease.shard.number, None)
            self.drop(lease)
        del self.workers[worker_id]

    @precondition(has_workers)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        self.lose(self.pick_worker(data), "killed")

    @precondition(has_workers)
    @rule(
        data=st.data(), rows=st.integers(0, ROWS), tokens=st.integers(0, 3), useful=st.sampled_from([None, True, False])
    )
    def hear(self, data: st.DataObject, rows: int, tokens: int, useful: bool | None) -> None:
        worker_id = self.pick_worker(data)
        self.votes.hear(worker_id, useful)
        worker = self.workers[worker_id]
        worker.heard_at = self.now
        worker.tokens += tokens
        worker.rows = dict.fromkeys(worker.leases, (rows, rows // 2))
        leases = worker.leases.values()
        heard = beat(worker_id, *leases, tokens=worker.tokens, rows=rows, errors=rows // 2)
        self.queue.renew(replace(heard, are_hints_useful=useful), self.now)

    @rule(seconds=st.sampled_from([0.5, 1.0, 30.0, 101.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        silent = {worker_id for worker_id, _ in self.queue.list_silent(self.now)}
        limit = CLUSTER.worker_timeout_s
        quiet = {name for name, worker in self.workers.items() if self.now - worker.heard_at > limit}
        assert quiet <= silent <= self.workers.keys()
        for worker_id in sorted(silent):
            self.lose(worker_id, "silent")

    # ---- parts of lent shards

    @precondition(lambda self: self.list_held() and len(self.workers) > 1)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        lease = self.pick_lease(data)
        helper = data.draw(st.sampled_from(sorted(self.workers.keys() - {lease.worker_id})))
        share = self.queue.lend_share(lease.worker_id, lease.batch_id, helper, 3, self.now)
        number = lease.shard.number
        assert share.lease.attempt == self.last_attempt[number] + 1, "an attempt of its own"
        self.last_attempt[number] += 1
        assert (share.lease.worker_id, share.owner_id, share.owner_batch_id) == (
            helper,
            lease.worker_id,
            lease.batch_id,
        )
        self.workers[helper].shares[share.lease.batch_id] = share
        self.all_shares.append(share)

    @precondition(lambda self: self.all_shares)
    @rule(data=st.data())
    def end_share(self, data: st.DataObject) -> None:
        share = data.draw(st.sampled_from(self.all_shares))
        helper = self.workers.get(share.lease.worker_id)
        is_running = helper is not None and helper.shares.pop(share.lease.batch_id, None) is not None
        assert self.queue.has_share(share) is is_running
        assert self.queue.end_share(share) is is_running, "it ends once, whoever says so"

    @invariant()
    def shares_are_their_helpers_and_change_nothing_of_the_lease(self) -> None:
        for worker_id, worker in self.workers.items():
            assert self.queue.list_shares(worker_id) == list(worker.shares.values())
            for lease in worker.leases.values():
                assert self.queue.find_holder(lease.shard.number) == lease
        for number in self.list_free() | self.done - set(self.list_held()):
            assert self.queue.find_holder(number) is None

    # ---- what comes too late

    def look(self) -> object:
        queue = self.queue
        opened = {one.lease.batch_id: one for one in queue.list_open()}
        return queue.num_done, queue.num_waiting, opened, queue.find_hopeless(), queue.list_silent(self.now + 50)

    @precondition(lambda self: self.old)
    @rule(data=st.data(), name=st.sampled_from(["beat", "fail", "lose", "complete"]))
    def answer_too_late(self, data: st.DataObject, name: str) -> None:
        lease = data.draw(st.sampled_from(self.old))
        before = self.look()
        if name == "beat" and lease.worker_id not in self.workers:
            self.queue.renew(beat(lease.worker_id, lease, tokens=99, rows=9), self.now)
        elif name == "fail":
            assert self.queue.fail(lease.worker_id, lease.batch_id, self.now, "late") is None
        elif name == "lose" and lease.worker_id not in self.workers:
            assert self.queue.lose(lease.worker_id, self.now, "late") == []
        elif name == "complete" and lease.shard.number in self.done:
            assert self.queue.complete(lease.worker_id, lease.batch_id, lease.shard.number) is False
        assert self.look() == before

    @precondition(lambda self: self.old)
    @rule(data=st.data())
    def commit_too_late(self, data: st.DataObject) -> None:
        """A zombie's file exists all the same: that is the truth, whoever holds the shard by now."""
        lease = data.draw(st.sampled_from(self.old))
        is_new = lease.shard.number not in self.done
        assert self.queue.complete(lease.worker_id, lease.batch_id, lease.shard.number) is is_new
        self.done.add(lease.shard.number)

    # ---- what always holds

    @invariant()
    def every_shard_is_waiting_leased_or_done(self) -> None:
        held = Counter(one.lease.shard.number for one in self.queue.list_open())
        assert held == Counter(self.list_held())
        assert max(held.values(), default=0) <= 1, "one shard lent to two workers"
        assert self.queue.num_waiting == len(self.list_free())
        assert self.queue.num_done == len(self.done)
        assert self.queue.num_shards == len(self.costs)
        assert self.queue.is_done == (len(self.done) == len(self.costs))

    @invariant()
    def figures_are_those_of_open_leases(self) -> None:
        counted = [
            worker.rows.get(batch_id, (0, 0))
            for worker in self.workers.values()
            for batch_id, lease in worker.leases.items()
            if lease.shard.number not in self.done
        ]
        assert self.queue.count_open_rows() == (sum(done for done, _ in counted), sum(bad for _, bad in counted))
        assert {info.worker_id for info in self.queue.list_workers()} == self.workers.keys()

    @invariant()
    def a_shard_that_fails_too_often_on_live_workers_is_hopeless(self) -> None:
        worst = {n for n, count in self.num_failed.items() if count >= self.max_shard_attempts and n not in self.done}
        found = self.queue.find_hopeless()
        assert (found is None) == (not worst)
        assert found is None or (found[0] in worst and found[1] == self.reasons[found[0]])

    def teardown(self) -> None:
        """However it went so far: one good worker that finishes what it gets ends the job."""
        if not hasattr(self, "queue"):
            return
        for worker_id in sorted(self.workers):
            self.lose(worker_id, "end")
        self.num_made += 1
        self.join(16)
        for _ in range(len(self.costs)):
            self.now += MAX_BACKOFF_S
            self.lend()
            self.every_shard_is_waiting_leased_or_done()
            for lease in [lease for worker in self.workers.values() for lease in worker.leases.values()]:
                assert self.queue.complete(lease.worker_id, lease.batch_id, lease.shard.number)
                self.done.add(lease.shard.number)
                self.drop(lease)
        assert self.queue.is_done
        assert self.queue.lease_next(self.now) is None


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# ---- examples --------------------------------------------------------------------------------------------------------


def test_longest_first_then_lowest_number() -> None:
    queue = make_queue(1, 5, 2, 5)
    for number in range(4):
        queue.add_worker(make_worker_info(f"w{number}"), 0.0)
    order = [must_lease(queue).shard.number for _ in range(4)]
    assert order == [1, 3, 2, 0]


def test_a_neighbour_is_preferred_among_equals_and_nearly_equals() -> None:
    queue = make_queue(10, 10, 10, 8.1, 7, 10)
    queue.add_worker(make_worker_info("a", window=1000), 0.0)
    assert [lease.shard.number for lease in lease_all(queue)] == [0, 1, 2, 3, 5, 4]


def test_the_hungriest_worker_is_served_first() -> None:
    queue = make_queue(*[1.0] * 8)
    queue.add_worker(make_worker_info("a"), 0.0)
    queue.add_worker(make_worker_info("b"), 0.0)
    first = must_lease(queue)
    assert first.worker_id == "a"
    assert must_lease(queue).worker_id == "b"
    queue.renew(beat("a", first, rows=ROWS - 1), 1.0)
    assert must_lease(queue).worker_id == "a"


def test_a_worker_holds_one_and_a_half_windows_and_two_shards_at_least() -> None:
    queue = make_queue(*[1.0] * (MAX_OPEN_SHARDS + 50))
    queue.add_worker(make_worker_info("small", window=1), 0.0)
    assert len(lease_all(queue)) == MIN_OPEN_SHARDS
    queue.add_worker(make_worker_info("large", window=40), 0.0)
    assert len(lease_all(queue)) == 1.5 * 40 / ROWS
    queue.add_worker(make_worker_info("huge", window=100_000), 0.0)
    assert len(lease_all(queue)) == MAX_OPEN_SHARDS


def test_finished_rows_make_room_for_the_next_shard() -> None:
    queue = make_queue(*[1.0] * 9)
    queue.add_worker(make_worker_info("a", window=20), 0.0)
    leases = lease_all(queue)
    assert len(leases) == 3
    queue.renew(beat("a", *leases, rows=ROWS // 2), 1.0)
    assert len(lease_all(queue, 1.0)) == 2


def test_without_workers_or_shards_nothing_is_lent() -> None:
    queue = make_queue(1)
    assert queue.lease_next(0.0) is None
    empty = make_queue()
    empty.add_worker(make_worker_info("a"), 0.0)
    assert empty.lease_next(0.0) is None
    assert empty.is_done


def test_a_lease_carries_what_the_worker_needs() -> None:
    shard = QueuedShard(make_shard(3), first_attempt=4, replaces="etag", cost=1)
    queue = WorkQueue([shard], epoch=EPOCH, retry=RetrySpec(), cluster=CLUSTER)
    queue.add_worker(make_worker_info("a"), 0.0)
    lease = must_lease(queue)
    assert lease == Lease(shard.shard, 4, EPOCH, "a", (), "etag", False, None)
    assert lease.batch_id == "shard-000000003-e7-a4"


def test_a_failed_shard_waits_twice_as_long_each_time_and_at_most_a_minute() -> None:
    queue = make_queue(1, max_shard_attempts=100)
    queue.add_worker(make_worker_info("a"), 0.0)
    now = 0.0
    for expected in [1, 2, 4, 8, 16, 32, 60, 60]:
        lease = must_lease(queue, now)
        queue.fail("a", lease.batch_id, now, "store")
        assert queue.lease_next(now + expected - 0.01) is None
        assert queue.num_waiting == 1
        now += expected


def test_a_lost_shard_is_lent_again_at_once() -> None:
    queue = make_queue(1)
    queue.add_worker(make_worker_info("a"), 0.0)
    lease = must_lease(queue)
    queue.renew(beat("a", lease, rows=4), 2.0)
    [lost] = queue.lose("a", 5.0, "node gone")
    assert (lost.lease, lost.started_at, lost.ended_at, lost.num_rows_done) == (lease, 0.0, 5.0, 4)
    queue.add_worker(make_worker_info("b"), 5.0)
    again = must_lease(queue, 5.0)
    assert (again.attempt, again.reason, again.worker_id) == (2, "node gone", "b")


def test_the_last_resort_comes_after_so_many_lost_leases_and_failed_ones_do_not_count() -> None:
    queue = make_queue(1, max_shard_attempts=2)
    queue.add_worker(make_worker_info("f"), 0.0)
    queue.fail("f", must_lease(queue).batch_id, 0.0, "store")
    queue.lose("f", 0.0, "ended")
    found = []
    for number in range(3):
        queue.add_worker(make_worker_info(f"w{number}"), 10.0)
        found.append(must_lease(queue, 10.0).is_last_resort)
        queue.lose(f"w{number}", 10.0, "killed")
    assert found == [False, False, True]


def test_losses_with_progress_are_the_workers_and_not_the_shards() -> None:
    """A shard that gets further with every attempt is never given up; one that stands still is."""
    queue = make_queue(1, max_shard_attempts=2)
    for number, rows in enumerate([1, 2, 3, 4, 5, 5]):
        queue.add_worker(make_worker_info(f"w{number}"), 0.0)
        lease = must_lease(queue)
        assert not lease.is_last_resort, rows
        queue.renew(beat(f"w{number}", lease, rows=rows), 1.0)
        queue.lose(f"w{number}", 2.0, "killed")
    queue.add_worker(make_worker_info("x"), 3.0)
    assert not must_lease(queue).is_last_resort
    queue.lose("x", 3.0, "killed")
    queue.add_worker(make_worker_info("y"), 3.0)
    assert must_lease(queue).is_last_resort


def test_a_hopeless_shard_is_named_until_somebody_commits_it() -> None:
    queue = make_queue(1, 1, max_shard_attempts=2)
    queue.add_worker(make_worker_info("a"), 0.0)
    for now in (0.0, 100.0):
        for lease in lease_all(queue, now):
            if lease.shard.number == 1:
                queue.fail("a", lease.batch_id, now, f"no space at {now}")
    assert queue.find_hopeless() == (1, "no space at 100.0")
    queue.complete("z", "shard-000000001-e7-a1", 1)
    assert queue.find_hopeless() is None
    assert queue.num_waiting == 0


# ---- silence and stall


def test_a_worker_that_is_not_heard_of_is_silent() -> None:
    queue = make_queue(1)
    queue.add_worker(make_worker_info("a"), 0.0)
    assert queue.list_silent(100.0) == []
    assert queue.list_silent(100.1) == [("a", "not heard of for 100 s")]
    queue.renew(beat("a"), 100.1)
    assert queue.list_silent(200.0) == []


@pytest.mark.parametrize(("tokens", "rows", "is_silent"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_a_busy_worker_must_make_a_token_or_finish_a_row(tokens: int, rows: int, is_silent: bool) -> None:
    queue = make_queue(1)
    queue.add_worker(make_worker_info("a"), 0.0)
    lease = must_lease(queue)
    queue.renew(beat("a", lease, tokens=tokens, rows=rows), 950.0)
    assert queue.list_silent(1000.0) == []
    found = queue.list_silent(1001.0)
    assert found == ([("a", "no token and no row for 1000 s")] if is_silent else [])


def test_the_same_progress_twice_is_none() -> None:
    queue = make_queue(1)
    queue.add_worker(make_worker_info("a"), 0.0)
    lease = must_lease(queue)
    for now in range(50, 1100, 50):
        queue.renew(beat("a", lease, tokens=5, rows=1), now)
    assert queue.list_silent(1050.0) == []
    assert queue.list_silent(1051.0) == [("a", "no token and no row for 1000 s")]


def test_an_idle_worker_never_stalls_and_its_clock_starts_with_its_first_lease() -> None:
    queue = make_queue(1)
    queue.add_worker(make_worker_info("busy"), 0.0)
    queue.add_worker(make_worker_info("idle"), 0.0)
    lease = must_lease(queue)
    for now in range(50, 5000, 50):
        queue.renew(beat("idle", inflight=0), now)
        queue.renew(beat("busy", lease, tokens=now), now)
    assert queue.list_silent(5000.0) == []
    queue.lose("busy", 5000.0, "killed")
    assert must_lease(queue, 5000.0).worker_id == "idle"
    queue.renew(beat("idle", inflight=1), 5990.0)
    assert queue.list_silent(5990.0) == []


def test_a_zombies_commit_is_taken_and_its_successor_learns_it() -> None:
    queue = make_queue(1)
    queue.add_worker(make_worker_info("a"), 0.0)
    first = must_lease(queue)
    queue.lose("a", 1.0, "silent")
    queue.add_worker(make_worker_info("b"), 1.0)
    second = must_lease(queue, 1.0)
    queue.renew(beat("b", second, rows=5), 2.0)
    assert queue.complete("a", first.batch_id, 0) is True
    assert queue.is_done
    assert queue.count_open_rows() == (0, 0), "rows of a committed shard would count twice"
    assert queue.complete("b", second.batch_id, 0) is False
    assert queue.list_open() == []


# ---- shares


def test_a_helper_is_busy_with_its_share_alone_and_its_progress_is_its_owners() -> None:
    queue = make_queue(1)
    for worker_id in ("owner", "helper"):
        queue.add_worker(make_worker_info(worker_id), 0.0)
    lease = queue.lease_next(0.0)
    assert lease is not None
    owner, helper = lease.worker_id, ({"owner", "helper"} - {lease.worker_id}).pop()
    share = queue.lend_share(owner, lease.batch_id, helper, 5, 500.0)
    for now in range(550, 3000, 50):  # the owner has nothing left to do but wait
        queue.renew(beat(owner, lease, inflight=0), now)
        queue.renew(beat(helper, tokens=now), now)
    assert queue.list_silent(2950.0) == []
    for now in range(3000, 4000, 50):  # and now the helper stands still
        queue.renew(beat(owner, lease, inflight=0), now)
        queue.renew(beat(helper, tokens=2950), now)
    assert {worker_id for worker_id, _ in queue.list_silent(3951.0)} == {owner, helper}
    assert queue.end_share(share)
    assert {worker_id for worker_id, _ in queue.list_silent(3951.0)} == {owner}


def test_a_decision_looks_at_few_workers_and_few_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: what one lease costs does not grow with the cluster or the job."""
    from batchgen.queue import lazy_heap, work_queue

    counts: Counter[str] = Counter()

    class CountingHeap(lazy_heap.LazyHeap):  # type: ignore[type-arg]
        def peek(self) -> object:
            counts["entries"] += len(self._heap)
            found = super().peek()
            counts["entries"] -= len(self._heap) - 1
            return found

    def count_wants(self: WorkQueue, worker: object, plain: Any = work_queue.WorkQueue._wants_more) -> bool:
        counts["workers"] += 1
        return bool(plain(self, worker))

    monkeypatch.setattr(work_queue, "LazyHeap", CountingHeap)
    monkeypatch.setattr("batchgen.queue.backlog.LazyHeap", CountingHeap)
    monkeypatch.setattr(work_queue.WorkQueue, "_wants_more", count_wants)
    num_shards, num_workers = 5000, 300
    queue = make_queue(*[1.0 + number % 97 for number in range(num_shards)])
    for number in range(num_workers):
        queue.add_worker(make_worker_info(f"w{number:04}", window=40), 0.0)
    counts.clear()
    leases = lease_all(queue)
    assert len(leases) == 6 * num_workers
    assert counts["workers"] == len(leases), "one worker is looked at for each lease"
    assert counts["entries"] < 6 * len(leases), "and a few heap entries, stale ones included"


def test_long_rows_go_first_and_work_is_balanced() -> None:
    """A shard with one long row and little else begins first, and does not keep others from its worker."""
    plans = [(9.0, 1.0), (8.0, 8.0), (3.0, 3.0), (2.0, 2.0)]
    shards = [QueuedShard(make_shard(n, row_end=ROWS), cost=cost, work=work) for n, (cost, work) in enumerate(plans)]
    queue = WorkQueue(shards, epoch=EPOCH, retry=RetrySpec(), cluster=CLUSTER)
    queue.add_worker(make_worker_info("a"), 0.0)
    queue.add_worker(make_worker_info("b"), 0.0)
    order = [(lease.worker_id, lease.shard.number) for lease in lease_all(queue)]
    assert order == [("a", 0), ("b", 1), ("a", 2), ("b", 3)]


def make_hinted_queue(costs: list[float], *, follows_hints: bool, window: int = 10) -> WorkQueue:
    """Shards of a window each that promise so much work; two workers."""
    shards = [
        QueuedShard(replace(make_shard(number, row_end=window), expected_tokens=cost), cost=cost, work=min(cost, 99.0))
        for number, cost in enumerate(costs)
    ]
    queue = WorkQueue(shards, epoch=EPOCH, retry=RetrySpec(), cluster=CLUSTER, follows_hints=follows_hints)
    for name in "ab":
        queue.add_worker(make_worker_info(name, window=window), 0.0)
    return queue


def say(worker_id: str, are_useful: bool | None) -> Heartbeat:
    return replace(beat(worker_id), are_hints_useful=are_useful)


def test_shards_go_in_order_until_their_hints_are_borne_out_and_longest_first_then() -> None:
    queue = make_hinted_queue([*map(float, range(1, 31)), math.inf], follows_hints=False)
    first = [lease.shard.number for lease in lease_all(queue)]
    assert first == [30, 0, 1, 2], "the canary before all, and no more than with no hints"
    queue.renew(say("a", None), 1.0)
    assert lease_all(queue) == []
    queue.renew(say("a", True), 2.0)
    queue.renew(say("b", None), 2.0)
    then = [lease.shard.number for lease in lease_all(queue)]
    assert sorted(then) == list(range(30 - len(then), 30)), "the longest, and far ahead"
    assert len(then) == 2 * 8, "beside the three that they were lent in order"


def test_hints_that_are_not_borne_out_are_left_and_balance_nothing() -> None:
    queue = make_hinted_queue([100.0, *[1.0] * 9, 50.0, 60.0], follows_hints=True)
    queue.renew(say("a", False), 1.0)
    got: dict[str, list[int]] = {"a": [], "b": []}
    for lease in lease_all(queue):
        got[lease.worker_id].append(lease.shard.number)
    assert sorted(got["a"] + got["b"]) == [0, 1, 2, 3]
    assert [len(numbers) for numbers in got.values()] == [2, 2]
