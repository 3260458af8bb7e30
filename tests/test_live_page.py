"""The page of a run that goes on: a thread's work, which neither holds up the loop nor outlives the run's last words."""

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from jobs_util import check_output, make_tree, run, write_prompts

from batchgen.driver import live_page
from batchgen.driver.fence import Fence
from batchgen.errors import LeaseLost, StorageError
from batchgen.report.page import make_html
from batchgen.stores.local import LocalClient

# The plan makes a few more, and a worker holds fewer at once.
NUM_SHARDS = 30
PATIENCE_S = 60.0


def make_job(folder: Path, **over: Any) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """More shards than a worker holds at once: without a loop that lends, the run would stand."""
    files = write_prompts(folder / "in", (150, 150))
    tree = make_tree(folder / "in", folder / "out", folder / "calls", output={"rows_per_shard": 10}, **over)
    tree["engine"] |= {"has_latency": True, "decode_tokens_per_s": 2000, "slots": 4, "max_inflight": 6}
    return tree, files


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_page, "INTERVAL_S", 0.0)
    monkeypatch.setattr(live_page, "PATIENCE", 0.0)


def list_shards(out: Path) -> list[Path]:
    return list((out / "data").glob("*.parquet"))


def wait_for_shards(out: Path, num: int) -> int:
    end = time.monotonic() + PATIENCE_S
    while len(list_shards(out)) < num and time.monotonic() < end:
        time.sleep(0.01)
    return len(list_shards(out))


def test_pages_of_a_run_tell_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first page takes half of the run, so that a later one has something to tell."""
    tree, files = make_job(tmp_path, gates={"canary": {"rows": 20, "max_error_rate": 0.5}})
    seen: list[dict[str, Any]] = []

    def make(report: dict[str, Any]) -> str:
        seen.append(report)
        wait_for_shards(tmp_path / "out", NUM_SHARDS // 2)
        return make_html(report)

    monkeypatch.setattr(live_page, "make_html", make)
    run(tree)
    for thread in threading.enumerate():
        if thread.name == "live-page":
            thread.join(PATIENCE_S)
    check_output(tmp_path / "out", files)
    assert {report["state"] for report in seen} == {"running"}
    assert {report["rows"]["input"] for report in seen} == {300}
    done = [report["rows"]["output"] for report in seen]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] >= 100
    assert (seen[0]["gates"]["seen"], list(seen[-1]["gates"]["seen"])) == ({}, ["canary"])


def test_a_page_that_takes_for_ever_delays_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first page is made until the run has almost ended: made in the loop, it would wait for itself."""
    tree, files = make_job(tmp_path)
    found: list[int] = []

    def make_slowly(report: dict[str, Any]) -> str:
        found.append(wait_for_shards(tmp_path / "out", NUM_SHARDS))
        return make_html(report)

    monkeypatch.setattr(live_page, "make_html", make_slowly)
    run(tree)
    check_output(tmp_path / "out", files)
    assert found
    assert found[0] >= NUM_SHARDS


def test_the_last_word_is_the_runs_not_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is still being made when the run ends is dropped, whenever it is ready."""
    tree, _ = make_job(tmp_path)
    may_go_on, is_made = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def make_late(_: dict[str, Any]) -> str:
        threads.append(threading.current_thread())
        may_go_on.wait(PATIENCE_S)
        is_made.set()
        return "too late"

    monkeypatch.setattr(live_page, "make_html", make_late)
    run(tree)
    assert not is_made.is_set()
    page = (tmp_path / "out" / "report.html").read_bytes()
    may_go_on.set()
    threads[0].join(PATIENCE_S)
    assert is_made.is_set()
    assert len(threads) == 1
    assert (tmp_path / "out" / "report.html").read_bytes() == page
    assert b"finished" in page


def fail_pages(monkeypatch: pytest.MonkeyPatch, num: int) -> list[str]:
    """The store fails whoever writes the page, the first `num` times; what was tried."""
    tried: list[str] = []
    write = LocalClient.write

    def fail(self: LocalClient, name: str, data: bytes | memoryview, if_version: str | None) -> str:
        if name.endswith("report.html") and len(tried) < num:
            tried.append(name)
            raise StorageError("the store is away")
        return write(self, name, data, if_version)

    monkeypatch.setattr(LocalClient, "write", fail)
    return tried


def test_a_store_that_fails_a_page_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, files = make_job(tmp_path)
    tried = fail_pages(monkeypatch, 2)
    seen: list[str] = []
    monkeypatch.setattr(live_page, "make_html", lambda report: seen.append("one") or make_html(report))
    run(tree)
    assert len(tried) == 2
    assert len(seen) > 2
    check_output(tmp_path / "out", files)


def test_a_folder_that_is_lost_meanwhile_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread finds it out, at its page; the loop raises it."""
    tree, _ = make_job(tmp_path)

    def put(_self: Fence, path: str, _data: bytes) -> None:
        raise LeaseLost(f"another run wrote {path}")

    monkeypatch.setattr(Fence, "put", put)
    with pytest.raises(LeaseLost, match=r"another run wrote report\.html"):
        run(tree)
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert len(list_shards(tmp_path / "out")) < NUM_SHARDS


def test_a_page_that_can_not_be_drawn_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, files = make_job(tmp_path)
    asked: list[str] = []

    def draw(_: dict[str, Any]) -> str:
        asked.append("one")
        raise ZeroDivisionError("a prompt may stand here")

    monkeypatch.setattr(live_page, "make_html", draw)
    _, view = run(tree)
    check_output(tmp_path / "out", files)
    assert len(asked) == 1
    (told,) = [warning for warning in view.warned if "report.html" in warning]
    assert re.fullmatch(r"report\.html is not kept up until the run ends: ZeroDivisionError in \w+\.py:\d+", told)
