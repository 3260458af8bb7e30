"""One contract over every kind of store, then what only some of them can show."""

import asyncio
import contextlib
import gc
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import S3Proxy
from store_kinds import S3_KINDS, every, over, s3_only, sure

from batchgen.errors import AlreadyExists, Conflict, NotFound, StorageError
from batchgen.storage import Storage
from batchgen.stores import s3 as stores_s3
from batchgen.stores.probe import StoreAbilities, probe


def in_parallel(count: int, work: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


# ---- the contract


@every
def test_what_is_created_is_read_and_never_created_again(store: Storage) -> None:
    version = store.create("data/é b.bin", memoryview(b"first"))
    with pytest.raises(AlreadyExists, match="exists already"):
        store.create("data/é b.bin", b"second")
    assert store.read_versioned("data/é b.bin") == (b"first", version)
    assert store.read_bytes("data/é b.bin") == b"first"
    info = store.info("data/é b.bin")
    assert info is not None
    assert (info.path, info.num_bytes, info.version) == ("data/é b.bin", 5, version)


@every
def test_a_range_is_of_the_version_that_is_asked_for(store: Storage) -> None:
    first = store.put("data/é b.bin", b"0123456789")
    assert store.read_range("data/é b.bin", 2, 3, first) == b"234"
    assert store.read_range("data/é b.bin", 8, 100, first) == b"89"
    store.put("data/é b.bin", b"abcdefghij")
    with pytest.raises(Conflict, match="changed"):
        store.read_range("data/é b.bin", 2, 3, first)
    with pytest.raises(NotFound):
        store.read_range("data/none", 0, 1, first)


@pytest.mark.s3
def test_an_etag_is_an_md5_only_where_s3_says_so(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Storage(s3_url)
    store.put("plain", b"content")
    client: Any = store._client
    client._fs.call_s3("put_object", **client._at(store.url("kms")), Body=b"content", ServerSideEncryption="aws:kms")
    monkeypatch.setattr(stores_s3, "_ONE_PUT_BYTES", 1)
    store.put("parts", b"content")
    md5s = {name: info.md5 for name in ("plain", "kms", "parts") if (info := store.info(name)) is not None}
    assert md5s == {"plain": hashlib.md5(b"content").hexdigest(), "kms": None, "parts": None}


@every
def test_what_is_missing(store: Storage) -> None:
    assert store.info("a/b") is None
    assert store.list_files("a") == []
    for read in (store.read_bytes, store.read_versioned, store.open_read):
        with pytest.raises(NotFound, match="a/b"):
            read("a/b")
    with pytest.raises(Conflict):
        store.replace("a/b", b"", "1-1")
    store.delete("a/b")
    store.delete_many(["a/b", "c"])


@every
def test_a_folder_is_no_file(store: Storage) -> None:
    store.put("a/b/c", b"")
    assert store.info("a/b") is None
    assert store.info("a") is None


@every
def test_replace_takes_only_the_version_it_names(store: Storage) -> None:
    versions = [store.create("x", b"0")]
    for content in (b"1", b"2", b"3"):
        versions.append(store.replace("x", content, versions[-1]))
    assert len(set(versions)) == 4
    with pytest.raises(Conflict, match="another writer"):
        store.replace("x", b"late", versions[-2])
    assert store.read_versioned("x") == (b"3", versions[-1])
    assert store.put("x", b"4") not in versions
    assert store.read_bytes("x") == b"4"


@every
def test_listing_is_whole_sorted_and_fresh(store: Storage) -> None:
    names = [f"data/part {number:03}/é-{number % 7}.parquet" for number in range(210)]
    in_parallel(16, lambda worker: [store.put(name, bytes(worker)) for name in names[worker::16]])
    store.put("data.txt", b"no part of data/")
    store.put("data/empty", b"")
    listed = store.list_files("data", suffix=".parquet")
    assert [info.path for info in listed] == names
    assert [info.num_bytes for info in listed] == [number % 16 for number in range(210)]
    assert len(store.list_files()) == 212
    assert listed[3] == store.info(names[3])
    store.delete_many(names)
    store.put("data/new", b"")
    assert [info.path for info in store.list_files("data")] == ["data/empty", "data/new"]


@every
def test_open_read_seeks(store: Storage) -> None:
    pq.write_table(pa.table({"a": range(50_000)}), buffer := pa.BufferOutputStream(), row_group_size=5_000)
    store.put("a.parquet", memoryview(buffer.getvalue()))
    with store.open_read("a.parquet") as file:
        parquet = pq.ParquetFile(file)
        assert parquet.read_row_group(7)["a"][1].as_py() == 35_001
    with store.open_read("a.parquet") as file:
        file.seek(-4, os.SEEK_END)
        assert file.read() == b"PAR1"


@sure
def test_one_of_many_creators_wins(store: Storage) -> None:
    start = threading.Barrier(16)

    def create(number: int) -> bool:
        start.wait()
        try:
            store.create("one", str(number).encode())
        except AlreadyExists:
            return False
        return True

    won = in_parallel(16, create)
    assert won.count(True) == 1
    assert store.read_bytes("one") == str(won.index(True)).encode()


@sure
def test_one_of_many_replacers_wins(store: Storage) -> None:
    version = store.create("one", b"x")
    start = threading.Barrier(16)

    def replace(number: int) -> bool:
        start.wait()
        try:
            store.replace("one", str(number % 10).encode(), version)
        except Conflict:
            return False
        return True

    assert in_parallel(16, replace).count(True) == 1


@every
def test_pickles_by_its_url(store: Storage) -> None:
    store.put("x", b"content")
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.root, copy.is_local, copy.can_create_exclusively) == (
        store.root,
        store.is_local,
        store.can_create_exclusively,
    )
    assert copy.read_bytes("x") == b"content"
    assert store.root not in store.info("x").path


@sure
def test_works_beside_a_running_event_loop(store: Storage) -> None:
    async def use() -> bytes:
        await asyncio.to_thread(store.put, "x", b"from a thread")
        return store.read_bytes("x")  # blocks this loop, but must not deadlock with it

    assert asyncio.run(use()) == b"from a thread"


# ---- the probe


@sure
def test_probe_finds_a_store_sure_and_leaves_nothing(store: Storage) -> None:
    assert probe(store) == StoreAbilities(is_exclusive=True, can_replace=True, reason=None)
    assert store.list_files() == []


@over(*S3_KINDS[1:])
def test_probe_finds_out_a_store_without_conditions(root: str) -> None:
    found = probe(Storage(root))
    assert (found.is_exclusive, found.can_replace) == (False, False)
    assert found.reason is not None
    assert ("NotImplemented" in found.reason) == ("told that they created" not in found.reason)
    assert Storage(root).list_files() == []


@over(*S3_KINDS[1:])
def test_where_conditions_fail_none_is_sent_nor_a_bulk_delete(store: Storage, s3_proxy: S3Proxy) -> None:
    store.replace("x", b"1", store.create("x", b"0"))
    store.delete_many(["x", "y"])
    writes = [seen for seen in s3_proxy.seen if seen.method in {"PUT", "POST"}]
    assert [seen.method for seen in writes] == ["PUT", "PUT"]
    assert not any(seen.conditions for seen in writes)


# ---- a local disk


def test_an_error_that_was_dealt_with_holds_nothing(tmp_path: Path) -> None:
    """On Python 3.12 a generator that maps errors left a ring of error and frames: each write of a new name kept its bytes
    until the collector came by."""
    storage = Storage(str(tmp_path))
    storage.put("first", b"x")  # what is made once
    gc.collect()
    gc.disable()
    try:
        storage.put("second", b"y")
        assert storage.info("missing") is None
        with contextlib.suppress(NotFound):
            storage.read_bytes("missing")
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_spellings_of_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for spelling in ("out", "./out/", f"file://{tmp_path}/out", f"{tmp_path}/x/../out"):
        assert Storage(spelling).root == str(tmp_path / "out")


def test_a_failed_local_write_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(StorageError, match=r"data/x: the disk is full; free some space"):
        Storage(str(tmp_path)).create("data/x", b"content")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_two_versions_never_share_a_name_however_coarse_the_clock(tmp_path: Path) -> None:
    store = Storage(str(tmp_path))
    versions = [store.create("x", b"0")]
    for _ in range(30):
        versions.append(store.replace("x", b"1", versions[-1]))
    assert len(set(versions)) == 31


def test_leftovers_of_killed_writers_are_unseen_and_removed_a_day_later(tmp_path: Path) -> None:
    leftover = tmp_path / "_batchgen/tmp/leftover"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("half")
    now_s = leftover.stat().st_mtime
    store = Storage(str(tmp_path))
    assert store.list_files() == []
    store.delete_leftovers(now_s + 3600)
    assert leftover.exists()
    store.delete_leftovers(now_s + 25 * 3600)
    assert not leftover.exists()


def test_a_disk_without_hard_links_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(os, "link", fail)
    found = probe(Storage(str(tmp_path)))
    assert (found.is_exclusive, found.can_replace) == (False, True)
    unsure = Storage(str(tmp_path), is_exclusive=False)
    unsure.create("x", b"")
    with pytest.raises(AlreadyExists):
        unsure.create("x", b"")


# ---- S3


@s3_only
def test_conditions_hold_for_multipart_uploads(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores_s3, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(stores_s3, "_ONE_PUT_BYTES", 6 * 2**20)
    big = os.urandom(2**20) * 11
    version = store.create("big", big)
    assert store.read_versioned("big") == (big, version)
    with pytest.raises(AlreadyExists):
        store.create("big", big)
    second = store.replace("big", b"2" + big, version)
    with pytest.raises(Conflict):
        store.replace("big", b"3" + big, version)
    assert store.read_versioned("big") == (b"2" + big, second)


@s3_only
def test_a_lost_reply_looks_like_another_creator(store: Storage, s3_proxy: S3Proxy) -> None:
    s3_proxy.drop_reply("/lost$")
    with pytest.raises(AlreadyExists):
        store.create("lost", b"mine")
    assert store.read_bytes("lost") == b"mine"
    assert [seen.method for seen in s3_proxy.seen] == ["PUT", "PUT", "GET"]


@s3_only
def test_killed_between_put_and_reply(store: Storage, s3_proxy: S3Proxy) -> None:
    held = s3_proxy.hold_reply("/second$")
    code = """if True:
        import sys
        from batchgen.storage import Storage
        store = Storage(sys.argv[1])
        store.create("first", b"1")
        store.create("second", b"2")
        store.create("third", b"3")"""
    with subprocess.Popen([sys.executable, "-c", code, store.root]) as process:
        assert held.is_forwarded.wait(120)
        process.send_signal(signal.SIGKILL)
    assert [info.path for info in store.list_files()] == ["first", "second"]
    held.release()


@s3_only
def test_conflicting_writes_are_tried_again(store: Storage, s3_proxy: S3Proxy) -> None:
    s3_proxy.answer(409, "ConditionalRequestConflict", method="PUT", times=2)
    store.create("x", b"mine")
    assert store.read_bytes("x") == b"mine"


@s3_only
def test_slow_down_is_waited_out(store: Storage, s3_proxy: S3Proxy) -> None:
    s3_proxy.slow_down(1)
    store.create("x", b"mine")
    assert store.read_bytes("x") == b"mine"


def test_the_home_of_a_user_that_nobody_knows_is_a_name_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Storage("~no such user/out").root == str(tmp_path / "~no such user/out")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Storage("~/out").root == str(tmp_path / "home/out")
