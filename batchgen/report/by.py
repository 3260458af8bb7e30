"""Figures of a job by the values of a column: of its batches where batch_stats knows the column, else of its rows.

A column of batches (`worker`, `node`, `shard`, `attempt`, `epoch`, `outcome`, `engine_version`, ...; `source_file` by the
plan) costs nothing but batch_stats, and latencies come from merged sketches, right to 1 %. A column of rows (one passed
through, `finish_reason`, `status`, ...) is read from data/: that column, tokens and latencies of every row, a row
group at a time; latencies are sketched in the same way.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchgen import manifest
from batchgen.batch_stats import STATS_SCHEMA
from batchgen.errors import InputError
from batchgen.parquet import ParquetFile
from batchgen.report.distributions import make_latency
from batchgen.stats import SKETCH_FIELDS, count_rows, make_sketches, parse_sketches, total
from batchgen.storage import Storage
from batchgen.verify.damage import RESTORE, refusing_damage

# Not columns of batches that one groups by: figures, and lists.
_FIGURES = {"started_at", "window", "num_gpus", "format_version", "lengths"}
ROW_COLUMNS = ["status", "is_retryable", "prompt_tokens", "completion_tokens", "queued_s", "ttft_s", "latency_s"]
MAX_GROUPS = 10_000
NUM_READERS = 8


def list_batch_columns() -> list[str]:
    kinds = {field.name: field.type for field in STATS_SCHEMA if field.name not in _FIGURES}
    plain = [name for name, kind in kinds.items() if pa.types.is_string(kind)]
    return ["source_file", *plain, "attempt", "epoch"]


def group_batches(table: pa.Table, column: str) -> list[dict[str, Any]]:
    """One value a group, the most rows first. `table` has the column, whatever it is. Rows of superseded batches are in no
    file: they are left out, unless outcomes are asked for."""
    if column != "outcome" and "outcome" in table.column_names:
        table = table.filter(pc.not_equal(table["outcome"], "superseded"))
    groups = pc.unique(table[column]).to_pylist()
    _check_count(column, len(groups))
    return _order([_describe(table.filter(_is(table[column], value)), value) for value in groups])


def _is(column: pa.ChunkedArray, value: Any) -> pa.ChunkedArray:
    return pc.is_null(column) if value is None else pc.equal(column, pa.scalar(value, column.type))


def _order(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(groups, key=lambda group: (-(group["num_rows_ok"] or 0), str(group["value"])))


def _check_count(column: str, count: int) -> None:
    if count > MAX_GROUPS:
        raise InputError(f"--by {column}: has more than {MAX_GROUPS:,} values; group by one with fewer, or ask DuckDB")


def _describe(batches: pa.Table, value: Any) -> dict[str, Any]:
    names = ("num_rows_ok", "num_rows_error", "prompt_tokens", "completion_tokens")
    return {"value": value, **{name: total(batches[name]) for name in names}, "latency": make_latency(batches)}


def add_source_files(table: pa.Table, storage: Storage) -> pa.Table:
    """With the input file of each batch's shard. Raises OutputError where the plan is damaged."""
    plan = manifest.read_plan(storage)
    files = {shard.id: shard.file.path for shard in (plan[2] if plan is not None else ())}
    found = [files.get(shard) for shard in table["shard"].to_pylist()]
    return table.append_column("source_file", pa.array(found, pa.string()))


# ---- rows ------------------------------------------------------------------------------------------------------------


def group_rows(storage: Storage, column: str) -> list[dict[str, Any]]:
    """The same figures of a column of data/. Raises InputError where no file has it, or all of them too many values."""
    paths = [info.path for info in storage.list_files("data", suffix=".parquet")]
    parts: list[tuple[dict[str, Any], dict[str, str]]] = []
    values: set[str | None] = set()
    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="by") as threads:
        for found in threads.map(lambda path: _describe_file(storage, path, column), paths):
            parts += found
            values.update(part["value"] for part, _ in found)
            _check_count(column, len(values))  # now, not when the parts of every file are held
    if not parts:
        return []
    table = pa.Table.from_pylist([part for part, _ in parts], schema=_PART_SCHEMA)
    for name, field in SKETCH_FIELDS.items():
        table = table.append_column(field, parse_sketches([sketches[name] for _, sketches in parts]))
    return group_batches(table, "value")


_PART_SCHEMA = pa.schema(
    [("value", pa.string())]
    + [(name, pa.int64()) for name in ("num_rows_ok", "num_rows_error", "prompt_tokens", "completion_tokens")]
)


def _describe_file(storage: Storage, path: str, column: str) -> list[tuple[dict[str, Any], dict[str, str]]]:
    with refusing_damage(storage.url(path), f"is damaged; {RESTORE}"), storage.open_read(path) as source:
        parquet = ParquetFile(source)
        names = parquet.schema_arrow.names
        if column not in names:
            known = ", ".join(dict.fromkeys([*list_batch_columns(), *names]))
            raise InputError(f"--by {column}: neither batch_stats nor data/ has such a column; name one of {known}")
        return [part for rows, values in _iter_groups(parquet, column) for part in _describe_rows(rows, values, column)]


def _iter_groups(parquet: ParquetFile, column: str) -> Iterator[tuple[pa.Table, pa.ChunkedArray]]:
    """Of each row group its figures, and the values that it is grouped by, as text."""
    names = [*ROW_COLUMNS, *([column] if column not in ROW_COLUMNS else [])]
    for number in range(parquet.num_row_groups):
        rows = parquet.read_row_group(number, columns=names)
        kind = rows[column].type
        if pa.types.is_nested(kind) or pa.types.is_binary(kind):
            raise InputError(f"--by {column}: is {kind}; group by a column of text, numbers or times")
        yield rows, pc.cast(rows[column], pa.string())


def _describe_rows(
    rows: pa.Table, values: pa.ChunkedArray, column: str
) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    found = pc.unique(values).to_pylist()
    _check_count(column, len(found))
    for value in found:
        mine = rows.filter(_is(values, value))
        counts = {name: total(mine[name]) for name in ("prompt_tokens", "completion_tokens")}
        yield {"value": value, **count_rows(mine), **counts}, make_sketches(mine)
