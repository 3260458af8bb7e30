"""Answers so far as Arrow, for the journal: one row for each request, its tokens and what the answer will need of its
first part. Pure. What is read back is exactly what was written."""

from collections.abc import Sequence

import pyarrow as pa

from batchgen.records import Partial, Slot
from batchgen.worker.result_batch import make_logprobs, read_logprobs
from batchgen.write import LOGPROBS_TYPE

SCHEMA = pa.schema(
    [
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        ("logprobs", LOGPROBS_TYPE),
        ("cached_tokens", pa.int32()),
        ("ttft_s", pa.float64()),
        ("queued_s", pa.float64()),
    ]
)


def make_partial_rows(found: Sequence[tuple[Slot, Partial]]) -> pa.Table:
    columns = [
        pa.array([row for (row, _), _ in found], pa.int64()),
        pa.array([sample for (_, sample), _ in found], pa.int32()),
        pa.array([partial.token_ids for _, partial in found], pa.list_(pa.int32())),
        make_logprobs([partial.logprobs for _, partial in found]),
        pa.array([partial.cached_tokens for _, partial in found], pa.int32()),
        pa.array([partial.ttft_s for _, partial in found], pa.float64()),
        pa.array([partial.queued_s for _, partial in found], pa.float64()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def read_partial_rows(rows: pa.Table) -> dict[Slot, Partial]:
    """By request; of several of one request the longest."""
    found: dict[Slot, Partial] = {}
    for row in rows.to_pylist():
        slot, token_ids = (row["source_row"], row["sample_index"]), tuple(row["token_ids"])
        known = found.get(slot)
        if token_ids and (known is None or len(known.token_ids) < len(token_ids)):
            logprobs = read_logprobs(row["logprobs"])
            found[slot] = Partial(token_ids, logprobs, row["cached_tokens"], row["ttft_s"], row["queued_s"])
    return found
