"""Answers of this run's rows, read where other workers have put them: the journal, and shard files. Blocking."""

from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchgen import journal
from batchgen.errors import Damaged, NotFound, OutputError
from batchgen.names import make_data_path
from batchgen.parquet import ParquetFile
from batchgen.queue.claim_table import get_slot
from batchgen.records import Generation, JournalRef, Result, RowId, Slot, Timing, Usage
from batchgen.spec import JobSpec
from batchgen.storage import Storage
from batchgen.worker.result_batch import read_logprobs
from batchgen.worker.shard_footer import read_whole_file
from batchgen.write import make_result_schema

# (the batch that generated it, the answer)
Answer = tuple[str, Result]
KEYS = ("source_row", "sample_index")


class Answers:
    """Of one run. `places` name rows (`queue.claim_table`)."""

    def __init__(self, storage: Storage, spec: JobSpec) -> None:
        self._storage, self._n = storage, spec.sampling.n
        self._schema = make_result_schema(spec)

    def read_segment(self, ref: JournalRef, places: Collection[int]) -> dict[int, Answer | None]:
        """Those that are there, None for an error. A segment that is gone or damaged has none. Raises StorageError."""
        wanted = {get_slot(place, self._n): place for place in places}
        try:
            rows = journal.read_ref(self._storage, ref, self._schema)
        except (NotFound, Damaged):
            return {}
        return self._read(rows.take(find_rows(rows, wanted)), wanted)

    def read_file(self, shard_number: int, places: Collection[int]) -> dict[int, Answer | None]:
        """The same of a committed shard. The file is read whole and its seal looked at. Raises StorageError."""
        path, found = make_data_path(shard_number), dict[int, Answer | None]()
        wanted = {get_slot(place, self._n): place for place in places}
        try:
            data = self._storage.read_bytes(path)
            read_whole_file(data, self._storage.url(path))
        except (NotFound, OutputError):
            return {}
        parquet = ParquetFile(pa.BufferReader(data))
        for group in range(parquet.num_row_groups):
            if len(at := find_rows(parquet.read_row_group(group, KEYS), wanted)):
                rows = parquet.read_row_group(group, self._schema.names).take(at)
                found |= self._read(rows.select(self._schema.names).cast(self._schema), wanted)
        return found

    def _read(self, rows: pa.Table, wanted: Mapping[Slot, int]) -> dict[int, Answer | None]:
        """One row may be there twice."""
        found: dict[int, Answer | None] = {}
        for row in rows.to_pylist():
            place = wanted[row["source_row"], row["sample_index"]]
            found[place] = found.get(place) or make_answer(row)
        return found


def find_rows(keys: pa.Table, wanted: Collection[Slot]) -> pa.Array:
    """Which rows of a table are among these."""
    rows = pa.array({row for row, _ in wanted}, pa.int64())
    near = pc.indices_nonzero(pc.is_in(keys["source_row"], value_set=rows))
    some = keys.take(near)
    slots = zip(near.to_pylist(), some["source_row"].to_pylist(), some["sample_index"].to_pylist(), strict=True)
    return pa.array([at for at, row, sample in slots if (row, sample) in wanted], pa.int64())


def make_answer(row: Mapping[str, Any]) -> Answer | None:
    """A row of results as the worker that generated it had it, but for what was measured; None of one that failed."""
    if row["status"] != "ok":
        return None
    ids = row.get("token_ids")
    generation = Generation(
        text="",
        token_ids=None if ids is None else tuple(ids),
        finish_reason=row["finish_reason"],
        usage=Usage(row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"]),
        logprobs=read_logprobs(row.get("logprobs")),
        tool_calls=row.get("tool_calls"),
    )
    result = Result(
        RowId("", row["source_row"], row["sample_index"]),
        num_attempts=0,
        timing=Timing(),
        generation=generation,
        text=row["text"],
        reasoning=row["reasoning"],
        prompt_tokens=row["prompt_tokens"],
        fingerprint=row["row_fingerprint"],
    )
    return row["reused_from"] or row["batch_id"], result
