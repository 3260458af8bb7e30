"""The only door to Parquet files that are read: always in the calling thread, never in Arrow's.

A thread of Arrow's may still let go of a Python buffer after the call that it worked for has returned; where the
interpreter ends meanwhile, the process aborts and its exit code is lost (pyarrow 26: one in twelve of the runs that were
refused right after reading, on a busy machine). So nothing is decoded in threads and nothing is read ahead in them. Whoever
wants more than one core reads more than one file at a time.
"""

from collections.abc import Iterator, Sequence
from typing import BinaryIO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

Source: TypeAlias = str | BinaryIO | pa.NativeFile


class ParquetFile:
    """One open file. `page_checksums`: pages that have a checksum must match it. Raises Arrow's errors."""

    def __init__(self, source: Source, *, page_checksums: bool = False) -> None:
        self._file = pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=page_checksums)
        self.metadata: pq.FileMetaData = self._file.metadata
        self.schema_arrow: pa.Schema = self._file.schema_arrow
        self.num_row_groups: int = self._file.num_row_groups

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows."""
        return self._file.read(columns=columns and list(columns), use_threads=False)

    def read_row_group(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        return self._file.read_row_group(number, columns=columns and list(columns), use_threads=False)

    def iter_batches(
        self, max_rows: int, columns: Sequence[str] | None = None, row_groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """At most `max_rows` rows each."""
        which = {"columns": columns and list(columns), "row_groups": row_groups and list(row_groups)}
        yield from self._file.iter_batches(max_rows, use_threads=False, **which)


def read_table(source: Source, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a file; the columns in the order asked for. Raises KeyError for one that is not there."""
    parquet = ParquetFile(source)
    if columns is None:
        return parquet.read()
    missing = set(columns) - set(parquet.schema_arrow.names)
    if missing:
        raise KeyError(*sorted(missing))
    return parquet.read(columns).select(list(columns))
