"""Rows of a shard: in small steps by what they take in memory, and past corrupt pages."""

from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.errors import InputError
from batchgen.prompt import Integers
from batchgen.read import BATCH_BYTES, MAX_BATCH_ROWS, Unreadable, decode_rows, iter_batches, iter_shard, read_footer
from batchgen.records import InputFile, Shard
from batchgen.storage import list_inputs


def write(path: Path, table: pa.Table, **options: object) -> InputFile:
    pq.write_table(table, path, **options)
    return plan(path)


def plan(path: Path) -> InputFile:
    [info] = list_inputs(str(path))
    return read_footer(info).file


def corrupt(path: Path, group: int, column: int = 0) -> InputFile:
    """Break the first data page of a column."""
    chunk = pq.read_metadata(path).row_group(group).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + chunk.total_compressed_size] = bytes(range(255, 0, -1))[: chunk.total_compressed_size].ljust(
        chunk.total_compressed_size, b"\xff"
    )
    path.write_bytes(data)
    return plan(path)


def test_rows_that_share_a_long_value_come_a_few_at_a_time(tmp_path: Path) -> None:
    """The file is small, for the value is stored once; its rows are not."""
    table = pa.table({"p": ["x" * (BATCH_BYTES // 8)] * 200})
    file = write(tmp_path / "a.parquet", table)
    assert file.num_bytes < BATCH_BYTES
    steps = list(iter_shard(Shard(0, file, 3, 190), ["p"]))
    assert [row for row, _ in steps][:3] == [3, 10, 17]
    assert all(first + batch.num_rows == second for (first, batch), (second, _) in pairwise(steps))
    assert sum(batch.num_rows for _, batch in steps) == 187
    assert all(isinstance(batch, pa.RecordBatch) and batch.nbytes <= BATCH_BYTES for _, batch in steps)


def test_steps_keep_to_both_bounds_and_to_one_row_at_least(tmp_path: Path) -> None:
    small = write(tmp_path / "a.parquet", pa.table({"p": range(500)}))
    assert max(batch.num_rows for _, batch in iter_shard(Shard(0, small, 0, 500), ["p"])) == MAX_BATCH_ROWS
    assert {batch.num_rows for _, batch in iter_shard(Shard(0, small, 0, 500), ["p"], max_rows=1)} == {1}
    large = write(tmp_path / "b.parquet", pa.table({"p": ["x" * (BATCH_BYTES + 1)] * 3}))
    assert [batch.num_rows for _, batch in iter_shard(Shard(0, large, 0, 3), ["p"])] == [1, 1, 1]


def test_a_corrupt_page_costs_the_rest_of_its_row_group_only(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pa.table({"p": [f"row {i}" for i in range(300)]}), row_group_size=100)
    file = corrupt(tmp_path / "a.parquet", 1)
    found = list(iter_shard(Shard(0, file, 50, 280), ["p"]))
    bad = [(row, rows.num_rows) for row, rows in found if isinstance(rows, Unreadable)]
    assert (bad[0][0], sum(count for _, count in bad)) == (100, 100)
    assert sum(rows.num_rows for _, rows in found) == 230
    good = {row: rows for row, rows in found if not isinstance(rows, Unreadable)}
    assert good[50]["p"][0].as_py() == "row 50"
    assert good[200]["p"][0].as_py() == "row 200"
    with pytest.raises(InputError, match=r"a\.parquet row 100: row group 1 can't be decoded"):
        list(iter_batches(Shard(0, file, 50, 280), ["p"]))


def test_memory_that_runs_out_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.parquet", pa.table({"p": ["a"]}))

    def fail(*_: object, **__: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 1 failed")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    with pytest.raises(pa.ArrowMemoryError):
        list(iter_shard(Shard(0, file, 0, 1), ["p"]))


def test_bytes_inside_lists_and_structs_are_text() -> None:
    kind = pa.list_(pa.struct([("role", pa.binary()), ("content", pa.large_binary())]))
    chats = pa.array([[{"role": b"user", "content": "é".encode()}], None, [{"role": b"\xff", "content": b""}]], kind)
    rows = decode_rows(pa.RecordBatch.from_pydict({"m": chats}), ["m"])
    assert rows[0] == {"m": [{"role": "user", "content": "é"}]}
    assert rows[1] == {"m": None}
    assert rows[2]["m"].error_type == "invalid_utf8"


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint8())])
def test_lists_of_integers_are_told_apart_from_lists_with_holes(kind: pa.DataType) -> None:
    """What an `Integers` holds is looked at by nobody."""
    lists = [[1, 2], None, [], [3]]
    whole = pa.RecordBatch.from_arrays([pa.array(lists, kind)], ["ids"])
    for batch, wanted in ((whole, lists), (whole.slice(1, 2), lists[1:3])):
        cells = [row["ids"] for row in decode_rows(batch, ["ids"])]
        assert cells == wanted
        assert all(isinstance(cell, Integers) for cell in cells if cell is not None)
    holed = pa.RecordBatch.from_arrays([pa.array([[1, None]], kind)], ["ids"])
    [row] = decode_rows(holed, ["ids"])
    assert row["ids"] == [1, None]
    assert not isinstance(row["ids"], Integers)


@pytest.mark.parametrize("kind", [pa.list_(pa.bool_()), pa.list_(pa.float32()), pa.list_(pa.list_(pa.int32()))])
def test_other_lists_are_plain(kind: pa.DataType) -> None:
    cells = {pa.bool_(): [True], pa.float32(): [1.0]}.get(kind.value_type, [[1]])
    [row] = decode_rows(pa.RecordBatch.from_arrays([pa.array([cells], kind)], ["ids"]), ["ids"])
    assert type(row["ids"]) is list
