"""Which rows go on to the next stage: one DuckDB SQL expression over the columns of the former stage's output.

Read and written through our own storage, a shard file at a time; DuckDB sees Arrow tables and no files. What came of a file
is created if absent, so a run that is started again reads the very rows that its plan was made of.
"""

import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import pyarrow as pa

from batchgen.errors import AlreadyExists, InputError, SpecError
from batchgen.parquet import read_table
from batchgen.pipelines.graph import FILTERED
from batchgen.spec import JobSpec
from batchgen.storage import Storage
from batchgen.write import make_output_schema, make_parquet

# A column that is passed through has the type that the input gives it, known only once there is one.
_GUESSES = (pa.string(), pa.int64(), pa.float64(), pa.bool_(), pa.timestamp("us"))
_MAX_GUESSED = 4


def connect() -> Any:
    """A DuckDB in memory that can open no file and no URL. Raises SpecError where it is not installed."""
    try:
        import duckdb
    except ModuleNotFoundError as error:
        raise SpecError("a filter between stages needs DuckDB; pip install 'batchgen[pipelines]'") from error
    return duckdb.connect(config={"enable_external_access": "false", "threads": "1"})


def check_filter(expression: str, source: JobSpec) -> None:
    """Can it be an expression over the output of this job? Raises ValueError, SpecError. Columns that are passed through
    pass with any type with which it can be."""
    names = source.input.passthrough
    known = make_output_schema(source, pa.schema([]))
    guessed = [name for name in names if re.search(rf"\b{re.escape(name)}\b", expression)][:_MAX_GUESSED]
    rest = [pa.field(name, pa.string()) for name in names if name not in guessed]
    error: ValueError | None = None
    for kinds in product(_GUESSES, repeat=len(guessed)):
        fields = [pa.field(name, kind) for name, kind in zip(guessed, kinds, strict=True)]
        try:
            _filter(pa.schema([*known, *fields, *rest]).empty_table(), expression)
            return
        except ValueError as failure:
            error = error or failure
    if error is not None:
        raise error


def _filter(table: pa.Table, expression: str) -> pa.Table:
    """Its rows for which the expression is true, in order. Raises ValueError."""
    connection = connect()
    import duckdb

    try:
        relation = connection.from_arrow(table)
        return relation.filter(duckdb.SQLExpression(expression)).to_arrow_table()
    except duckdb.Error as error:
        reason = str(error).partition("\n")[0]  # below it, DuckDB quotes the statement
        raise ValueError(f"the filter is no DuckDB expression over the stage's output: {reason}") from error
    finally:
        connection.close()


def write_filtered(expression: str, stage: str, source: str, output: str) -> int:
    """The rows of a finished stage that go on, beside the next one's output; how many there are. They have the
    former's text a second time, as STAGE_text, to be passed through. Raises InputError where
    none is left, or the expression does not go with the real columns."""
    read, written = Storage(source), Storage(f"{output.rstrip('/')}{FILTERED}")
    num_rows = num_kept = 0
    for path, table in _read_tables(read):
        kept = _filter_rows(table, expression, read.url(path))
        num_rows, num_kept = num_rows + table.num_rows, num_kept + kept.num_rows
        if kept.num_rows:
            # A job writes a column `text` of its own and passes none of that name through.
            kept = kept.append_column(f"{stage}_text", kept["text"])
            _create(written, path.rpartition("/")[2], kept)
    if not num_kept:
        raise InputError(f"{read.root}: the filter leaves none of its {num_rows:,} rows; mend it, or look at them")
    return num_kept


def _filter_rows(table: pa.Table, expression: str, url: str) -> pa.Table:
    """As `_filter`. Raises InputError. DuckDB quotes a value that it can't cast, and that is somebody's text: its own words
    are told only of an expression that fails without rows, too."""
    try:
        _filter(table.slice(0, 0), expression)
    except ValueError as error:
        raise InputError(f"{url}: {error}") from error
    try:
        return _filter(table, expression)
    except ValueError as error:
        kind = type(error.__cause__).__name__
    raise InputError(
        f"{url}: the filter fails on one of its rows ({kind}); write it so that it holds for every row, as with TRY_CAST"
    )


def _read_tables(storage: Storage) -> Iterator[tuple[str, pa.Table]]:
    for info in storage.list_files("data", suffix=".parquet"):
        with storage.open_read(info.path) as file:
            yield info.path, read_table(file).replace_schema_metadata(None)


def _create(storage: Storage, path: str, table: pa.Table) -> None:
    try:
        storage.create(path, make_parquet(table))
    except AlreadyExists:
        return  # an earlier attempt's: the job's plan may hold its version already
