"""What a run says of itself while it runs, and what others may ask of it: two small objects in the output folder.

`status.json` is rewritten every few seconds by the driver, with the leases that are open: after the driver's death it
is all that is known of their batches, and all that `batchgen status --watch` needs, on any machine that reads the store.
A driver that wakes up after its successor has spoken doesn't replace its successor's word. `cancel-N.json` asks the run
of epoch N to drain and stop; it means nothing to any other run.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from batchgen.batches import BatchStats
from batchgen.driver.dispatch import Dispatcher
from batchgen.driver.lease import make_cancel_path, read_live_holder
from batchgen.driver.screen import format_line
from batchgen.errors import NotFound, OutputError, StorageError
from batchgen.manifest import LOCK, UNCOMMITTED, read_json
from batchgen.queue.progress import Progress
from batchgen.queue.pulse import Snapshot
from batchgen.queue.work_queue import LostLease
from batchgen.stats import make_lost_stats
from batchgen.storage import Storage
from batchgen.verify.damage import RESTORE, refusing_damage
from batchgen.write import stats_from_json, stats_to_json

STATUS = "_batchgen/status.json"
DAMAGED = "is damaged; delete it: the next run writes it anew"


class StatusWriter:
    """Rewrites the status object at most every `interval_s` seconds. Batches that a killed run left in it are carried
    on until `batch_stats` has them: when a run ends."""

    def __init__(self, storage: Storage, epoch: int, interval_s: float) -> None:
        self._storage, self._epoch, self._interval_s = storage, epoch, interval_s
        self._earlier = read_lost_batches(storage)
        self._next = 0.0

    def update(self, dispatcher: Dispatcher, progress: Progress) -> None:
        """What the run does now, if the last time is long enough ago."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._interval_s
        lost = [
            *self._earlier,
            *(stats for stats in dispatcher.ledger.batches.values() if stats.outcome in UNCOMMITTED),
        ]
        lost += make_open_stats(dispatcher.list_open(), now)
        write_status(self._storage, self._epoch, "running", progress, lost)


def write_status(
    storage: Storage, epoch: int, state: str, progress: Progress, lost: Iterable[BatchStats], message: str | None = None
) -> None:
    """`state`: running, stopped, finished. `lost`: batches that `batch_stats` doesn't have yet. A store that fails now
    keeps what it has: the next word, or the next run, replaces it. A later run's word stands."""
    fields = {
        "epoch": epoch,
        "state": state,
        "message": message,
        "updated_at": time.time(),
        "progress": dataclasses.asdict(progress),
        "lost_batches": [stats_to_json(stats) for stats in lost],
    }
    with contextlib.suppress(StorageError):  # AlreadyExists and Conflict too: another's word came in between
        version = find_own_version(storage, epoch)
        data = json.dumps(fields, ensure_ascii=False).encode()
        if version is None:
            storage.create(STATUS, data)
        elif version:
            storage.replace(STATUS, data, version)


def find_own_version(storage: Storage, epoch: int) -> str | None:
    """The version to be replaced by the run of this epoch; None where none stands, "" where a later run's does. What can't
    be read is replaced."""
    try:
        data, version = storage.read_versioned(STATUS)
    except NotFound:
        return None
    try:
        later = json.loads(data)["epoch"] > epoch
    except (ValueError, KeyError, TypeError, RecursionError):
        later = False
    return "" if later else version


def read_status(storage: Storage) -> dict[str, Any] | None:
    return read_json(storage, STATUS)


def read_lost_batches(storage: Storage) -> list[BatchStats]:
    """Batches that runs lost or left open and that `batch_stats` may not have yet, as the last run said last."""
    status = read_status(storage)
    with refusing_damage(storage.url(STATUS), DAMAGED):
        return [stats_from_json(fields) for fields in status["lost_batches"]] if status else []


def make_open_stats(open_leases: list[LostLease], now: float) -> list[BatchStats]:
    """Open leases as the lost batches they will be if the driver dies now. Their wall time is not known then."""
    return [
        make_lost_stats(lost.lease.batch_id, started_at=time.time() - (now - lost.started_at)) for lost in open_leases
    ]


def find_lock(storage: Storage) -> Storage:
    """Where the lease of this folder lies: in it, or at the lock URL that its last run wrote down."""
    lock = read_json(storage, LOCK)
    with refusing_damage(storage.url(LOCK), f"is damaged; {RESTORE}"):
        return storage if lock is None else Storage(lock["root"])


def request_cancel(storage: Storage) -> int:
    """Ask the run that holds the folder to stop; its epoch. Raises OutputError when none is running."""
    holder = read_live_holder(find_lock(storage))
    if holder is None:
        raise OutputError(f"{storage.root}: no run is working on it, nothing to cancel; see batchgen status OUT")
    storage.put(make_cancel_path(holder.epoch), json.dumps({"requested_at": time.time()}).encode())
    return holder.epoch


@dataclass(frozen=True, slots=True)
class RunStatus:
    """What is known of the last run on a folder. `heads`: lines for people. `is_over`: nothing will come any more."""

    heads: list[str]
    progress: Snapshot
    is_over: bool


def read_run_status(storage: Storage, status: dict[str, Any]) -> RunStatus:
    """Is the run alive, and how far did it get. Raises OutputError where the object is damaged."""
    holder = read_live_holder(find_lock(storage))
    who = [] if holder is None else [f"held by {holder.describe()}"]
    with refusing_damage(storage.url(STATUS), DAMAGED):
        age_s = time.time() - status["updated_at"]
        state = "ended without a word" if holder is None and status["state"] == "running" else status["state"]
        progress = TypeAdapter(Snapshot).validate_python(status["progress"])
        first = f"{state}, epoch {status['epoch']}, {age_s:.0f} s ago" + (
            f": {status['message']}" if status["message"] else ""
        )
        format_line(progress)  # what can't be shown is damaged
        return RunStatus([first, *who], progress, is_over=state != "running")


def describe_status(storage: Storage, status: dict[str, Any]) -> list[str]:
    """The status as lines for people."""
    found = read_run_status(storage, status)
    return [*found.heads, format_line(found.progress)]
