"""The pointer to the newest whole run: `latest.json`, one object, replaced in one piece and never by an older date's.

Readers open it and read the outputs that it names: a whole run, or the one before. Beside it `dates/KEY.json` names the
outputs of each run that stands.
"""

import json
from typing import Any

from batchgen.errors import AlreadyExists, Conflict, NotFound, OutputError
from batchgen.storage import Storage

LATEST = "latest.json"
DATES = "dates"


def make_date_path(key: str) -> str:
    return f"{DATES}/{key}.json"


def publish(storage: Storage, key: str, value: dict[str, Any]) -> bool:
    """Does `latest.json` name this run now? Not where a newer date is published. Doing it again changes nothing."""
    data = json.dumps({**value, "run": key}, ensure_ascii=False, indent=1).encode()
    storage.put(make_date_path(key), data)
    while True:
        try:
            current, version = storage.read_versioned(LATEST)
        except NotFound:
            current, version = b"", ""
        if current and _read_key(storage, current) > key:
            return False
        try:
            if version:
                storage.replace(LATEST, data, version)
            else:
                storage.create(LATEST, data)
        except (AlreadyExists, Conflict):
            continue  # another run published in between: look at its date
        return True


def unpublish(storage: Storage, key: str) -> None:
    """Name its outputs no longer; `latest.json` is left to newer dates."""
    storage.delete(make_date_path(key))


def read_published(storage: Storage) -> str | None:
    """The key of the run that readers are given. Raises OutputError where the pointer is damaged."""
    try:
        return _read_key(storage, storage.read_bytes(LATEST))
    except NotFound:
        return None


def _read_key(storage: Storage, raw: bytes) -> str:
    try:
        return str(json.loads(raw)["run"])
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{storage.url(LATEST)}: is no pointer of a pipeline; move it away") from error
