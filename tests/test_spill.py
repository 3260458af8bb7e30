"""Finished rows on their way: out of memory, merged, damaged, and always there again at the commit."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs_util import (
    Tree,
    check_conserved,
    check_output,
    count_calls,
    list_output,
    make_tree,
    merge,
    run,
    run_to_end,
    running,
    wait_for,
    write_prompts,
)

from batchgen.errors import OutputError, StorageError
from batchgen.journal import FOLDER
from batchgen.records import JournalRef
from batchgen.storage import Storage
from batchgen.worker import spill
from batchgen.worker.shard_files import ShardFiles

SLOW = {"has_latency": True, "slots": 8, "max_inflight": 8, "decode_tokens_per_s": 200, "sigma": 0.3}
Files = list[tuple[str, int]]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return write_prompts(tmp_path / "in", (150,))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """One shard, so that nothing is committed before the end."""
    return make_tree(
        tmp_path / "in",
        tmp_path / "out",
        tmp_path / "calls",
        engine=SLOW,
        output={"rows_per_shard": 150, "journal_interval_s": 0.05},
        cluster={"workers": {"min": 1, "max": 1}},
    )


def list_segments(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "out" / FOLDER).glob("*.parquet"))


def stop_half_way(tree: Tree, tmp_path: Path, num_calls: int = 90) -> None:
    with running(tmp_path, tree) as job:
        wait_for(lambda: count_calls(tmp_path / "calls") >= num_calls or not job.is_running)
        job.kill()


@pytest.mark.parametrize("max_segments", [2, 1000])
def test_rows_that_left_memory_are_read_back(
    tree: Tree, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_segments: int
) -> None:
    """No journaled row stays in memory; with many segments merged and without."""
    monkeypatch.setattr(spill, "MAX_KEPT_BYTES", 0)
    monkeypatch.setattr(spill, "MAX_SEGMENTS", max_segments)
    seen: list[int] = []
    flush = spill.Spill._flush

    async def look(self: spill.Spill, shards: Any) -> None:
        await flush(self, shards)
        seen.append(len(list_segments(tmp_path)))

    monkeypatch.setattr(spill.Spill, "_flush", look)
    run(tree)
    rows = check_output(tmp_path / "out", files)
    assert {row["status"] for row in rows} == {"ok"}
    check_conserved(tmp_path / "out", files)
    assert count_calls(tmp_path / "calls") == 150
    assert list_segments(tmp_path) == []
    assert len(seen) > 6
    if max_segments == 2:
        assert max(seen) <= 6, "the driver deletes merged ones at its next turn"
    else:
        assert max(seen) > 6


def test_a_large_flush_does_not_wait_for_the_interval(
    tree: Tree, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "MAX_UNFLUSHED_BYTES", 1)
    monkeypatch.setattr(spill, "LOOK_S", 0.05)
    monkeypatch.setattr("batchgen.worker.open_shard.BATCH_ROWS", 8)
    flushed: list[int] = []
    flush = spill.Spill._flush

    async def look(self: spill.Spill, shards: Any) -> None:
        flushed.append(1)
        await flush(self, shards)

    monkeypatch.setattr(spill.Spill, "_flush", look)
    run(merge(tree, {"output": {"journal_interval_s": 3600}}))
    check_output(tmp_path / "out", files)
    assert len(flushed) > 2


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_a_damaged_segment_costs_its_rows_and_nobody_is_woken(
    tree: Tree, files: Files, tmp_path: Path, damage: str
) -> None:
    stop_half_way(tree, tmp_path)
    segments = list_segments(tmp_path)
    assert len(segments) > 3
    victim = segments[1]
    num_lost, data = pq.read_table(victim).num_rows, bytearray(victim.read_bytes())
    if damage == "flipped":
        data[40] ^= 0xFF
    victim.write_bytes({"torn": data[: len(data) // 2], "flipped": data, "empty": b""}[damage])
    num_calls = count_calls(tmp_path / "calls")
    saved = sum(pq.read_table(path).num_rows for path in segments if path != victim)
    report, view = run(merge(tree, {"engine": {"has_latency": False}}))
    assert report["exit_code"] == 0
    warned = [warning for warning in view.warned if victim.name in warning]
    assert len(warned) == 1
    assert "left out, its rows are generated again" in warned[0]
    check_output(tmp_path / "out", files)
    assert num_lost > 0
    assert count_calls(tmp_path / "calls") == num_calls + 150 - saved


def test_a_file_that_is_none_of_ours_is_refused(tree: Tree, files: Files, tmp_path: Path) -> None:
    stop_half_way(tree, tmp_path, 30)
    pq.write_table(pq.read_table(files[0][0]), tmp_path / "out" / FOLDER / "e000001-mine-000001.parquet")
    with pytest.raises(OutputError, match=r"mine-000001\.parquet: was not written by batchgen; remove it"):
        run(tree)
    ended = run_to_end(tmp_path, tree)
    assert (ended.code, ended.report["state"]) == (2, "refused")
    assert list_output(tmp_path / "out", "data") == []


def test_a_crash_between_merging_and_deleting_leaves_rows_twice_and_commits_them_once(
    tree: Tree, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver never hears of the merge, and both old and new segments stay."""
    monkeypatch.setattr(spill, "MAX_SEGMENTS", 2)
    monkeypatch.setattr("batchgen.journal.JournalIndex.replace", lambda *_: [])
    run(tree)
    assert {row["status"] for row in check_output(tmp_path / "out", files)} == {"ok"}
    assert count_calls(tmp_path / "calls") == 150


def test_a_flush_under_way_at_the_last_commit_leaves_no_segment(
    tree: Tree, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the store takes a while: its news came when nobody listened any more."""
    late: list[str] = []
    write_segment = ShardFiles.write_segment

    def write_late(self: ShardFiles, path: str, rows: dict[int, pa.Table]) -> dict[int, JournalRef]:
        wait_for(lambda: list_output(tmp_path / "out", "data") != [])
        late.append(path)
        return write_segment(self, path, rows)

    monkeypatch.setattr(ShardFiles, "write_segment", write_late)
    report, view = run(tree)
    assert report["exit_code"] == 0, view.warned
    assert late
    assert list_segments(tmp_path) == []
    check_output(tmp_path / "out", files)


def test_a_segment_that_was_left_behind_goes_though_nothing_is_left_to_do(
    tree: Tree, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store may fail, or the driver die, behind the last commit; and at the next start the store may fail again."""
    delete_many = Storage.delete_many

    def refuse(self: Storage, paths: Iterable[str]) -> None:
        held = list(paths)
        if any(path.startswith(FOLDER) for path in held):
            raise StorageError("out of order")
        delete_many(self, held)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete_many", refuse)
        for _ in range(2):
            report, view = run(tree)
            assert report["exit_code"] == 0
            assert any("were not deleted" in warning for warning in view.warned)
            assert list_segments(tmp_path) != []
    report, view = run(tree)
    assert any("nothing left to do" in line for line in view.said)
    assert view.warned == []
    assert list_segments(tmp_path) == []
    check_output(tmp_path / "out", files)
