"""Who of all workers sends a request that several rows ask: the table, and the driver's decisions, with a real queue."""

import random
from array import array
from collections.abc import Sequence
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import make_job_spec, make_shard, make_worker_info

from batchgen.journal import JournalIndex, make_segment_path
from batchgen.queue import claim_table
from batchgen.queue.backlog import QueuedShard
from batchgen.queue.claim_table import ClaimTable, get_shard, get_slot, make_key, make_place
from batchgen.queue.claims import Claims
from batchgen.queue.events import ClaimsMade, Heartbeat, JournalFlushed, WorkerPool
from batchgen.queue.orders import ClaimsDecided, JournalSoon, LookAt, Order
from batchgen.queue.trial_queue import TrialQueue
from batchgen.records import JournalRef, Lease, ShardProgress

KEYS = st.integers(1, 2**64 - 1) | st.sampled_from([1, 2, 17, 33, 2**56, 2**56 + 16, 2**64 - 1])


@settings(deadline=None)
@given(st.lists(st.tuples(KEYS, st.integers(0, 2**63)), max_size=300))
def test_the_table_is_a_dict(claims: list[tuple[int, int]]) -> None:
    table, known = ClaimTable(), dict[int, int]()
    for key, place in claims:
        assert table.get(key) == known.get(key)
        table.set(key, place)
        known[key] = place
    assert {key: table.get(key) for key in known} == known


def test_it_is_compact_and_forgets_the_oldest_half() -> None:
    rng, table = random.Random(0), ClaimTable(max_claims=20_000)
    keys = [rng.getrandbits(64) for _ in range(50_000)]
    for number, key in enumerate(keys):
        table.set(key, number)
        assert table.get(key) == number
    assert all(table.get(key) == number for number, key in list(enumerate(keys))[-10_000:])
    assert sum(table.get(key) is not None for key in keys) <= 20_000
    assert table.num_bytes <= 64 * 20_000


def test_places_and_keys_fit() -> None:
    place = make_place(199_999, (10**9, 7), 8)
    assert place < 2**63
    assert (get_shard(place), get_slot(place, 8)) == (199_999, (10**9, 7))
    assert make_key(bytes(16)) == 1
    assert make_key(b"12345678" + b"a" * 8) == make_key(b"12345678" + b"b" * 8) < 2**64


class Heard:
    """What a pool was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Order]] = []

    def tell(self, worker_id: str, order: Order) -> None:
        self.told.append((worker_id, order))

    def take(self) -> list[tuple[str, Order]]:
        told, self.told = self.told, []
        return told


class Run:
    """Shards of ten rows, one a worker at first."""

    def __init__(self, num_workers: int = 2, **claims: Any) -> None:
        spec, self.index, self.heard = make_job_spec(), JournalIndex(), Heard()
        shards = [
            QueuedShard(make_shard(number, 10 * number, 10 * number + 10), cost=10.0) for number in range(num_workers)
        ]
        self.queue = TrialQueue(shards, epoch=1, retry=spec.retry, cluster=spec.cluster)
        pool = cast(WorkerPool, self.heard)
        self.claims = Claims(self.queue, pool, self.index, 1, **claims)
        self.leases: dict[int, Lease] = {}
        for number in range(num_workers):
            self.queue.add_worker(make_worker_info(f"w{number}"), 0.0)
        for _ in range(num_workers):
            self.lend()
        assert len({lease.worker_id for lease in self.leases.values()}) == num_workers

    def lend(self) -> Lease:
        lease = self.queue.lease_next(0.0)
        assert lease is not None
        self.leases[lease.shard.number] = lease
        return lease

    def find_worker(self, number: int) -> str:
        return self.leases[number].worker_id

    def ask(
        self, worker_id: str, *rows: tuple[bytes, int], told: Sequence[int] = (), shards: Any = ()
    ) -> ClaimsDecided:
        """(fingerprint, row) each; rows of shard n are 10 n and on."""
        keys = array("Q", (make_key(fingerprint) for fingerprint, _ in rows))
        packed = array("Q", (at(row) for _, row in rows))
        said = array("Q", told or [0] * len(rows))
        self.claims.decide(ClaimsMade(worker_id, 1, keys.tobytes(), packed.tobytes(), said.tobytes(), shards))
        answers = [(who, order) for who, order in self.heard.told if isinstance(order, ClaimsDecided)]
        self.heard.told = [(who, order) for who, order in self.heard.told if not isinstance(order, ClaimsDecided)]
        [(who, decided)] = answers
        assert who == worker_id
        return cast(ClaimsDecided, decided)

    def flush(self, number: int, rows: Sequence[int], name: int = 1, replaced: Sequence[str] = ()) -> JournalRef:
        ref = JournalRef(make_segment_path(1, self.find_worker(number), name), 0)
        self.index.add({number: ref})
        told = array("Q", sorted(map(at, rows))).tobytes()
        gone = ((number, tuple(replaced)),) if replaced else ()
        self.claims.note_flushed(JournalFlushed(self.find_worker(number), ((number, ref),), gone, ((number, told),)))
        return ref

    def lose(self, number: int) -> None:
        self.queue.lose(self.find_worker(number), 1.0, "gone")
        self.claims.note_ended(number)

    def commit(self, number: int) -> None:
        lease = self.leases[number]
        assert self.queue.complete(lease.worker_id, lease.batch_id, number)
        self.claims.note_committed(number)


def at(row: int) -> int:
    return make_place(row // 10, (row, 0), 1)


def owners(decided: ClaimsDecided) -> list[int]:
    return [get_slot(place, 1)[0] for place in array("Q", decided.owners)]


A, B = b"a" * 16, b"b" * 16


def test_the_first_that_asks_is_sent_and_the_next_told_of_it() -> None:
    run = Run()
    one, two = run.find_worker(0), run.find_worker(1)
    assert owners(run.ask(one, (A, 3))) == [3]
    decided = run.ask(two, (A, 12), (B, 13))
    assert owners(decided) == [3, 13]
    assert decided.looks == (LookAt(0, is_open=True),)
    assert run.heard.take() == [(one, JournalSoon(0))]
    assert owners(run.ask(one, (A, 3))) == [3]  # the very row, sent again


def test_who_waits_hears_of_its_rows_and_of_no_others() -> None:
    run = Run(3)
    run.ask(run.find_worker(0), (A, 3), (B, 4))
    run.ask(run.find_worker(1), (A, 12))
    run.ask(run.find_worker(2), (B, 22))
    run.heard.take()
    run.flush(0, [1, 2], name=1)
    assert run.heard.take() == []
    ref = run.flush(0, [3, 5], name=2)
    assert run.heard.take() == [(run.find_worker(1), LookAt(0, ((ref, (at(3),)),), is_open=True))]
    run.commit(0)
    last = LookAt(0, is_committed=True)
    assert sorted(run.heard.take()) == sorted([(run.find_worker(1), last), (run.find_worker(2), last)])
    assert (run.claims._waiters, run.claims._num_waited, run.claims._rows) == ({}, 0, {})


def test_who_asks_late_is_told_where_it_is() -> None:
    run = Run()
    run.ask(run.find_worker(0), (A, 3), (B, 4))
    run.flush(0, [1, 2], name=1)
    ref = run.flush(0, [3], name=2)
    assert run.ask(run.find_worker(1), (A, 12)).looks == (LookAt(0, ((ref, (at(3),)),), is_open=True),)
    merged = run.flush(0, [1, 2, 3], name=3, replaced=[ref.path])
    assert run.ask(run.find_worker(1), (A, 13)).looks == (LookAt(0, ((merged, (at(3),)),), is_open=True),)
    run.commit(0)
    assert run.ask(run.find_worker(1), (A, 14)).looks == (LookAt(0, is_committed=True),)


def test_a_lost_lease_lets_one_of_those_who_waited_go_on() -> None:
    run = Run(3)
    one, two, three = map(run.find_worker, range(3))
    run.ask(one, (A, 3))
    run.ask(two, (A, 12))
    run.ask(three, (A, 22))
    ref = run.flush(0, [3])
    run.heard.take()
    run.lose(0)
    gone = LookAt(0, ((ref, (at(3),)),))
    assert sorted(run.heard.take()) == [(two, gone), (three, gone)]
    # It is not in the journal after all: the first that says so is sent, the next waits for that.
    assert owners(run.ask(two, (A, 12), told=[at(3)])) == [12]
    assert owners(run.ask(three, (A, 22), told=[at(3)])) == [12]
    assert owners(run.ask(two, (A, 13))) == [12]
    lease = run.lend()
    assert lease.shard.number == 0
    assert owners(run.ask(lease.worker_id, (A, 3))) == [12]


def test_what_a_lost_worker_journaled_is_looked_at_before_it_is_made_again() -> None:
    """News of a segment died with its worker: all of it may be anything."""
    run = Run()
    run.ask(run.find_worker(0), (A, 3))
    run.queue.lose(run.find_worker(0), 1.0, "gone")
    ref = JournalRef(make_segment_path(1, "w0", 9), 0)
    old = JournalRef(make_segment_path(0, "w0", 9), 0)
    run.index.add({0: old})
    run.index.add({0: ref})
    run.claims.note_ended(0)
    decided = run.ask(run.find_worker(1), (A, 12))
    assert owners(decided) == [3]
    assert decided.looks == (LookAt(0, ((ref, (at(3),)),)),)
    assert owners(run.ask(run.find_worker(1), (A, 12), told=[at(3)])) == [12]


def test_nobody_waits_for_a_row_that_nobody_works_on() -> None:
    run = Run()
    run.ask(run.find_worker(0), (A, 3))
    run.lose(0)
    assert owners(run.ask(run.find_worker(1), (A, 12))) == [12]


def test_a_shard_that_is_tried_apart_is_waited_for_by_nobody() -> None:
    run = Run()
    run.ask(run.find_worker(0), (A, 3))
    run.lose(0)
    run.queue.hold([0])
    run.queue.add_worker(make_worker_info("w9"), 1.0)
    run.queue.lend_rows("w9", [(0, ((0, 5),))], 1.0)
    assert owners(run.ask(run.find_worker(1), (A, 12))) == [12]


def test_more_than_may_be_waited_for_is_sent() -> None:
    run = Run(max_waited=1)
    run.ask(run.find_worker(0), (A, 3), (B, 4))
    assert owners(run.ask(run.find_worker(1), (A, 12))) == [3]
    assert owners(run.ask(run.find_worker(1), (B, 13))) == [13]


def test_a_shard_can_be_asked_about() -> None:
    run = Run()
    run.ask(run.find_worker(0), (A, 3))
    two = run.find_worker(1)
    run.ask(two, (A, 12))
    ref = run.flush(0, [3])
    assert run.ask(two, shards=(0,)).looks == (LookAt(0, ((ref, (at(3),)),), is_open=True),)
    run.lose(0)
    assert run.ask(two, shards=(0,)).looks == (LookAt(0),)


def test_a_worker_that_only_waits_gets_more_and_does_not_stall() -> None:
    """Its engine needs other rows, and it can do nothing about those."""
    spec = make_job_spec(cluster={"stall_timeout_s": 20, "worker_timeout_s": 1000})
    shards = [QueuedShard(make_shard(number), cost=10.0) for number in range(5)]
    queue = TrialQueue(shards, epoch=1, retry=spec.retry, cluster=spec.cluster)
    queue.add_worker(make_worker_info("w1", window=4), 0.0)
    leases = [lease for _ in range(9) if (lease := queue.lease_next(0.0)) is not None]
    assert len(leases) == 2

    def beat(num_waiting: int, now: float) -> None:
        progress = [ShardProgress(lease.batch_id, 0, 0, 10 - num_waiting, num_waiting=num_waiting) for lease in leases]
        queue.renew(Heartbeat("w1", 0, 0, 0.0, tuple(progress)), now)

    beat(0, 1.0)
    assert queue.lease_next(1.0) is None
    beat(9, 2.0)
    more = queue.lease_next(2.0)
    assert more is not None
    leases.append(more)
    for now in (15.0, 30.0, 45.0):
        beat(10, now)
        assert queue.list_silent(now) == []
    beat(9, 70.0)
    assert queue.list_silent(70.0) != []


@pytest.mark.parametrize("size", [1, 2])
def test_a_part_that_is_full_of_one_hash_still_finds_all(size: int) -> None:
    """Keys that want one place."""
    table = ClaimTable()
    keys = [(number << 40) + 16 * size for number in range(1, 400)]
    for key in keys:
        table.set(key, key)
    assert [table.get(key) for key in keys] == keys
    assert table.get(16 * size + 1) is None
    assert claim_table.NUM_PARTS == 256
