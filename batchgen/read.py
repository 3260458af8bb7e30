"""Input Parquet: footers for the plan, rows for a shard. Every read is conditional on the planned version of the file.

A footer that can't be used raises `InputError` with the file's name and the mend. Rows come as Arrow batches under a
byte bound; `decode_rows` turns the few columns that prompts need into Python values, a cell at a time where one of them
can't be decoded. Knows nothing of prompts or specs.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import BatchgenError, InputChanged, InputError
from batchgen.prompt import BadCell
from batchgen.records import InputFile, Shard
from batchgen.storage import FileInfo, open_input

# One decoded batch: small enough for a worker with dozens of open shards, large enough that Arrow's overhead is nil.
BATCH_BYTES = 8 * 2**20
MAX_BATCH_ROWS = 1024
# Behind a footer in plain text of a file with encrypted columns: nonce and tag (Parquet Modular Encryption, 5.2).
# pyarrow 26 aborts the process when such a column's metadata is looked at, so that is no way to find out.
SIGNATURE_BYTES = 28
# Footers are small GETs; the store's latency is the cost, so many at a time.
NUM_FOOTER_THREADS = 32


@dataclass(frozen=True, slots=True)
class Footer:
    """What planning needs of one file. `is_signed`: its footer can be read, but some of its columns are encrypted."""

    file: InputFile
    schema: pa.Schema
    is_signed: bool = False


def read_footer(info: FileInfo) -> Footer:
    """Raises InputError for a file that is not readable Parquet."""
    if info.num_bytes == 0:
        raise InputError(f"{info.path}: is empty (0 bytes), not Parquet; remove it or write it again")
    try:
        with open_input(info.path, info.version) as source:
            parquet = pq.ParquetFile(source)
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
    return Footer(file, schema, is_signed=footer_bytes - metadata.serialized_size == SIGNATURE_BYTES)


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
        return "has a broken or encrypted Parquet footer; write it again, unencrypted"
    return "is not Parquet; convert it, or leave it out of input.paths"


def read_footers(infos: Sequence[FileInfo]) -> list[Footer]:
    """Footers in the order given, read in parallel. Raises the first InputError in that order."""
    with ThreadPoolExecutor(NUM_FOOTER_THREADS, thread_name_prefix="footer") as threads:
        return list(threads.map(read_footer, infos))


def iter_shard(shard: Shard, columns: Sequence[str]) -> Generator[tuple[int, pa.RecordBatch], None, None]:
    """(source_row of the first row, batch) in order, exactly the shard's rows. Raises InputChanged when the file is no
    longer the planned one, InputError when its pages are corrupt."""
    groups, skipped = _groups_of(shard)
    try:
        with open_input(shard.file.path, shard.file.version) as source:
            parquet = pq.ParquetFile(source, pre_buffer="://" in shard.file.path)
            yield from _slice(_iter_groups(parquet, groups, columns), skipped, shard)
    except (pa.ArrowException, OSError) as error:  # Arrow says OSError of a broken page too; a store's errors are ours
        raise InputError(f"{shard.file.path}: rows from {shard.row_start} can't be decoded; write it again") from error


def _groups_of(shard: Shard) -> tuple[list[int], int]:
    """Row groups that hold the shard's rows, and the row number the first of them starts at."""
    groups: list[int] = []
    first_row, start = 0, 0
    for number, rows in enumerate(shard.file.row_group_rows):
        if start + rows > shard.row_start and start < shard.row_end:
            if not groups:
                first_row = start
            groups.append(number)
        start += rows
    return groups, first_row


def _iter_groups(parquet: pq.ParquetFile, groups: list[int], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for number in groups:
        group = parquet.metadata.row_group(number)
        row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
        batch_rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // row_bytes))
        yield from parquet.iter_batches(batch_rows, row_groups=[number], columns=list(columns))


def _slice(batches: Iterator[pa.RecordBatch], row: int, shard: Shard) -> Iterator[tuple[int, pa.RecordBatch]]:
    for batch in batches:
        start, end = max(row, shard.row_start), min(row + batch.num_rows, shard.row_end)
        if start < end:
            yield start, batch.slice(start - row, end - start)
        row += batch.num_rows
        if row >= shard.row_end:
            return
    if row < shard.row_end:
        raise InputChanged(f"{shard.file.path}: holds {row} rows where {shard.file.num_rows} were planned")


def decode_rows(batch: pa.RecordBatch, columns: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a row with the given columns as Python values; BadCell where a cell can't be decoded."""
    decoded = [_decode_column(batch.column(name)) for name in columns]
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*decoded, strict=True)]


def _decode_column(column: pa.Array) -> list[Any]:
    try:
        return [_text(value) for value in column.to_pylist()]
    except (ValueError, OverflowError):
        return [_decode_cell(cell) for cell in column]


def _decode_cell(cell: pa.Scalar) -> Any:
    try:
        return _text(cell.as_py())
    except UnicodeDecodeError:
        return BadCell("is not valid UTF-8")
    except (ValueError, OverflowError):  # a date beyond the year 9999, a struct with a field twice
        return BadCell("has a value that Python can't hold", "bad_value")


def _text(value: Any) -> Any:
    """Parquet files often hold text as plain binary."""
    return value.decode() if isinstance(value, bytes) else value
