"""Which requests of a shard another worker is to generate: one small JSON object in the store, written by the shard's
owner, read by its helper.

It lies beside the journal and goes when the share has ended, or with the next run: what a helper generated is in its
journal segments, so a handoff that is left means nothing.
"""

import json
from collections.abc import Sequence

from batchgen import journal
from batchgen.errors import AlreadyExists, Damaged
from batchgen.records import Slot
from batchgen.storage import Storage
from batchgen.verify.damage import refusing_damage

SUFFIX = ".handoff.json"


def make_handoff_path(batch_id: str) -> str:
    """Of the share that is this batch."""
    return f"{journal.FOLDER}/{batch_id}{SUFFIX}"


def write_handoff(storage: Storage, batch_id: str, slots: Sequence[Slot]) -> None:
    """Raises StorageError; then nobody may be told of it."""
    path, data = make_handoff_path(batch_id), json.dumps({"batch_id": batch_id, "slots": slots}).encode()
    try:
        storage.create(path, memoryview(data))
    except AlreadyExists:
        if storage.read_bytes(path) != data:  # else ours, after a lost reply: a batch id is used once
            raise


def read_handoff(storage: Storage, batch_id: str) -> list[Slot]:
    """Raises NotFound, or Damaged for what is none."""
    path = make_handoff_path(batch_id)
    data = storage.read_bytes(path)
    with refusing_damage(storage.url(path), "is a damaged handoff; remove it", Damaged):
        return [(int(row), int(sample)) for row, sample in json.loads(data)["slots"]]


def list_handoffs(storage: Storage) -> list[str]:
    return [info.path for info in storage.list_files(journal.FOLDER, suffix=SUFFIX)]
