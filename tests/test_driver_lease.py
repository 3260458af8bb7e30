"""Who holds the folder, with a clock of ours: refused by the living, taken over from the dead and the silent."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from batchgen.driver.hold import Hold
from batchgen.driver.lease import DriverLease, Holder, acquire, get_machine, is_dead_here, make_path, read_holder
from batchgen.errors import LeaseHeld, LeaseLost, StorageError
from batchgen.storage import Storage

TTL_S = 60.0


class Clock:
    """Time passes only by sleeping. `on_sleep` is what others do meanwhile."""

    def __init__(self, on_sleep: Callable[[], object] = lambda: None) -> None:
        self.now = 1000.0
        self.on_sleep = on_sleep

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= 1.0, "a sign of life must be seen within a second"
        self.now += seconds
        self.on_sleep()


class FaultyStorage(Storage):
    """Every operation raises once `is_down`; a write that takes `write_s` moves the clock on."""

    is_down = False
    write_s = 0.0
    clock: Clock | None = None
    on_put: Callable[[], object] = staticmethod(lambda: None)

    def info(self, path: str):  # type: ignore[no-untyped-def]
        if self.is_down:
            raise StorageError("the store is down")
        return super().info(path)

    def put(self, path: str, data: bytes | memoryview) -> str:
        if self.is_down:
            raise StorageError("the store is down")
        self.on_put()
        version = super().put(path, data)
        if self.clock is not None:
            self.clock.now += self.write_s
        return version


@pytest.fixture
def storage(tmp_path: Path) -> FaultyStorage:
    return FaultyStorage(str(tmp_path / "out"))


def take(storage: Storage, clock: Clock | None = None, said: list[str] | None = None) -> DriverLease:
    clock = clock or Clock()
    say = (said if said is not None else []).append
    return acquire(storage, TTL_S, clock=clock, sleep=clock.sleep, on_wait=say)


def must_read(storage: Storage) -> Holder:
    holder = read_holder(storage)
    assert holder is not None
    return holder


def rewrite(storage: Storage, **fields: object) -> Holder:
    """The newest holder as if another one had written it."""
    holder = dataclasses.replace(must_read(storage), **fields)
    storage.put(make_path(holder.epoch), json.dumps(dataclasses.asdict(holder)).encode())
    return holder


def make_dead_pid() -> int:
    return int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)


# ---- taking it


def test_a_fresh_folder_is_taken_at_once(storage: Storage) -> None:
    clock, said = Clock(), list[str]()
    assert read_holder(storage) is None
    lease = take(storage, clock, said)
    assert (lease.epoch, clock.now, said) == (1, 1000.0, [])
    holder = must_read(storage)
    assert (holder.epoch, holder.pid, holder.machine, holder.beat) == (1, os.getpid(), get_machine(), 0)


def test_a_live_holder_is_named_and_keeps_the_folder(storage: Storage) -> None:
    lease = take(storage)
    clock, said = Clock(on_sleep=lease.renew), list[str]()
    with pytest.raises(LeaseHeld) as error:
        take(storage, clock, said)
    who = must_read(storage).describe()
    assert f"process {os.getpid()} on " in who
    assert who in str(error.value)
    assert f"batchgen cancel {storage.root}" in str(error.value)
    assert clock.now - 1000.0 <= 2.0, "a live holder refuses as soon as it beats"
    assert len(said) == 1
    assert "waiting up to 60 s" in said[0]
    lease.renew()
    assert must_read(storage).epoch == 1


def test_a_folder_that_was_released_is_taken_at_once(storage: Storage) -> None:
    first = take(storage)
    first.release()
    assert must_read(storage).has_ended
    clock = Clock()
    assert (take(storage, clock).epoch, clock.now) == (2, 1000.0)


def test_a_dead_process_of_this_machine_is_taken_over_at_once(storage: Storage) -> None:
    take(storage)
    rewrite(storage, pid=make_dead_pid())
    clock, said = Clock(), list[str]()
    assert (take(storage, clock, said).epoch, clock.now, said) == (2, 1000.0, [])


def test_a_process_that_dies_while_we_wait_is_taken_over_then(storage: Storage) -> None:
    take(storage)
    dead = make_dead_pid()
    clock = Clock(on_sleep=lambda: rewrite(storage, pid=dead))
    assert (take(storage, clock).epoch, clock.now) == (2, 1001.0)


def test_a_holder_that_ends_while_we_wait_is_followed_at_once(storage: Storage) -> None:
    first = take(storage)
    clock = Clock(on_sleep=first.release)
    assert (take(storage, clock).epoch, clock.now) == (2, 1001.0)


def test_a_process_id_of_another_machine_says_nothing(storage: Storage) -> None:
    take(storage)
    rewrite(storage, pid=make_dead_pid(), machine="elsewhere")
    clock = Clock()
    assert take(storage, clock).epoch == 2
    assert clock.now - 1000.0 >= TTL_S


@pytest.mark.parametrize("ttl_s", [5.0, 300.0])
def test_a_silent_holder_is_taken_over_after_its_own_time_to_live_and_not_before(
    storage: Storage, ttl_s: float
) -> None:
    take(storage)
    rewrite(storage, machine="elsewhere", ttl_s=ttl_s)
    clock = Clock()
    assert take(storage, clock).epoch == 2
    assert ttl_s <= clock.now - 1000.0 <= ttl_s + 1.0


def test_a_beat_in_the_last_moment_saves_the_holder(storage: Storage) -> None:
    take(storage)
    rewrite(storage, machine="elsewhere", host="far")
    clock = Clock()

    def beat_late() -> None:
        if clock.now - 1000.0 >= TTL_S - 0.5:
            rewrite(storage, beat=1)

    clock.on_sleep = beat_late
    with pytest.raises(LeaseHeld, match="on far"):
        take(storage, clock)


def test_another_successor_is_respected(storage: Storage) -> None:
    take(storage)
    rewrite(storage, machine="elsewhere")
    clock = Clock()

    def overtake() -> None:
        clock.on_sleep = lambda: None
        holder = dataclasses.replace(must_read(storage), epoch=2, token="other", host="far")
        storage.create(make_path(2), json.dumps(dataclasses.asdict(holder)).encode())

    clock.on_sleep = overtake
    with pytest.raises(LeaseHeld, match=r"on far, .*\(epoch 2\)"):
        take(storage, clock)


def test_who_loses_the_race_for_an_epoch_looks_again_and_refuses(storage: Storage) -> None:
    """The other one created the epoch between our look and our create."""
    winner: list[DriverLease] = []

    class Slow(FaultyStorage):
        def create(self, path: str, data: bytes | memoryview) -> str:
            if not winner:
                winner.append(take(storage))
            return super().create(path, data)

    clock = Clock(on_sleep=lambda: winner[0].renew())
    with pytest.raises(LeaseHeld):
        take(Slow(storage.root), clock)
    assert winner[0].epoch == must_read(storage).epoch == 1


def test_our_own_object_after_a_lost_reply_is_ours(storage: Storage) -> None:
    class LostReply(Storage):
        def create(self, path: str, data: bytes | memoryview) -> str:
            super().create(path, data)
            return super().create(path, data)  # the client tried again and finds its own

    assert take(LostReply(storage.root)).epoch == 1


def test_of_eight_that_race_one_wins(storage: Storage) -> None:
    winners: list[DriverLease] = []
    start, has_winner, beating = threading.Barrier(8), threading.Event(), threading.Lock()

    def beat() -> None:
        assert has_winner.wait(timeout=30)
        with beating:
            winners[0].renew()

    def race(_: int) -> int | None:
        clock = Clock(on_sleep=beat)
        start.wait()
        try:
            lease = take(Storage(storage.root), clock)
        except LeaseHeld:
            return None
        winners.append(lease)
        has_winner.set()
        return lease.epoch

    with ThreadPoolExecutor(8) as pool:
        epochs = list(pool.map(race, range(8)))
    assert sorted(epochs, key=bool) == [None] * 7 + [1]
    winners[0].renew()


def test_of_eight_that_create_the_same_epoch_one_wins(storage: Storage) -> None:
    start = threading.Barrier(8)

    class Together(Storage):
        def create(self, path: str, data: bytes | memoryview) -> str:
            start.wait(timeout=30)
            return super().create(path, data)

    def refuse(_: float) -> None:
        raise LeaseHeld("somebody else won")

    def race(_: int) -> int | None:
        try:
            return acquire(Together(storage.root), TTL_S, sleep=refuse).epoch
        except LeaseHeld:
            return None

    with ThreadPoolExecutor(8) as pool:
        epochs = list(pool.map(race, range(8)))
    assert sorted(epochs, key=bool) == [None] * 7 + [1]


# ---- keeping it


def test_renewing_counts_beats_and_changes_nothing_else(storage: Storage) -> None:
    lease = take(storage)
    before = must_read(storage)
    for _ in range(3):
        lease.renew()
    assert must_read(storage) == dataclasses.replace(before, beat=3)
    assert 0 < lease.renew_interval_s <= TTL_S / 6


def test_a_lease_is_lost_when_the_next_epoch_exists(storage: Storage) -> None:
    lease = take(storage)
    rewrite(storage, machine="elsewhere")
    second = take(storage)
    with pytest.raises(LeaseLost, match=r"took .* over \(epoch 2\)"):
        lease.renew()
    second.renew()
    lease.release()
    assert must_read(storage).epoch == 2
    assert not must_read(storage).has_ended, "a lost lease must not end its successor's"


def test_a_store_that_fails_is_borne_for_half_the_time_to_live(storage: FaultyStorage) -> None:
    clock = Clock()
    lease = take(storage, clock)
    storage.is_down = True
    clock.now += TTL_S / 2
    lease.renew()
    clock.now += 0.1
    with pytest.raises(LeaseLost, match="the store is down"):
        lease.renew()


def test_a_renewal_in_between_starts_the_half_again(storage: FaultyStorage) -> None:
    clock = Clock()
    lease = take(storage, clock)
    for _ in range(5):
        clock.now += TTL_S / 2
        storage.is_down = True
        lease.renew()
        storage.is_down = False
        lease.renew()


def test_a_slow_reply_counts_from_when_it_was_asked_for(storage: FaultyStorage) -> None:
    clock = Clock()
    lease = take(storage, clock)
    storage.clock, storage.write_s = clock, 20.0
    lease.renew()
    storage.is_down = True
    clock.now += TTL_S / 2 - 20.0
    lease.renew()
    clock.now += 0.1
    with pytest.raises(LeaseLost):
        lease.renew()


def test_a_pause_before_the_creation_is_known_counts(storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its successors may have come and gone: it must not write their last words over."""
    clock = Clock()
    create = FaultyStorage.create

    def freeze(self: FaultyStorage, path: str, data: bytes | memoryview) -> str:
        version = create(self, path, data)
        clock.now += TTL_S
        return version

    monkeypatch.setattr(FaultyStorage, "create", freeze)
    lease = acquire(storage, TTL_S, clock=clock, sleep=clock.sleep)
    with pytest.raises(LeaseLost, match="could not renew"):
        lease.check()


def test_a_pause_of_half_the_time_to_live_ends_the_hold(storage: FaultyStorage) -> None:
    clock = Clock()
    lease = take(storage, clock)
    clock.now += TTL_S / 2
    lease.check()
    clock.now += 0.1
    with pytest.raises(LeaseLost, match="could not renew"):
        lease.check()
    lease.renew()
    lease.check()


def test_releasing_on_a_store_that_fails_is_no_error(storage: FaultyStorage) -> None:
    lease = take(storage)
    storage.is_down = True
    lease.release()
    storage.is_down = False
    assert not must_read(storage).has_ended


def test_a_late_renewal_does_not_undo_the_release(storage: FaultyStorage) -> None:
    lease = take(storage)
    is_writing, may_write = threading.Event(), threading.Event()

    def wait() -> None:
        is_writing.set()
        assert may_write.wait(60)

    storage.on_put = wait
    with ThreadPoolExecutor(2) as threads:
        renewing = threads.submit(lease.renew)
        assert is_writing.wait(60)
        releasing = threads.submit(lease.release)
        with pytest.raises(TimeoutError):
            releasing.result(0.1)
        may_write.set()
        renewing.result()
        releasing.result()
    assert must_read(storage).has_ended
    lease.renew()
    assert must_read(storage).has_ended, "nothing is written after the release"


def test_a_hold_waits_for_the_renewal_of_a_slow_store(storage: FaultyStorage) -> None:
    """Longer than a renewal takes as a rule, which is as long as the thread is joined for."""
    clock = Clock()
    lease = acquire(storage, 0.3, clock=clock, sleep=clock.sleep)
    is_writing, may_write = threading.Event(), threading.Event()

    def wait() -> None:
        if threading.current_thread().name == "driver-lease":
            is_writing.set()
            assert may_write.wait(60)

    storage.on_put = wait
    hold = Hold(lease, lambda: False)
    assert is_writing.wait(60)
    with ThreadPoolExecutor(1) as threads:
        releasing = threads.submit(hold.release)
        with pytest.raises(TimeoutError):
            releasing.result(0.2)
        may_write.set()
        releasing.result()
    assert must_read(storage).has_ended


# ---- dead or alive


def test_this_process_is_alive_and_a_zombie_is_dead(storage: Storage) -> None:
    take(storage)
    assert not is_dead_here(must_read(storage))
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    holder = dataclasses.replace(must_read(storage), pid=child.pid)
    assert is_dead_here(holder), "a zombie answers signal 0"
    child.wait()
    assert is_dead_here(holder)
    assert not is_dead_here(dataclasses.replace(holder, machine="elsewhere"))


def test_epochs_stay_in_order_when_there_are_many(storage: Storage) -> None:
    for epoch in range(1, 12):
        lease = take(storage)
        assert lease.epoch == epoch
        lease.release()
