"""What results look like as Arrow, and how a shard's Arrow becomes its Parquet file.

`make_result_schema` is what journal and worker hold; `make_output_schema` adds the key and passthrough columns and is
what users read. Each shard file has exactly the shard's rows times n, in input order: `make_output_table` fails loudly
on a row out twice or not at all. The footer says which job, shard and attempt made the file, and the stats of every
batch that has rows in it, and seals the rows (`seal`). Knows nothing of where the bytes go.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from batchgen.batches import BatchStats, FileFooter
from batchgen.records import Lease
from batchgen.spec import JobSpec
from batchgen.worker.seal import write_sealed

FORMAT_VERSION = 1
FOOTER_KEY = b"batchgen"
MAX_ROW_GROUP_ROWS = 16_384
# What is read back may have been changed by anybody: its types are looked at.
_STATS, _FOOTERS = TypeAdapter(BatchStats), TypeAdapter(FileFooter)

LOGPROBS_TYPE = pa.list_(
    pa.struct(
        [
            ("token_id", pa.int32()),
            ("logprob", pa.float32()),
            ("top", pa.list_(pa.struct([("token_id", pa.int32()), ("logprob", pa.float32())]))),
        ]
    )
)
KEY_FIELDS = [
    pa.field("custom_id", pa.string()),
    pa.field("source_file", pa.string(), nullable=False),
    pa.field("source_row", pa.int64(), nullable=False),
    pa.field("sample_index", pa.int32(), nullable=False),
]
ANSWER_FIELDS = [
    pa.field("text", pa.string()),
    pa.field("reasoning", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("prompt_tokens", pa.int64()),
    pa.field("completion_tokens", pa.int64()),
    pa.field("cached_tokens", pa.int64()),
]
OPTIONAL_FIELDS = {
    "logprobs": pa.field("logprobs", LOGPROBS_TYPE),
    "token_ids": pa.field("token_ids", pa.list_(pa.int32())),
    "tool_calls": pa.field("tool_calls", pa.string()),
}
STATUS_FIELDS = [
    pa.field("status", pa.string(), nullable=False),
    pa.field("error_type", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("is_retryable", pa.bool_()),
    pa.field("num_attempts", pa.int32(), nullable=False),
    pa.field("queued_s", pa.float64()),
    pa.field("ttft_s", pa.float64()),
    pa.field("latency_s", pa.float64()),
    pa.field("batch_id", pa.string(), nullable=False),
]


def list_generated_fields(spec: JobSpec) -> list[pa.Field]:
    """Fields that a generation fills, the optional ones where the spec asks for them."""
    asked = {"logprobs": spec.sampling.logprobs is not None or spec.prompt.sampling is not None}
    asked["token_ids"] = spec.output.token_ids
    asked["tool_calls"] = spec.engine.has_tool_calls or spec.prompt.tools is not None
    return [*ANSWER_FIELDS, *(OPTIONAL_FIELDS[name] for name in OPTIONAL_FIELDS if asked[name]), *STATUS_FIELDS]


def make_result_schema(spec: JobSpec) -> pa.Schema:
    """Schema of results before they are joined with their input columns: row and sample, then what was generated."""
    return pa.schema([*KEY_FIELDS[2:], *list_generated_fields(spec)])


def make_output_schema(spec: JobSpec, passthrough: pa.Schema) -> pa.Schema:
    """Schema of `data/*.parquet`. `passthrough` holds the copied input columns with their types."""
    return pa.schema([*KEY_FIELDS, *passthrough, *list_generated_fields(spec)])


def list_reserved_names() -> frozenset[str]:
    """Column names that passthrough columns can't have."""
    return frozenset(field.name for field in [*KEY_FIELDS, *ANSWER_FIELDS, *OPTIONAL_FIELDS.values(), *STATUS_FIELDS])


def make_output_table(results: pa.Table, inputs: pa.Table, lease: Lease, n: int, schema: pa.Schema) -> pa.Table:
    """The shard's rows in input order. `inputs` has one row for each row of the shard, in order (custom_id and
    passthrough). Raises ValueError when any (row, sample) is there twice or not at all."""
    shard = lease.shard
    results = results.sort_by([("source_row", "ascending"), ("sample_index", "ascending")])
    expected = shard.num_rows * n
    slots = pa.array(range(expected), pa.int64())
    rows = pc.divide(slots, n)
    samples = pc.subtract(slots, pc.multiply(rows, n))
    if inputs.num_rows != shard.num_rows or not (
        pc.subtract(results["source_row"], shard.row_start).combine_chunks().equals(rows)
        and pc.cast(results["sample_index"], pa.int64()).combine_chunks().equals(samples)
    ):
        raise ValueError(f"{shard.id}: {results.num_rows} results for {expected} expected; a row is missing or twice")
    taken = inputs if n == 1 else _take(inputs, rows)
    files = pa.repeat(pa.scalar(shard.file.path), expected)
    columns = []
    for field in schema:
        source = files if field.name == "source_file" else (taken if field.name in taken.schema.names else results)
        columns.append(source if source is files else source[field.name].cast(field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _take(inputs: pa.Table, rows: pa.Array) -> pa.Table:
    """Arrow can't take from views; the caller casts them back."""
    large = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    fields = [field.with_type(large.get(field.type, field.type)) for field in inputs.schema]
    return inputs.cast(pa.schema(fields)).take(rows)


def stats_to_json(stats: BatchStats) -> dict[str, Any]:
    """Only what is known: most fields of a lost batch are not."""
    return {name: value for name, value in dataclasses.asdict(stats).items() if value is not None}


def stats_from_json(fields: Mapping[str, Any]) -> BatchStats:
    """Raises ValueError for what is none."""
    return _STATS.validate_python(fields)


def footer_to_json(footer: FileFooter) -> str:
    fields = {field.name: getattr(footer, field.name) for field in dataclasses.fields(footer)}
    return json.dumps({**fields, "batches": [stats_to_json(batch) for batch in footer.batches]})


def footer_from_json(text: str | bytes) -> FileFooter:
    """Raises ValueError for what is none."""
    return _FOOTERS.validate_json(text)


def make_shard_file(table: pa.Table, footer: FileFooter, *, compression_level: int) -> pa.Buffer:
    """The Parquet bytes of a shard file: zstd, row groups small enough to stream, sealed."""
    table = table.replace_schema_metadata({FOOTER_KEY: footer_to_json(footer).encode()})
    return write_sealed(table, row_group_rows=MAX_ROW_GROUP_ROWS, compression_level=compression_level)


def read_file_footer(parquet: pq.ParquetFile) -> FileFooter | None:
    """The footer of a shard file; None when the file is not one of batchgen's."""
    metadata = parquet.schema_arrow.metadata or {}
    return footer_from_json(metadata[FOOTER_KEY]) if FOOTER_KEY in metadata else None


def make_parquet(table: pa.Table) -> pa.Buffer:
    """The bytes of a small Parquet file of ours that is no shard's."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
