"""The user's dataset file as rows: Parquet, JSON lines, JSON or CSV, from anywhere."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from batchgen.errors import InputError
from batchgen.parquet import read_table
from batchgen.storage import list_inputs, open_input


def read_dataset(url: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """All rows, of one file or of a folder's files in their order. Raises InputError for what can't be read, for a file
    without the columns that the benchmark needs, and for one without rows."""
    rows: list[dict[str, Any]] = []
    for info in list_inputs(url):
        with open_input(info.path, info.version) as source:
            rows += _read_rows(info.path, source.read())
    if not rows:
        raise InputError(f"{url}: holds no rows; give the benchmark's whole file")
    for number, row in enumerate(rows):
        if missing := [column for column in columns if column not in row]:
            raise InputError(
                f"{url} row {number}: lacks the column '{missing[0]}'; it has {', '.join(sorted(filter(None, row)))}"
            )
    return rows


def _read_rows(path: str, data: bytes) -> list[dict[str, Any]]:
    readers = {".parquet": _read_parquet, ".jsonl": _read_lines, ".json": _read_json, ".csv": _read_csv}
    suffix = path[path.rfind(".") :].lower()
    if suffix not in readers:
        raise InputError(f"{path}: is none of {', '.join(readers)}; convert it")
    try:
        return readers[suffix](data)
    except (ValueError, pa.ArrowException, csv.Error, RecursionError) as error:
        raise InputError(f"{path}: can't be read as {suffix[1:]} ({type(error).__name__}); write it again") from error


def _read_parquet(data: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(pa.BufferReader(data)).to_pylist()
    return rows


def _read_lines(data: bytes) -> list[dict[str, Any]]:
    return _as_rows([json.loads(line) for line in data.decode().split("\n") if line.strip()])


def _read_json(data: bytes) -> list[dict[str, Any]]:
    return _as_rows(json.loads(data))


def _read_csv(data: bytes) -> list[dict[str, Any]]:
    csv.field_size_limit(2**27)  # a question may be long
    return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))


def _as_rows(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError("no list of objects")
    return value
