"""A create that is sent again makes no second batch. Blocking.

The SDK sends a create again when it timed out, with `x-stainless-retry-count` and no key. So each create notes, before
anything else, which batch it is about to make; a repeated one takes that batch over, and makes it where the first try did
not come so far. With an `Idempotency-Key` every create of that key is such a repetition.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from batchgen.errors import AlreadyExists, Conflict, NotFound
from batchgen.serve.errors import bad_request
from batchgen.serve.ids import make_digest
from batchgen.serve.state import State, make_once_path

# Ten minutes is the SDK's own time-out; it tries twice more.
REPEAT_S = 45 * 60.0
KEY_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Note:
    """`by_repeat`: the first try was not seen yet, and may still come."""

    batch_id: str
    made_at: float
    body: str
    by_repeat: bool


def choose_batch_id(state: State, tenant: str, body: str, new_id: str, *, key: str | None, is_repeat: bool) -> str:
    """The id of the batch that this create is to make, or has made. Raises ApiError for a key with another body."""
    path, now = _make_path(tenant, body, key), state.now()
    note = Note(new_id, now, make_digest(body), is_repeat)
    while True:
        try:
            data, version = state.storage.read_versioned(path)
        except NotFound:
            try:
                state.storage.create(path, _dump(note))
            except AlreadyExists:
                continue
            return new_id
        known = Note(**json.loads(data))
        is_fresh = _is_fresh(known, key, now)
        if key is not None and is_fresh and known.body != note.body:
            raise bad_request("this Idempotency-Key was used with another body", None, "idempotency_key_reused")
        if is_fresh and (key is not None or is_repeat):
            return known.batch_id
        # The first try is seen now; whoever creates the same once more means another batch.
        following = replace(known, by_repeat=False) if is_fresh and known.by_repeat else note
        try:
            state.storage.replace(path, _dump(following), version)
        except Conflict:
            continue
        return following.batch_id


def find_batch_id(state: State, tenant: str, body: str, *, key: str | None) -> str | None:
    """Of the batch that such a create made before. Notes nothing."""
    try:
        known = Note(**json.loads(state.storage.read_bytes(_make_path(tenant, body, key))))
    except NotFound:
        return None
    return known.batch_id if known.body == make_digest(body) and _is_fresh(known, key, state.now()) else None


def _make_path(tenant: str, body: str, key: str | None) -> str:
    return make_once_path(tenant, make_digest("key", key) if key is not None else make_digest("body", body))


def _is_fresh(note: Note, key: str | None, now: float) -> bool:
    return now - note.made_at < (REPEAT_S if key is None else KEY_S)


def delete_old_notes(state: State, say: Callable[[str], None]) -> None:
    for info in state.storage.list_files("once", suffix=".json"):
        try:
            note = Note(**json.loads(state.storage.read_bytes(info.path)))
        except NotFound:
            continue
        except (ValueError, TypeError):
            say(f"{state.storage.url(info.path)}: is damaged; delete it")
            continue
        if state.now() - note.made_at > KEY_S + REPEAT_S:
            state.storage.delete(info.path)


def _dump(note: Note) -> bytes:
    fields = {name: getattr(note, name) for name in ("batch_id", "made_at", "body", "by_repeat")}
    return json.dumps(fields).encode()
