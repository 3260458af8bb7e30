"""What can this store do? Found out by doing it, under `_batchgen/`, before anything depends on it.

One creator after the other proves nothing: a store may look first and write later, or ignore the header and still
answer 412 now and then. So eight creators race for one name, several times over, and each time exactly one must win
and the object must hold the winner's bytes. A pass is strong evidence, not proof. Cleans up after itself.
"""

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from batchgen.errors import AlreadyExists, Conflict, OutputError, StorageError
from batchgen.storage import Storage
from batchgen.stores.base import error_code, is_unsupported

FOLDER: Final = "_batchgen/probe"
_NUM_CREATORS: Final = 8
_NUM_RACES: Final = 4
_MAX_UNDECIDED: Final = 3


@dataclass(frozen=True, slots=True)
class StoreAbilities:
    """`reason`: one sentence when something is missing, else None."""

    is_exclusive: bool
    can_replace: bool
    reason: str | None


def probe(storage: Storage) -> StoreAbilities:
    """Costs about 50 small requests. OutputError when nothing can be written, read back and deleted there at all."""
    bare = Storage(storage.root)
    prefix = f"{FOLDER}/{uuid.uuid4().hex}"
    try:
        bare.delete_leftovers(time.time())
        _check_usable(bare, f"{prefix}-plain")
        missing = [_find_race_fault(bare, prefix), _find_replace_fault(bare, f"{prefix}-replaced")]
        bare.delete_many(info.path for info in bare.list_files(FOLDER) if info.path.startswith(prefix))
    except StorageError as error:
        raise OutputError(f"{storage.root} can't be the output folder: {error}") from error
    reasons = [reason for reason in missing if reason]
    return StoreAbilities(missing[0] is None, missing[1] is None, "; ".join(reasons) or None)


def _check_usable(storage: Storage, path: str) -> None:
    content = uuid.uuid4().bytes
    storage.put(path, content)
    listed = [info.path for info in storage.list_files(path.rpartition("/")[0])]
    if storage.read_bytes(path) != content or path not in listed:
        raise StorageError(f"{storage.url(path)} was written and is not found again; use a store that is consistent")


def _find_race_fault(storage: Storage, prefix: str) -> str | None:
    undecided = 0
    races = 0
    while races < _NUM_RACES:
        path = f"{prefix}-race-{races}-{undecided}"
        entries = [uuid.uuid4().bytes for _ in range(_NUM_CREATORS)]
        outcomes = _race(storage, path, entries)
        if failed := next((outcome for outcome in outcomes if isinstance(outcome, StorageError)), None):
            return _fault_of(failed, "create-if-absent")
        winners = [entry for entry, outcome in zip(entries, outcomes, strict=True) if outcome is True]
        # A winner whose reply was lost sees its own object when it asks again, and then nobody seems to have won.
        if not winners and undecided < _MAX_UNDECIDED:
            undecided += 1
            continue
        if len(winners) != 1 or storage.read_bytes(path) != winners[0]:
            return f"{len(winners)} of {_NUM_CREATORS} writers were each told that they created the same object"
        races += 1
    return None


def _race(storage: Storage, path: str, entries: list[bytes]) -> list[bool | StorageError]:
    """True for who won, False for who was refused, an error for who failed."""
    start = threading.Barrier(len(entries))

    def enter(entry: bytes) -> bool | StorageError:
        start.wait()
        return _try(lambda: storage.create(path, entry))

    with ThreadPoolExecutor(len(entries), "probe") as pool:
        return list(pool.map(enter, entries))


def _try(write: Callable[[], str]) -> bool | StorageError:
    try:
        write()
    except (AlreadyExists, Conflict):
        return False
    except StorageError as error:
        return error
    return True


def _find_replace_fault(storage: Storage, path: str) -> str | None:
    if not storage.has_atomic_replace:
        return "this kind of store has no replace-if-unchanged"
    first = storage.put(path, b"first")
    accepted = _try(lambda: storage.replace(path, b"second", first))
    refused = _try(lambda: storage.replace(path, b"third", first))
    for outcome in (accepted, refused):
        if isinstance(outcome, StorageError):
            return _fault_of(outcome, "replace-if-unchanged")
    if refused or storage.read_bytes(path) == b"third":
        return "an object was replaced though the version asked for was gone"
    return None if accepted else "an object could not be replaced though the version asked for was there"


def _fault_of(error: StorageError, what: str) -> str:
    """A plain write worked a moment ago. Anything but a refusal of the condition is trouble of another kind."""
    if not is_unsupported(error):
        raise error
    return f"the store refuses {what} ({error_code(error) or type(error.__cause__).__name__})"
