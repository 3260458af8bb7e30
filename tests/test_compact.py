"""The same rows in files of another size: every one, in order, whatever was killed or damaged in between."""

import json
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs_util import Tree, call_cli, make_tree, read_rows, run, write_prompts

from batchgen.chaos.faults import Fault, striking
from batchgen.compact import compact as compact_module
from batchgen.compact.compact import check_part, compact
from batchgen.compact.digest import RowDigest
from batchgen.compact.plan import Source, cut_parts
from batchgen.errors import OutputError
from batchgen.storage import Storage

TARGET = 40_000
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.none() | st.text(max_size=4),
            "count": st.none() | st.integers(-(2**40), 2**40),
            "flag": st.none() | st.booleans(),
            "ids": st.none() | st.lists(st.none() | st.integers(0, 9), max_size=3),
            "pair": st.none()
            | st.fixed_dictionaries(
                {"a": st.none() | st.floats(allow_nan=False), "b": st.none() | st.text(max_size=2)}
            ),
            "pairs": st.none() | st.lists(st.fixed_dictionaries({"a": st.none() | st.text(max_size=2)}), max_size=2),
        }
    ),
    max_size=12,
)
SCHEMA = pa.schema(
    [
        ("text", pa.string()), ("count", pa.int64()), ("flag", pa.bool_()), ("ids", pa.list_(pa.int32())),
        ("pair", pa.struct([("a", pa.float64()), ("b", pa.string())])),
        ("pairs", pa.list_(pa.struct([("a", pa.string())]))),
    ]
)  # fmt: skip


def digest(*tables: pa.Table, schema: pa.Schema = SCHEMA) -> str:
    found = RowDigest(schema)
    for table in tables:
        found.add(table)
    return found.hexdigest()


@settings(max_examples=80, deadline=None)
@given(ROWS, st.integers(0, 12), st.integers(0, 12))
def test_a_digest_is_of_rows_however_they_are_cut(rows: list[dict[str, Any]], first: int, second: int) -> None:
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    a, b = sorted((min(first, len(rows)), min(second, len(rows))))
    whole = digest(table)
    assert digest(table.slice(0, a), table.slice(a, b - a), table.slice(b)) == whole
    parts = [pa.Table.from_pylist(part, schema=SCHEMA) for part in (rows[:a], rows[a:b], rows[b:])]
    assert digest(pa.concat_tables(parts)) == whole
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=3)
    assert digest(pq.read_table(pa.BufferReader(sink.getvalue()))) == whole


@settings(max_examples=80, deadline=None)
@given(ROWS, ROWS)
def test_other_rows_have_another_digest(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    tables = [pa.Table.from_pylist(rows, schema=SCHEMA) for rows in (one, other)]
    same = tables[0].equals(tables[1])
    # -0.0 and 0.0 are equal and have other bytes.
    assert (digest(tables[0]) == digest(tables[1])) == same or repr(one) != repr(other)
    if not same:
        assert digest(tables[0]) != digest(tables[1])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["ab", "c"], ["a", "bc"]),
        (["", None], [None, ""]),
        ([["a"], []], [[], ["a"]]),
        ([[None]], [None]),
        (["a"], ["a", "a"]),
    ],
)
def test_neighbours_that_are_easily_mixed_up(one: list[Any], other: list[Any]) -> None:
    kind = pa.list_(pa.string()) if any(isinstance(value, list) for value in [*one, *other]) else pa.string()
    schema = pa.schema([("x", kind)])
    made = [digest(pa.table({"x": pa.array(values, kind)}), schema=schema) for values in (one, other)]
    assert made[0] != made[1]


@pytest.mark.parametrize(
    "kind",
    ["map<string, int32>", "fixed_size_list", "dictionary", "string_view", "decimal", "timestamp", "uuid"],
)
def test_columns_of_any_type_that_may_be_passed_through(kind: str) -> None:
    columns = {
        "map<string, int32>": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int32())),
        "fixed_size_list": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int8(), 2)),
        "dictionary": pa.array(["x", None, "y"]).dictionary_encode(),
        "string_view": pa.array(["a", None, "a text of more than twelve"], pa.string_view()),
        "decimal": pa.array([Decimal("1.10"), None, Decimal(2)], pa.decimal128(5, 2)),
        "timestamp": pa.array([1, None, 2], pa.timestamp("us", "UTC")),
        "uuid": pa.array([b"a" * 16, None, b"b" * 16], pa.uuid()),
    }
    table = pa.table({"x": columns[kind]})
    whole = digest(table, schema=table.schema)
    assert digest(table.slice(0, 2), table.slice(2), schema=table.schema) == whole
    assert digest(table.slice(2), table.slice(0, 2), schema=table.schema) != whole


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 500))
def test_parts_hold_all_shards_in_order_and_are_no_larger_than_they_must(sizes: list[int], target: int) -> None:
    sources = [Source(number, size, 1, str(number)) for number, size in enumerate(sizes)]
    parts = cut_parts(list(reversed(sources)), target)
    assert [source for part in parts for source in part] == sources
    for part in parts:
        assert len(part) == 1 or sum(source.num_bytes for source in part) <= target + part[-1].num_bytes / 2


# ---- real datasets ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tree]:
    root = tmp_path_factory.mktemp("compact")
    write_prompts(root / "in", (80, 45))
    tree = make_tree(root / "in", root / "out", root / "calls")
    tree["sampling"] = {**tree.get("sampling", {}), "n": 2}
    run(tree)
    return root / "out", tree


def read_all(folder: Path) -> list[dict[str, Any]]:
    return list(ds.dataset(sorted(str(path) for path in folder.glob("*.parquet"))).to_table().to_pylist())


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_row_is_there_in_order_in_fewer_files_and_out_is_untouched(
    finished: tuple[Path, Tree], tmp_path: Path
) -> None:
    out, before = finished[0], read_bytes(finished[0])
    ended = call_cli("compact", str(out), str(tmp_path / "dest"), "--json")
    assert ended.code == 0, ended.err
    assert (ended.report["parts"], ended.report["rows"]) == (1, 250)
    assert read_all(tmp_path / "dest") == read_all(out / "data") == read_rows(out)
    assert read_bytes(out) == before
    again = call_cli("compact", str(out), str(tmp_path / "dest"), "--json")
    assert (again.code, again.report["made"]) == (0, 0)


@pytest.mark.parametrize("nth", range(1, 12))
def test_killed_at_any_write_it_goes_on(finished: tuple[Path, Tree], tmp_path: Path, nth: int) -> None:
    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    out, dest = Storage(str(finished[0])), str(tmp_path / "dest")
    # Reads of shards and parts come one by one, so that every state of DEST is met.
    try:
        with striking(Fault("read", "after", nth * 2), out.root, die):
            compact(Storage(out.root), Storage(dest), TARGET, lambda _: None)
    except Killed:
        assert not Path(dest, "_SUCCESS").exists()
    found = compact(out, Storage(dest), TARGET, lambda _: None)
    assert found["parts"] > 2
    assert read_all(Path(dest)) == read_rows(finished[0])
    assert json.loads(Path(dest, "_SUCCESS").read_text())["rows"] == 250


def test_a_damaged_shard_is_never_copied(finished: tuple[Path, Tree], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    path = sorted((out / "data").iterdir())[1]
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputError, match=path.name):
        compact(Storage(str(out)), Storage(str(tmp_path / "dest")), TARGET, lambda _: None)
    assert not (tmp_path / "dest" / "_SUCCESS").exists()


def test_a_part_that_lost_a_row_is_found(finished: tuple[Path, Tree], tmp_path: Path) -> None:
    dest = Storage(str(tmp_path / "dest"))
    compact(Storage(str(finished[0])), dest, TARGET, lambda _: None)
    path = tmp_path / "dest" / "part-000001.parquet"
    parquet = pq.ParquetFile(path)
    table = parquet.read()
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table.slice(1))
        writer.add_key_value_metadata(parquet.metadata.metadata)
    with pytest.raises(OutputError, match="part-000001"):
        compact(Storage(str(finished[0])), dest, TARGET, lambda _: None)
    with pytest.raises(OutputError):
        check_part(dest, "part-000000.parquet", [])


def test_shards_with_other_columns_are_refused_by_name(
    finished: tuple[Path, Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = compact_module._read_shard
    monkeypatch.setattr(
        compact_module,
        "_read_shard",
        lambda out, source: read(out, source).drop_columns(["text"] if source.shard == 1 else []),
    )
    with pytest.raises(
        OutputError, match=r"shard-000000001\.parquet: its columns are not those of the shards before it; "
    ):
        compact(Storage(str(finished[0])), Storage(str(tmp_path / "dest")), TARGET, lambda _: None)


@pytest.mark.parametrize("where", ["{out}", "{out}/data/x", "{out}/.."])
def test_out_is_never_a_destination(finished: tuple[Path, Tree], where: str) -> None:
    before = read_bytes(finished[0])
    with pytest.raises(OutputError, match="apart from it"):
        compact(Storage(str(finished[0])), Storage(where.format(out=finished[0])), TARGET, lambda _: None)
    assert read_bytes(finished[0]) == before


def test_what_is_not_finished_or_of_another_size_is_refused(finished: tuple[Path, Tree], tmp_path: Path) -> None:
    out, dest = Storage(str(finished[0])), Storage(str(tmp_path / "dest"))
    compact(out, dest, TARGET, lambda _: None)
    with pytest.raises(OutputError, match="another size"):
        compact(out, dest, 2 * TARGET, lambda _: None)
    shutil.copytree(finished[0], tmp_path / "out")
    (tmp_path / "out" / "_SUCCESS").unlink()
    with pytest.raises(OutputError, match="run its job to the end first"):
        compact(Storage(str(tmp_path / "out")), Storage(str(tmp_path / "other")), TARGET, lambda _: None)
