"""Input files: found by path, folder and glob, and read as they were planned or not at all."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_kinds import s3_only, sure

from batchgen.errors import InputChanged, InputError
from batchgen.storage import Storage, list_inputs, open_input, read_text

ODD_NAMES = ["a b.parquet", "a#b.parquet", "100%25.parquet", "é.parquet", "[1].parquet", "sub dir/x?.parquet"]


@pytest.fixture
def inputs(store: Storage) -> Storage:
    for name in [*ODD_NAMES, "sub dir/deep/y.parquet", "notes.txt", "_tmp/z.parquet", "sub dir/.z.parquet"]:
        store.put(f"in/{name}", name.encode())
    return store


def names_of(store: Storage, path: str) -> list[str]:
    prefix = store.url("in/")
    found = list_inputs(store.url(path))
    assert all(info.path.startswith(prefix) for info in found)
    return [info.path.removeprefix(prefix) for info in found]


@sure
def test_inputs_are_a_file_a_folder_or_a_glob(inputs: Storage) -> None:
    flat = sorted(name for name in ODD_NAMES if "/" not in name)
    visible = sorted([*ODD_NAMES, "sub dir/deep/y.parquet", "notes.txt"])
    assert names_of(inputs, "in") == visible
    assert names_of(inputs, "in/") == visible
    assert names_of(inputs, "in/*.parquet") == flat
    assert names_of(inputs, "in/**/*.parquet") == [name for name in visible if name != "notes.txt"]
    assert names_of(inputs, "i[mn]/sub*/?*.parquet") == ["sub dir/x?.parquet"]
    assert names_of(inputs, "in/sub*") == ["sub dir/deep/y.parquet", "sub dir/x?.parquet"]
    assert names_of(inputs, "in/*/deep") == ["sub dir/deep/y.parquet"]
    assert names_of(inputs, "in/_tmp") == ["_tmp/z.parquet"]
    for name in ODD_NAMES:
        assert names_of(inputs, f"in/{name}") == [name]


@sure
def test_a_folder_with_brackets_is_itself_before_it_is_a_glob(store: Storage) -> None:
    store.put("run [1]/a.parquet", b"")
    store.put("run 1/b.parquet", b"")
    assert [info.path for info in list_inputs(store.url("run [1]"))] == [store.url("run [1]/a.parquet")]
    assert [info.path for info in list_inputs(store.url("run [1]/*.parquet"))] == [store.url("run [1]/a.parquet")]
    assert [info.path for info in list_inputs(store.url("run [1-9]/*"))] == [store.url("run 1/b.parquet")]


@sure
def test_no_input_is_one_clear_sentence(inputs: Storage) -> None:
    with pytest.raises(InputError, match=r"^no such path: .*in/nope; "):
        list_inputs(inputs.url("in/nope"))
    with pytest.raises(InputError, match=r"^no file matches .*in/\*\.json; "):
        list_inputs(inputs.url("in/*.json"))
    with pytest.raises(InputError, match="don't count"):
        list_inputs(inputs.url("in/_*"))


@sure
def test_an_input_is_read_as_planned(inputs: Storage) -> None:
    for info in list_inputs(inputs.url("in")):
        with open_input(info.path, info.version) as file:
            assert file.read().decode() == info.path.removeprefix(inputs.url("in/"))


@sure
def test_a_changed_or_missing_input_is_refused_by_name(inputs: Storage) -> None:
    (planned,) = list_inputs(inputs.url("in/notes.txt"))
    inputs.put("in/notes.txt", b"another")
    with pytest.raises(InputChanged, match=rf"in/notes\.txt was changed: .*{planned.version}"):
        open_input(planned.path, planned.version)
    inputs.delete("in/notes.txt")
    with pytest.raises(InputChanged, match=r"in/notes\.txt is missing"):
        open_input(planned.path, planned.version)


def parquet_bytes(first: int) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": range(first, first + 200_000)}), sink, row_group_size=20_000, compression="none")
    return bytes(sink.getvalue())


@s3_only
@pytest.mark.parametrize("change", ["replace", "delete"])
def test_a_change_while_an_input_is_read_is_noticed(store: Storage, change: str) -> None:
    version = store.put("a.parquet", parquet_bytes(0))
    with open_input(store.url("a.parquet"), version, block_bytes=2**14) as file:
        parquet = pq.ParquetFile(file)
        parquet.read_row_group(0)
        if change == "replace":
            store.put("a.parquet", parquet_bytes(1))
        else:
            store.delete("a.parquet")
        with pytest.raises(InputChanged, match=r"a\.parquet was changed while it was read"):
            parquet.read_row_group(8)


def test_a_local_input_written_in_place_is_noticed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    (planned,) = list_inputs(str(path))
    file = open_input(planned.path, planned.version)
    file.read(3)
    path.write_text("afterwards")
    with pytest.raises(InputChanged, match=r"a\.txt"):
        file.close()
    assert file.closed


def test_local_inputs_follow_links_without_running_in_circles(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a").write_text("")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "real")
    (tmp_path / "real/circle").symlink_to(tmp_path / "in")
    assert [info.path for info in list_inputs(str(tmp_path / "in"))] == [str(tmp_path / "in/link/a")]


@sure
def test_read_text(store: Storage) -> None:
    store.put("spec é.yaml", "prompt: é".encode())
    assert read_text(store.url("spec é.yaml")) == "prompt: é"
    store.put("latin", b"\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        read_text(store.url("latin"))
    with pytest.raises(InputError, match="no such file"):
        read_text(store.url("nope.yaml"))
