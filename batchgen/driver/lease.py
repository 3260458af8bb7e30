"""One driver an output folder: a lease with an epoch, kept as objects that are only ever created if absent.

Epoch N is the object `_batchgen/lease/N.json`, created exclusively, so two drivers never share an epoch. The holder
rewrites its own object to renew it and looks for a higher epoch: when there is one it has been taken over. Who wants the
folder and finds a live holder is refused and told who; a holder that was not renewed for its time to live (or whose
process is gone from this very host, or that said it ended) is taken over by creating epoch N + 1. Only create-if-absent
is needed, no conditional replace; clocks are not compared: silence is waited for, on the monotonic clock.

A holder that can't renew by half its time to live stops itself, so that its successor never overlaps it by more than a
paused process; what such a zombie still commits is a whole shard file that either is first or is dropped.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from batchgen.errors import AlreadyExists, LeaseHeld, LeaseLost, NotFound, StorageError
from batchgen.storage import Storage
from batchgen.verify.damage import refusing_damage

FOLDER = "_batchgen/lease"
MAX_RENEW_S = 5.0


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds the folder. `token` is unique to one process, `machine` to one boot of one host (and one container);
    `beat` counts renewals; times are Unix seconds."""

    epoch: int
    token: str
    machine: str
    host: str
    pid: int
    started_at: float
    beat: int
    ttl_s: float
    has_ended: bool = False

    def describe(self) -> str:
        started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.started_at))
        return f"process {self.pid} on {self.host}, started {started} (epoch {self.epoch})"


_HOLDER = TypeAdapter(Holder)  # made once: it costs 2 ms


def make_path(epoch: int) -> str:
    return f"{FOLDER}/{epoch:09d}.json"


def make_cancel_path(epoch: int) -> str:
    """The object that asks the run of this epoch to stop; it means nothing to any other run."""
    return f"_batchgen/cancel-{epoch:09d}.json"


def read_holder(storage: Storage) -> Holder | None:
    """The newest epoch's holder, live or not; None on a folder never used. Raises OutputError where it is damaged."""
    found = storage.list_files(FOLDER, suffix=".json")
    if not found:
        return None
    mend = "is damaged; delete it once no run is working on the folder"
    try:
        with refusing_damage(storage.url(found[-1].path), mend):
            return parse_holder(storage.read_bytes(found[-1].path))
    except NotFound:
        return None


def read_live_holder(storage: Storage) -> Holder | None:
    """The newest epoch's holder, unless it said that it ended or is known to be dead: one on another host that is silent
    counts as live. Raises OutputError as `read_holder`."""
    holder = read_holder(storage)
    return None if holder is None or holder.has_ended or is_dead_here(holder) else holder


def parse_holder(raw: bytes) -> Holder:
    """Raises ValueError for what no driver wrote."""
    return _HOLDER.validate_json(raw)


def get_machine() -> str:
    """Tells hosts, their reboots and their containers apart: only within one of them does a process id mean anything."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists() or not namespace.exists():
        return f"{socket.gethostname()}:{uuid.getnode():x}"
    return f"{boot.read_text().strip()}:{namespace.readlink()}"


def is_dead_here(holder: Holder) -> bool:
    """Was the holder a process of this machine, and is it gone? A process id of another machine says nothing."""
    if holder.machine != get_machine():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _is_zombie(holder.pid)


def _is_zombie(pid: int) -> bool:
    """A killed process whose parent has not reaped it still answers signal 0."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False  # no /proc here, or reaped this instant: the next look says so
    return status.rpartition(")")[2].split()[0] == "Z"


class DriverLease:
    """Held by one driver. `renew` often (a sixth of the time to live is good); stop at LeaseLost. Renewing and releasing
    may be asked for by two threads: they wait for each other, and nothing is written after the release."""

    def __init__(self, storage: Storage, holder: Holder, clock: Callable[[], float], asked_at: float) -> None:
        """`asked_at`: when its creation was asked for. Not when that is known: a driver that is frozen in between would
        think that it holds what its successors have taken over and done with."""
        self._storage, self._holder, self._clock = storage, holder, clock
        self._renewed_at = asked_at
        self._writing = threading.Lock()

    @property
    def epoch(self) -> int:
        return self._holder.epoch

    @property
    def renew_interval_s(self) -> float:
        """Often enough to be seen alive soon and to notice a request to cancel, six times a time to live at least."""
        return min(MAX_RENEW_S, self._holder.ttl_s / 6)

    def check(self) -> None:
        """Raises LeaseLost when the last renewal is older than half the time to live, whatever held it up."""
        silent_s = self._clock() - self._renewed_at
        if silent_s > self._holder.ttl_s / 2:
            where = self._storage.root
            raise LeaseLost(
                f"could not renew the lease on {where} for {silent_s:.0f} s; start it again when the store answers"
            )

    def renew(self) -> None:
        """Raises LeaseLost when another driver took over, or when the store was out of reach for half the lease."""
        try:
            with self._writing:
                self._renew()
        except StorageError as error:
            if self._clock() - self._renewed_at > self._holder.ttl_s / 2:
                raise LeaseLost(f"could not renew the lease on {self._storage.root}: {error}") from error

    def release(self) -> None:
        """The run ended: the next one needs not wait. Does nothing when the lease was lost."""
        try:
            with self._writing:
                self._write(replace(self._holder, has_ended=True))
        except StorageError:
            return  # the next driver waits for the time to live instead; nothing is at stake

    def _renew(self) -> None:
        if self._holder.has_ended:
            return
        asked_at = self._clock()  # others may have seen the beat long before a slow store's reply
        self._check_newer()
        self._write(replace(self._holder, beat=self._holder.beat + 1))
        self._renewed_at = asked_at

    def _check_newer(self) -> None:
        if self._storage.info(make_path(self.epoch + 1)) is not None:
            raise LeaseLost(f"another driver took {self._storage.root} over (epoch {self.epoch + 1})")

    def _write(self, holder: Holder) -> None:
        self._storage.put(make_path(holder.epoch), json.dumps(asdict(holder)).encode())
        self._holder = holder


def acquire(
    storage: Storage,
    ttl_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    on_wait: Callable[[str], None] = lambda _: None,
) -> DriverLease:
    """The lease, after waiting out a silent holder. Raises LeaseHeld when the holder is alive."""
    current = read_holder(storage)
    while True:
        if current is not None:
            _wait_until_silent(storage, current, clock, sleep, on_wait)
        holder = Holder(
            epoch=(current.epoch if current else 0) + 1,
            token=uuid.uuid4().hex,
            machine=get_machine(),
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at=time.time(),
            beat=0,
            ttl_s=ttl_s,
        )
        asked_at = clock()
        if _create(storage, holder):
            return DriverLease(storage, holder, clock, asked_at)
        current = read_holder(storage)


def _create(storage: Storage, holder: Holder) -> bool:
    """Did we win this epoch? After a lost reply the object that is there may be our own."""
    path = make_path(holder.epoch)
    try:
        storage.create(path, json.dumps(asdict(holder)).encode())
    except AlreadyExists:
        try:
            return parse_holder(storage.read_bytes(path)).token == holder.token
        except ValueError:  # nothing that a driver wrote: whoever reads it next refuses it by its name
            return False
    return True


def _wait_until_silent(
    storage: Storage,
    holder: Holder,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    on_wait: Callable[[str], None],
) -> None:
    if holder.has_ended or is_dead_here(holder):
        return
    on_wait(f"the folder was last held by {holder.describe()}; waiting up to {holder.ttl_s:g} s for a sign of life")
    give_up_at = clock() + holder.ttl_s
    while clock() < give_up_at:
        sleep(min(1.0, holder.ttl_s / 6))
        latest = read_holder(storage)
        if latest is None or latest.has_ended or is_dead_here(latest):
            return
        if (latest.epoch, latest.beat) != (holder.epoch, holder.beat):
            raise LeaseHeld(
                f"{storage.root}: another run is working on it: {latest.describe()}; "
                f"wait for it, or stop it with: batchgen cancel {storage.root}"
            )
