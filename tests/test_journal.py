"""Spilled rows: what comes back, which segments still matter, whose they are."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import make_error, make_job_spec, make_ok, make_rows

from batchgen.errors import AlreadyExists, NotFound, StorageError
from batchgen.journal import (
    FOLDER,
    JournalIndex,
    drop_repeated,
    list_segments,
    make_segment_path,
    make_worker_prefix,
    read_index,
    read_indexes,
    read_sound_rows,
    write_segment,
)
from batchgen.records import JournalRef
from batchgen.storage import Storage
from batchgen.write import make_result_schema

SPEC = make_job_spec()
SCHEMA = make_result_schema(SPEC)
JOB = SPEC.fingerprint()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "out"))


def list_texts(table: pa.Table) -> list[tuple[int, int, str | None]]:
    return [(row["source_row"], row["sample_index"], row["text"]) for row in table.to_pylist()]


# ---- segments


def read_whole(storage: Storage, refs: Sequence[JournalRef], schema: pa.Schema) -> pa.Table:
    """Of segments that are all whole."""
    rows, left_out = read_sound_rows(storage, refs, schema)
    assert left_out == []
    return rows


def test_rows_of_each_shard_come_back_from_their_segment(storage: Storage) -> None:
    rows = {7: make_rows(make_ok(70), make_error(71)), 3: make_rows(make_ok(30))}
    path = make_segment_path(2, "worker-0001", 5)
    refs = write_segment(storage, path, rows, JOB)
    assert refs == {3: JournalRef(path, 0), 7: JournalRef(path, 1)}
    assert read_index(storage, path, JOB) == refs
    assert list_segments(storage) == [path]
    for number, table in rows.items():
        assert read_whole(storage, [refs[number]], SCHEMA).equals(table)
    assert read_whole(storage, [refs[3]], SCHEMA).schema.metadata is None


def test_a_segment_is_created_once_and_never_changed(storage: Storage) -> None:
    path = make_segment_path(1, "w", 1)
    write_segment(storage, path, {0: make_rows(make_ok(0, text="first"))}, JOB)
    with pytest.raises(AlreadyExists):
        write_segment(storage, path, {0: make_rows(make_ok(0, text="second"))}, JOB)
    assert list_texts(read_whole(storage, [JournalRef(path, 0)], SCHEMA)) == [(0, 0, "first")]


def test_our_own_segment_after_a_lost_reply_is_written(storage: Storage) -> None:
    path, rows = make_segment_path(1, "w", 1), {0: make_rows(make_ok(0))}
    refs = write_segment(storage, path, rows, JOB)
    assert write_segment(storage, path, rows, JOB) == refs == {0: JournalRef(path, 0)}


@pytest.mark.parametrize("metadata", [None, {b"a": b"b"}])
def test_a_file_that_is_no_segment_is_refused_by_name(storage: Storage, metadata: dict[bytes, bytes] | None) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata(metadata), sink)
    storage.create(f"{FOLDER}/foreign.parquet", memoryview(sink.getvalue()))
    storage.create(f"{FOLDER}/garbage.parquet", b"what is this")
    with pytest.raises(StorageError, match=r"foreign\.parquet: was not written by batchgen; remove it"):
        read_index(storage, f"{FOLDER}/foreign.parquet", JOB)
    with pytest.raises(StorageError, match=r"garbage\.parquet: is damaged, or no journal segment"):
        read_index(storage, f"{FOLDER}/garbage.parquet", JOB)


def test_a_segment_of_another_job_is_refused(storage: Storage) -> None:
    path = make_segment_path(1, "w", 1)
    write_segment(storage, path, {0: make_rows(make_ok(0))}, "0" * 32)
    with pytest.raises(StorageError, match=r"e000001-w-000001\.parquet: was written by a job with another fingerprint"):
        read_index(storage, path, JOB)
    with pytest.raises(StorageError, match="another fingerprint"):
        read_indexes(storage, [path], JOB, pytest.fail)


def test_the_first_segment_by_order_wins_and_repeated_rows_are_dropped(storage: Storage) -> None:
    paths = [make_segment_path(1, "w", number) for number in (1, 2)]
    write_segment(storage, paths[0], {0: make_rows(make_ok(0, text="a"), make_ok(1, text="a"))}, JOB)
    write_segment(storage, paths[1], {0: make_rows(make_ok(1, text="b"), make_ok(2, text="b"))}, JOB)
    refs = [JournalRef(path, 0) for path in paths]
    for order, texts in ((refs, ["0a", "1a", "2b"]), (refs[::-1], ["1b", "2b", "0a"])):
        found = list_texts(drop_repeated(read_whole(storage, order, SCHEMA)))
        assert [f"{row}{text}" for row, _, text in found] == texts


def test_a_segment_that_is_gone_is_skipped(storage: Storage) -> None:
    kept, gone = (make_segment_path(1, "w", number) for number in (1, 2))
    write_segment(storage, kept, {0: make_rows(make_ok(0))}, JOB)
    refs = [JournalRef(gone, 0), JournalRef(kept, 0)]
    assert list_texts(read_whole(storage, refs, SCHEMA)) == [(0, 0, "fine")]
    empty = read_whole(storage, refs[:1], SCHEMA)
    assert (empty.num_rows, empty.schema) == (0, SCHEMA)
    assert read_whole(storage, [], SCHEMA).schema == SCHEMA
    with pytest.raises(NotFound):
        read_index(storage, gone, JOB)


def test_a_shard_of_many_rows_is_one_row_group(storage: Storage) -> None:
    table = make_rows(*(make_ok(row) for row in range(3_000)))
    refs = write_segment(storage, make_segment_path(1, "w", 1), {0: table, 1: make_rows(make_ok(5))}, JOB)
    assert read_whole(storage, [refs[0]], SCHEMA).num_rows == 3_000
    assert list_texts(read_whole(storage, [refs[1]], SCHEMA)) == [(5, 0, "fine")]


def test_optional_columns_survive(storage: Storage) -> None:
    spec = make_job_spec(output={"path": "/o", "token_ids": True}, sampling={"logprobs": 1})
    table = make_rows(make_ok(0), make_error(1), spec=spec)
    refs = write_segment(storage, make_segment_path(1, "w", 1), {0: table}, JOB)
    assert read_whole(storage, [refs[0]], make_result_schema(spec)).equals(table)


def test_segment_names_sort_by_epoch_worker_and_sequence() -> None:
    names = [
        make_segment_path(*key) for key in [(1, "w-0001", 9), (1, "w-0001", 10), (1, "w-0002", 1), (10, "w-0001", 1)]
    ]
    assert names == sorted(names)
    assert all(name.startswith(FOLDER) for name in names)
    assert names[0].startswith(make_worker_prefix(1, "w-0001"))
    assert not names[0].startswith(make_worker_prefix(1, "w-000"))
    assert not names[3].startswith(make_worker_prefix(1, "w-0001"))


def test_indexes_are_read_in_the_order_asked_for(storage: Storage) -> None:
    paths = [make_segment_path(1, "w", number) for number in range(8)]
    for number, path in enumerate(paths):
        write_segment(storage, path, {number: make_rows(make_ok(0))}, JOB)
    assert read_indexes(storage, paths[::-1], JOB, pytest.fail) == [
        {n: JournalRef(paths[n], 0)} for n in range(7, -1, -1)
    ]
    assert read_indexes(storage, [], JOB, pytest.fail) == []


def test_drop_repeated_keeps_the_first_of_each_row_and_sample() -> None:
    table = make_rows(
        make_ok(1, 0, "a"), make_ok(1, 1, "b"), make_ok(1, 0, "c"), make_ok(0, 0, "d"), make_ok(1, 1, "e")
    )
    assert list_texts(drop_repeated(table)) == [(1, 0, "a"), (1, 1, "b"), (0, 0, "d")]
    assert drop_repeated(SCHEMA.empty_table()).num_rows == 0


# ---- the index


def test_a_segment_goes_when_its_last_shard_is_committed() -> None:
    index = JournalIndex()
    assert index.add({1: JournalRef("a", 0), 2: JournalRef("a", 1)}) == []
    assert index.add({2: JournalRef("b", 0)}) == []
    assert index.get(2) == (JournalRef("a", 1), JournalRef("b", 0))
    assert index.get(9) == ()
    assert index.complete(2) == ["b"]
    assert (index.get(2), index.knows("a"), index.knows("b")) == ((), True, False)
    assert index.complete(1) == ["a"]
    assert index.complete(1) == []


def test_adding_twice_is_a_no_op_and_what_came_too_late_is_free() -> None:
    index = JournalIndex()
    refs = {1: JournalRef("a", 0)}
    assert index.add(refs) == index.add(refs) == []
    assert index.get(1) == (JournalRef("a", 0),)
    assert index.complete(1) == ["a"]
    assert index.add(refs) == ["a"]
    assert index.get(1) == ()
    assert index.add({1: JournalRef("z", 0), 2: JournalRef("z", 1)}) == []
    assert index.get(1) == ()
    assert index.complete(2) == ["z"]


def test_what_a_settled_run_journaled_does_not_count_whenever_it_comes() -> None:
    index = JournalIndex()
    old, new, later = (make_segment_path(epoch, "w", 1) for epoch in (2, 3, 4))
    index.settle(1, 3)
    for path in (old, new):
        assert index.add({1: JournalRef(path, 0)}) == [path]
    assert index.add({1: JournalRef(later, 0), 2: JournalRef(later, 1)}) == []
    assert index.get(1) == (JournalRef(later, 0),)
    assert index.complete(1) == []
    assert index.complete(2) == [later]


def test_references_come_in_name_order_however_the_news_came() -> None:
    index = JournalIndex()
    for name in ("c", "a", "b"):
        index.add({1: JournalRef(name, 0)})
    assert [ref.path for ref in index.get(1)] == ["a", "b", "c"]


segments = st.dictionaries(st.integers(0, 3), st.integers(0, 5), min_size=1, max_size=3)
steps = st.lists(
    st.tuples(st.just("add"), st.sampled_from("abcd"), segments) | st.tuples(st.just("done"), st.integers(0, 3))
)


@settings(max_examples=100, deadline=None)
@given(steps)
def test_a_segment_is_freed_exactly_when_nobody_needs_it(steps: list[tuple[object, ...]]) -> None:
    index, needed, done = JournalIndex(), dict[str, set[int]](), set[int]()
    held: dict[str, dict[int, JournalRef]] = {}
    for step in steps:
        if step[0] == "add":
            path = str(step[1])
            refs = held.setdefault(path, {n: JournalRef(path, group) for n, group in step[2].items()})  # type: ignore[attr-defined]
            freed = index.add(refs)
            needed[path] = refs.keys() - done
            assert freed == ([] if needed[path] else [path])
        else:
            number = step[1]
            assert isinstance(number, int)
            freed = index.complete(number)
            done.add(number)
            assert set(freed) == {path for path, shards in needed.items() if shards == {number}}
            needed = {path: shards - {number} for path, shards in needed.items()}
        for number in range(4):
            wanted = sorted(path for path, shards in needed.items() if number in shards)
            assert [ref.path for ref in index.get(number)] == wanted
        assert all(index.knows(path) == bool(shards) for path, shards in needed.items())
