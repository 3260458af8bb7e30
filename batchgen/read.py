"""Input Parquet: footers for the plan, rows for a shard. Every read is conditional on the planned version of the file.

A footer that can't be used raises `InputError` with the file's name and the mend. Rows come as Arrow batches under a
byte bound, or as `Unreadable` where their pages are corrupt; `decode_rows` turns the few columns that prompts need into
Python values, a cell at a time where one of them can't be decoded. Knows nothing of prompts or specs.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import BatchgenError, InputChanged, InputError
from batchgen.parquet import ParquetFile
from batchgen.prompt import BadCell, Integers
from batchgen.records import InputFile, Shard
from batchgen.storage import FileInfo, open_input

# One batch: few enough rows that the first ones reach the engine at once, and that their prompts and token ids are small
# beside what is in flight. Decoding 64 rows at a time costs 1 us a row, 1,024 at a time 0.1 us.
BATCH_BYTES = 2**20
MAX_BATCH_ROWS = 64
# Behind a footer in plain text of a file with encrypted columns: nonce and tag (Parquet Modular Encryption, 5.2).
# pyarrow 26 aborts the process when such a column's metadata is looked at, so that is no way to find out.
SIGNATURE_BYTES = 28
# What Arrow raises of bytes that are not what they should be. ArrowMemoryError is one too, and no fault of the file's.
ARROW_ERRORS = (pa.ArrowException, OSError)
# Footers are small GETs; the store's latency is the cost, so many at a time.
NUM_FOOTER_THREADS = 32


@dataclass(frozen=True, slots=True)
class Footer:
    """What planning needs of one file. `is_signed`: its footer can be read, but some of its columns are encrypted.
    `row_group_bytes`: what the columns asked about take in each row group, decoded; None where that can't be told."""

    file: InputFile
    schema: pa.Schema
    is_signed: bool = False
    row_group_bytes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Rows of which there is no batch: their pages are corrupt."""

    num_rows: int
    reason: str


Rows: TypeAlias = pa.RecordBatch | Unreadable


def read_footer(info: FileInfo, columns: Sequence[str] = ()) -> Footer:
    """`columns`: those whose size is asked about. Raises InputError for a file that is not readable Parquet."""
    if info.num_bytes == 0:
        raise InputError(f"{info.path}: is empty (0 bytes), not Parquet; remove it or write it again")
    try:
        with open_input(info.path, info.version) as source:
            parquet = ParquetFile(source)
            metadata, schema = parquet.metadata, parquet.schema_arrow
            source.seek(info.num_bytes - 8)
            footer_bytes = int.from_bytes(source.read(4), "little")
    except BatchgenError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{info.path}: {_why_unreadable(info)}") from error
    groups = tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
    # The sum, not the file's own total: some writers leave that at 0, and readers go by the groups.
    file = InputFile(info.path, info.num_bytes, info.version, sum(groups), groups)
    is_signed = footer_bytes - metadata.serialized_size == SIGNATURE_BYTES
    return Footer(file, schema, is_signed, None if is_signed else _measure_groups(metadata, columns))


def _measure_groups(metadata: pq.FileMetaData, columns: Sequence[str]) -> tuple[int, ...] | None:
    """Decoded bytes of these columns, leaves of nested ones included, in each row group."""
    if not columns or metadata.num_row_groups == 0:
        return None
    paths = [metadata.row_group(0).column(number).path_in_schema for number in range(metadata.num_columns)]
    wanted = [number for number, path in enumerate(paths) if path.partition(".")[0] in columns or path in columns]
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    return tuple(sum(group.column(number).total_uncompressed_size for number in wanted) for group in groups)


def _why_unreadable(info: FileInfo) -> str:
    """Tells encrypted, truncated and foreign files apart by the magic numbers at both ends."""
    with open_input(info.path, info.version) as source:
        head = source.read(4)
        source.seek(max(0, info.num_bytes - 4))
        tail = source.read(4)
    if b"PARE" in (head, tail):
        return "has an encrypted footer, which is not supported; decrypt it first"
    if head == b"PAR1" and tail != b"PAR1":
        return "is truncated (no Parquet footer at its end); write or copy it again"
    if head == b"PAR1":
        # pyarrow makes the schema while it opens the file, so the two can't be told apart.
        return "has a broken or encrypted Parquet footer, or types that Arrow refuses; write it again, unencrypted"
    return "is not Parquet; convert it, or leave it out of input.paths"


def read_footers(infos: Sequence[FileInfo], columns: Sequence[str] = ()) -> list[Footer]:
    """Footers in the order given, read in parallel. Raises the first InputError in that order."""
    with ThreadPoolExecutor(NUM_FOOTER_THREADS, thread_name_prefix="footer") as threads:
        return list(threads.map(lambda info: read_footer(info, columns), infos))


def iter_shard(
    shard: Shard, columns: Sequence[str], *, max_rows: int = MAX_BATCH_ROWS
) -> Generator[tuple[int, Rows], None, None]:
    """(source_row of the first row, at most `max_rows` of them) in order, exactly the shard's rows. What follows a
    corrupt page in its row group is Unreadable. Raises InputChanged when the file is no longer the planned one."""
    groups, first_row = _groups_of(shard)
    with open_input(shard.file.path, shard.file.version) as source:
        try:
            # Pages that have a checksum must match it: else flipped bits would go to the engine as a prompt.
            parquet = ParquetFile(source, page_checksums=True)
        except ARROW_ERRORS as error:
            if isinstance(error, MemoryError):
                raise
            raise InputError(f"{shard.file.path}: its footer can't be read; write it again") from error
        for row, rows in _cut(_iter_groups(parquet, groups, columns, max_rows), first_row, shard):
            step = _count_rows(rows, max_rows)
            for start in range(0, rows.num_rows, step):
                yield row + start, _slice(rows, start, step)


def iter_batches(
    shard: Shard, columns: Sequence[str], *, max_rows: int = MAX_BATCH_ROWS
) -> Generator[tuple[int, pa.RecordBatch], None, None]:
    """As `iter_shard`, where every row must be there: raises InputError for the first that is Unreadable."""
    for row, rows in iter_shard(shard, columns, max_rows=max_rows):
        if isinstance(rows, Unreadable):
            raise InputError(f"{shard.file.path} row {row}: {rows.reason}; write the file again")
        yield row, rows


def _groups_of(shard: Shard) -> tuple[list[int], int]:
    """Row groups that hold the shard's rows, and the row number the first of them starts at."""
    borders = list(accumulate(shard.file.row_group_rows))
    first, last = bisect_right(borders, shard.row_start), bisect_left(borders, shard.row_end)
    return list(range(first, last + 1)), borders[first - 1] if first else 0


def _iter_groups(parquet: ParquetFile, groups: list[int], columns: Sequence[str], max_rows: int) -> Iterator[Rows]:
    """All rows of the groups. Behind a corrupt page the rest of its group is given up: pages can't be skipped."""
    for number in groups:
        group = parquet.metadata.row_group(number)
        left = group.num_rows
        # The size that the footer tells is that of values stored once, however many rows share them: the real one is
        # known when few rows were decoded only.
        row_bytes = max(1, group.total_byte_size // max(1, left))
        try:
            for batch in parquet.iter_batches(
                max(1, min(max_rows, BATCH_BYTES // row_bytes)), row_groups=[number], columns=list(columns)
            ):
                left -= batch.num_rows
                yield batch
        except ARROW_ERRORS as error:  # OSError is said of broken pages too; a store's errors are ours
            if isinstance(error, MemoryError):
                raise
            yield Unreadable(left, f"row group {number} can't be decoded from here on ({type(error).__name__})")
        else:
            if left > 0:
                yield Unreadable(left, f"row group {number} holds fewer rows than the footer says")


def _cut(groups: Iterator[Rows], row: int, shard: Shard) -> Iterator[tuple[int, Rows]]:
    """What of the rows from number `row` on is the shard's."""
    for rows in groups:
        start, end = max(row, shard.row_start), min(row + rows.num_rows, shard.row_end)
        if start < end:
            yield start, _slice(rows, start - row, end - start)
        row += rows.num_rows
        if row >= shard.row_end:
            return
    if row < shard.row_end:
        raise InputChanged(f"{shard.file.path}: holds {row} rows where {shard.file.num_rows} were planned")


def _slice(rows: Rows, start: int, num_rows: int) -> Rows:
    if isinstance(rows, Unreadable):
        return Unreadable(min(num_rows, rows.num_rows - start), rows.reason)
    return rows.slice(start, num_rows)


def _count_rows(rows: Rows, max_rows: int) -> int:
    """How many rows at a time keep to both bounds, by what they take decoded."""
    if isinstance(rows, Unreadable):
        return max_rows
    fitting: int = rows.num_rows * BATCH_BYTES // max(1, rows.nbytes)
    return max(1, min(max_rows, fitting))


def decode_rows(batch: pa.RecordBatch, columns: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a row with the given columns as Python values; BadCell where a cell can't be decoded."""
    decoded = [_decode_column(batch.column(name)) for name in columns]
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*decoded, strict=True)]


def pick_rows(batch: pa.RecordBatch, indices: Sequence[int]) -> pa.RecordBatch:
    """These rows of the batch, in the order given; of its memory where they are neighbours."""
    if list(indices) == list(range(indices[0], indices[0] + len(indices))):
        return batch.slice(indices[0], len(indices))
    try:
        return batch.take(pa.array(indices))
    except pa.ArrowNotImplementedError:  # Arrow can't take from views, however deep they lie
        rows = pa.Table.from_batches([batch.slice(index, 1) for index in indices])
        return rows.combine_chunks().to_batches()[0]


def _decode_column(column: pa.Array) -> list[Any]:
    if _holds_integers(column):
        return [None if ids is None else Integers(ids) for ids in column.to_pylist()]
    as_text = _nested_text if _holds_bytes(column.type) else _text
    try:
        return [as_text(value) for value in column.to_pylist()]
    except (ValueError, OverflowError):
        return [_decode_cell(cell, as_text) for cell in column]


def _decode_cell(cell: pa.Scalar, as_text: Callable[[Any], Any]) -> Any:
    try:
        return as_text(cell.as_py())
    except UnicodeDecodeError:
        return BadCell("is not valid UTF-8")
    except (ValueError, OverflowError):  # a date beyond the year 9999, a struct with a field twice
        return BadCell("has a value that Python can't hold", "bad_value")


def _holds_bytes(kind: pa.DataType) -> bool:
    """Is there binary inside lists or structs? Else their values, long lists of ids mostly, need no second look."""
    inner = [kind.field(number).type for number in range(kind.num_fields)] if pa.types.is_nested(kind) else []
    return any(is_binary(child) or _holds_bytes(child) for child in inner)


def is_binary(kind: pa.DataType) -> bool:
    """Bytes of any length."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind)) or kind == pa.binary_view()


def _holds_integers(column: pa.Array) -> bool:
    """Nothing but lists of integers, none of them null? As `Integers` they are a copy each; a look at every id costs four
    times as much."""
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    return bool(is_list and pa.types.is_integer(column.type.value_type) and column.values.null_count == 0)


def _nested_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_nested_text(item) for item in value]
    if isinstance(value, dict):
        return {name: _nested_text(item) for name, item in value.items()}
    return _text(value)


def _text(value: Any) -> Any:
    """Parquet files often hold text as plain binary."""
    return value.decode() if isinstance(value, bytes) else value
