"""Runs that are killed, stopped, paused and doubled: real processes, real signals, the local disk.

The engine takes 0.1 s a row, so that a job of some hundred rows lasts seconds and a kill meets it half way.
"""

import contextlib
import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from jobs_util import (
    SLOW_ENGINE,
    CliRun,
    Tree,
    call_cli,
    check_conserved,
    check_output,
    count_calls,
    get_key,
    list_output,
    make_tree,
    max_calls_within,
    merge,
    read_folder,
    read_rows,
    read_timed_calls,
    run,
    run_to_end,
    running,
    wait_for,
    write_prompts,
)

from batchgen.driver.control import read_status
from batchgen.storage import Storage

NUM_WORKERS = 2
WINDOW = 8
Files = list[tuple[str, int]]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return write_prompts(tmp_path / "in", (90, 60, 1, 69))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    return tmp_path / "calls"


@pytest.fixture
def tree(tmp_path: Path, files: Files, out: Path, calls: Path) -> Tree:
    del files
    slow = {**SLOW_ENGINE, "max_inflight": WINDOW}
    return make_tree(tmp_path / "in", out, calls, engine=slow, output={"rows_per_shard": 15})


def wait_for_calls(job: CliRun, calls: Path, num_calls: int) -> None:
    wait_for(lambda: count_calls(calls) >= num_calls or not job.is_running, what=f"{num_calls} calls")


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


class Reader:
    """Reads `data/*.parquet` all the time, as anyone may: each file whole when it first shows, no row in two files, none
    ever gone."""

    def __init__(self, out: Path) -> None:
        self._folder = out / "data"
        self._is_done = threading.Event()
        self._keys: dict[str, set[Any]] = {}
        self.faults: list[str] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator["Reader"]:
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield self
        finally:
            self._is_done.set()
            thread.join()
        assert self.faults == []

    def _watch(self) -> None:
        while not self._is_done.is_set():
            try:
                self._look()
            except Exception as error:  # noqa: BLE001 - whatever a reader meets is the finding
                self.faults.append(repr(error))
                return
            time.sleep(0.01)

    def _look(self) -> None:
        names = {str(path) for path in self._folder.iterdir()} if self._folder.exists() else set()
        if gone := self._keys.keys() - names:
            self.faults.append(f"gone: {gone}")
        for name in names - self._keys.keys():
            rows = pq.read_table(name, columns=["source_file", "source_row", "sample_index"]).to_pylist()
            keys = {get_key(row) for row in rows}
            seen = set().union(*self._keys.values())
            if len(keys) < len(rows) or keys & seen:
                self.faults.append(f"{name}: a row is there twice")
            self._keys[name] = keys


# ---- SIGKILL ---------------------------------------------------------------------------------------------------------


def test_killed_at_random_until_done(tree: Tree, files: Files, out: Path, calls: Path, tmp_path: Path) -> None:
    moments, num_kills = random.Random(1), 5
    with Reader(out).watching():
        for number in range(num_kills):
            with running(tmp_path, tree) as job:
                if number:  # the first one is killed anywhere, perhaps before it began
                    wait_for_calls(job, calls, count_calls(calls) + 1)
                time.sleep(moments.uniform(0.0, 0.4))
                job.kill()
        ended = run_to_end(tmp_path, tree)
    assert ended.code == 0, ended.err
    check_output(out, files)
    check_conserved(out, files)
    assert (out / "_SUCCESS").exists()
    assert list_output(out, "_batchgen/journal") == []
    lost_a_kill = NUM_WORKERS * WINDOW + max_calls_within(calls, 0.3 + 0.25)
    assert count_calls(calls) <= 220 + num_kills * lost_a_kill


def test_a_kill_costs_one_journal_interval(tree: Tree, files: Files, out: Path, calls: Path, tmp_path: Path) -> None:
    """Shards too large to be committed in between: only the journal saves rows."""
    large = merge(tree, {"output": {"rows_per_shard": 110, "journal_interval_s": 0.2}})
    for num_calls in (100, 170):
        with running(tmp_path, large) as job:
            wait_for_calls(job, calls, num_calls)
            job.kill()
    assert list_output(out, "_batchgen/journal")
    assert run_to_end(tmp_path, large).code == 0
    check_output(out, files)
    assert count_calls(calls) <= 220 + 2 * (NUM_WORKERS * WINDOW + max_calls_within(calls, 0.2 + 0.2))


def list_told_epochs(out: Path) -> list[int]:
    """Runs whose batches the status object names, the last one's last."""
    told = (read_status(Storage(str(out))) or {}).get("lost_batches", [])
    return sorted({batch["epoch"] for batch in told})


def test_lost_batches_are_accounted(tree: Tree, files: Files, out: Path, calls: Path, tmp_path: Path) -> None:
    """Also those that left nothing behind, over two kills."""
    unsaved = {"output": {"rows_per_shard": 110, "journal_interval_s": 60}, "cluster": {"log_interval_s": 0.1}}
    for epoch in (1, 2):
        with running(tmp_path, merge(tree, unsaved)) as job:
            wait_for_calls(job, calls, count_calls(calls) + 20)
            wait_for(lambda epoch=epoch: list_told_epochs(out)[-1:] == [epoch] or not job.is_running)
            job.kill()
    report, _ = run(merge(tree, {"engine": {"has_latency": False}}))
    check_output(out, files)
    stats = {row["batch_id"]: row for row in read_folder(out, "batch_stats").to_pylist()}
    lost = [row for row in stats.values() if row["outcome"] == "lost"]
    assert {row["epoch"] for row in lost} == {1, 2}
    assert all(row["started_at"] is not None and row["wall_s"] is None for row in lost)
    assert all(row["completion_tokens"] is None for row in lost)  # unknown, not 0
    assert report["job"]["batches"] == {"committed": len(stats) - len(lost), "lost": len(lost)}
    again, _ = run(tree)
    assert again["job"] == report["job"]
    assert read_folder(out, "batch_stats").num_rows == len(stats)


def test_killed_between_the_last_commit_and_the_end(tree: Tree, files: Files, out: Path, tmp_path: Path) -> None:
    fast = merge(tree, {"engine": {"has_latency": False}})
    run(fast, limit=200)
    num_shards = len(list_output(out, "data"))
    with running(tmp_path, merge(tree, {"engine": {"max_inflight": 64, "slots": 64}})) as job:
        wait_for(lambda: len(list_output(out, "data")) == num_shards + 2 or not job.is_running)
        job.kill()
    run(fast)
    check_output(out, files)
    check_conserved(out, files)
    assert (out / "_SUCCESS").exists()


def test_killed_while_error_rows_are_replaced(tree: Tree, files: Files, out: Path, calls: Path, tmp_path: Path) -> None:
    run(merge(tree, {"engine": {"has_latency": False, "failure_rate": 0.5}, "retry": {"max_attempts": 1}}))
    good = {get_key(row): row for row in read_rows(out) if row["status"] == "ok"}
    num_bad = 220 - len(good)
    assert num_bad > 60
    for number in (1, 2):
        with running(tmp_path, tree) as job:
            wait_for_calls(job, calls, 220 + number * num_bad // 3)
            job.kill()
        assert not (out / "_SUCCESS").exists()
        check_output_without_stats(out, 220, good)
    assert run_to_end(tmp_path, tree).code == 0
    check_output_without_stats(out, 220, good)
    check_output(out, files)
    check_conserved(out, files)
    in_time = sorted(read_timed_calls(calls), key=lambda call: call[1])  # files are named by process ids, which wrap
    assert not any(key in good for key, _ in in_time[220:])


def check_output_without_stats(out: Path, num_rows: int, good: dict[Any, Any]) -> None:
    rows = {get_key(row): row for row in read_rows(out)}
    assert len(rows) == num_rows == len(read_rows(out))
    assert {key: rows[key] for key in good} == good


# ---- two drivers -----------------------------------------------------------------------------------------------------


def test_the_second_driver_is_told_who_works_here(
    tree: Tree, files: Files, out: Path, calls: Path, tmp_path: Path
) -> None:
    # So slow that it never ends before the second one has started, however busy the machine is.
    endless = merge(tree, {"cluster": {"lease_ttl_s": 3}, "engine": {"decode_tokens_per_s": 5}})
    with running(tmp_path, endless) as first:
        wait_for_calls(first, calls, 10)
        second = run_to_end(tmp_path, endless)
        assert second.code == 2
        assert f"process {first.process.pid} on" in second.err
        assert "Traceback" not in second.err
        assert first.is_running
        first.kill()
    assert not (out / "_SUCCESS").exists()
    assert run_to_end(tmp_path, tree).code == 0
    check_output(out, files)
    assert read_json(out / "manifest.json")["epoch"] == 2


def test_two_drivers_started_at_once(tree: Tree, files: Files, out: Path, calls: Path, tmp_path: Path) -> None:
    # Long enough that neither has ended before the other looks.
    tree = merge(tree, {"cluster": {"lease_ttl_s": 3}, "engine": {"decode_tokens_per_s": 40}})
    with running(tmp_path, tree) as one, running(tmp_path, tree) as other:
        codes = sorted([one.wait().code, other.wait().code])
    assert codes == [0, 2], one.err + other.err
    check_output(out, files)
    assert count_calls(calls) == 220


def test_a_driver_that_was_paused_too_long_stops(
    tree: Tree, files: Files, out: Path, calls: Path, tmp_path: Path
) -> None:
    tree = merge(tree, {"cluster": {"lease_ttl_s": 1.2}})
    with running(tmp_path, tree) as first, contextlib.ExitStack() as stack:
        wait_for_calls(first, calls, 30)
        first.signal(signal.SIGSTOP)
        num_calls = count_calls(calls)
        second = stack.enter_context(running(tmp_path, tree))
        wait_for_calls(second, calls, num_calls + 20)
        first.signal(signal.SIGCONT)
        ended = first.wait()
        assert ended.code == 3
        # Two threads find out, and the scheduler says which is first: one that another took it over, one that time went by.
        assert "took" in ended.err or "could not renew the lease" in ended.err
        assert "Traceback" not in ended.err
        assert second.is_running
        assert second.wait().code == 0
    check_output(out, files)
    check_conserved(out, files)
    assert read_json(out / "_SUCCESS")["epoch"] == read_json(out / "manifest.json")["epoch"] == 2


# ---- asked to stop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "cancel"])
def test_asked_to_stop_it_loses_no_finished_row(
    tree: Tree, files: Files, out: Path, calls: Path, tmp_path: Path, how: str
) -> None:
    tree = merge(tree, {"cluster": {"lease_ttl_s": 3}, "output": {"rows_per_shard": 110, "journal_interval_s": 60}})
    # Long enough that most rows are left when the run looks whether it was cancelled.
    with running(tmp_path, merge(tree, {"engine": {"decode_tokens_per_s": 40}})) as job:
        wait_for_calls(job, calls, 30)
        if how == "cancel":
            assert call_cli("cancel", str(out)).code == 0
        else:
            job.signal(signal.Signals[how])
        ended = job.wait()
    assert ended.code == 3
    assert ended.report["state"] == "stopped"
    assert ("cancel" if how == "cancel" else "signal") in ended.report["message"]
    assert list_output(out, "_batchgen/journal")
    assert not (out / "_SUCCESS").exists()
    num_calls = count_calls(calls)
    assert num_calls < 200
    report, _ = run(merge(tree, {"engine": {"has_latency": False}}))
    assert report["exit_code"] == 0
    check_output(out, files)
    assert count_calls(calls) == 220
    stats = read_folder(out, "batch_stats").to_pylist()
    num_journaled = sum(row["num_rows_from_journal"] or 0 for row in stats)
    committed = [row for row in stats if row["epoch"] == 1 and row["outcome"] == "committed"]
    assert num_journaled + sum(row["num_rows_ok"] for row in committed) == num_calls


def test_a_stop_does_not_wait_for_rows_beyond_the_drain(
    tree: Tree, files: Files, out: Path, calls: Path, tmp_path: Path
) -> None:
    endless = merge(tree, {"engine": {"decode_tokens_per_s": 0.01}, "cluster": {"drain_s": 0.2}})
    with running(tmp_path, endless) as job:
        wait_for_calls(job, calls, 10)
        job.signal(signal.SIGTERM)
        started = time.monotonic()
        assert job.wait().code == 3
    assert time.monotonic() - started < 60
    assert run(merge(tree, {"engine": {"has_latency": False}}))[0]["exit_code"] == 0
    check_output(out, files)
