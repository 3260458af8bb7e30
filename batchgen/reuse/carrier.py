"""Requests that an earlier output has an answer to become finished rows before anything is sent. Blocking."""

import threading
from collections.abc import Sequence
from typing import TypeVar

import pyarrow as pa

from batchgen.names import make_reused_id
from batchgen.records import Lease, Request, Result
from batchgen.reuse.outputs import EarlierOutputs
from batchgen.spec import JobSpec
from batchgen.write import make_result_schema

PreparedT = TypeVar("PreparedT", bound=Request | Result)


class Carrier:
    """Of one worker; any thread. `open` reads the index, which takes a while; it raises what that does."""

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self._lock = threading.Lock()

    def open(self) -> None:
        self._outputs = EarlierOutputs(self._spec.input.reuse_from, make_result_schema(self._spec))

    def take(self, lease: Lease, prepared: Sequence[PreparedT]) -> tuple[pa.Table, list[PreparedT]]:
        """(rows of the lease that need no engine, what is left). Raises StorageError, OutputError."""
        asking = [(place, item) for place, item in enumerate(prepared) if isinstance(item, Request)]
        known = [(place, item, item.fingerprint) for place, item in asking if item.fingerprint is not None]
        if not known:
            return make_result_schema(self._spec).empty_table(), list(prepared)
        with self._lock:
            numbers, rows = self._outputs.take([fingerprint for *_, fingerprint in known])
        taken = {known[number][0] for number in numbers}
        row_ids = [known[number][1].row_id for number in numbers]
        left = [item for place, item in enumerate(prepared) if place not in taken]
        return _settle(rows, lease, [row_id.slot for row_id in row_ids]), left


def _settle(rows: pa.Table, lease: Lease, slots: Sequence[tuple[int, int]]) -> pa.Table:
    """The rows in their new places."""
    own = {
        "source_row": [row for row, _ in slots],
        "sample_index": [sample for _, sample in slots],
        "batch_id": [make_reused_id(lease.batch_id)] * len(slots),
    }
    for name, values in own.items():
        place = rows.schema.get_field_index(name)
        field = rows.schema.field(place)
        rows = rows.set_column(place, field, pa.array(values, field.type))
    return rows
