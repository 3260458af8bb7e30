"""Answers so far: kept in bounds, journaled, and gone on with by whoever has the row next."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs_util import (
    RecordingView,
    Tree,
    check_conserved,
    check_output,
    make_tree,
    merge,
    run,
    running,
    wait_for,
    write_prompts,
)

from batchgen import journal
from batchgen.driver.inline_pool import InlinePool
from batchgen.driver.run import run_job
from batchgen.engines.simulated import SimulatedEngine
from batchgen.queue.events import PoolEvent, WorkerLost
from batchgen.records import Generation, Partial, Request, RowId, TokenLogprob
from batchgen.specs.load import make_spec
from batchgen.storage import Storage
from batchgen.verify.verify import verify
from batchgen.worker import spill
from batchgen.worker.partial_rows import SCHEMA, make_partial_rows, read_partial_rows
from batchgen.worker.partials import Kept, Partials
from batchgen.worker.worker import WorkerSetup

A, B = RowId("file", 1, 0), RowId("file", 2, 0)
ROWS, BUDGET = 12, 20


# ---- in memory -------------------------------------------------------------------------------------------------------


def test_a_row_is_kept_until_it_is_answered() -> None:
    partials = Partials()
    partials.note(A, Partial((1, 2)), 3)
    assert partials.get(A) == Kept(Partial((1, 2)), 3)
    partials.forget(A)
    assert partials.get(A) is None
    assert partials.list_new() == []


def test_the_longest_untouched_goes_first() -> None:
    partials = Partials(max_values=5)
    partials.note(A, Partial((1, 2)), None)
    partials.note(B, Partial((1, 2)), None)
    partials.note(A, Partial((1, 2, 3)), None)
    assert partials.get(B) is not None
    partials.note(A, Partial((1, 2, 3, 4)), None)
    assert partials.get(B) is None
    assert [row_id for row_id, _ in partials.iter_all()] == [A]


def test_logprobs_count_as_well() -> None:
    top = ((1, -0.1), (2, -2.5))
    partials = Partials(max_values=5)
    partials.note(A, Partial((1,)), None)
    partials.note(B, Partial((1,), (TokenLogprob(1, -0.1, top),)), None)
    assert partials.get(A) is not None
    partials.note(B, Partial((1, 2), (TokenLogprob(1, -0.1, top), TokenLogprob(2, -0.1, top))), None)
    assert (partials.get(A), partials.get(B)) == (None, None), "8 values are too many for it alone"


def test_what_grew_while_it_was_written_is_new_still() -> None:
    partials = Partials()
    partials.note(A, Partial((1,)), None)
    written = partials.list_new()
    partials.note(A, Partial((1, 2)), None)
    partials.note_journaled(written)
    assert partials.list_new() == [(A, Partial((1, 2)))]
    partials.note_journaled(partials.list_new())
    assert partials.list_new() == []


def test_of_two_workers_answers_the_longer_counts_and_is_not_written_again() -> None:
    partials = Partials()
    partials.note(A, Partial((1, 2)), 1)
    partials.load([(A, Partial((7,))), (B, Partial((8,)))])
    assert partials.get(A) == Kept(Partial((1, 2)), 1)
    assert partials.get(B) == Kept(Partial((8,)), is_own=False)
    partials.load([(A, Partial((7, 7, 7)))])
    assert partials.get(A) == Kept(Partial((7, 7, 7)), is_own=False)
    assert partials.list_new() == []


# ---- as Arrow --------------------------------------------------------------------------------------------------------

TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)
FLOATS = st.floats(-50, 0, width=32)
PAIRS = st.lists(st.tuples(st.none() | st.integers(0, 9), FLOATS), max_size=3).map(tuple)
LOGPROBS = st.lists(st.builds(TokenLogprob, st.none() | st.integers(0, 9), FLOATS, PAIRS), max_size=4).map(tuple)
SOME = st.none() | st.floats(0, 9)
PARTIALS = st.builds(
    Partial, TOKENS.map(tuple), st.none() | LOGPROBS, st.none() | st.integers(0, 9), SOME, SOME
)  # fmt: skip
SLOTS = st.tuples(st.integers(0, 99), st.integers(0, 3))


@settings(deadline=None)
@given(st.dictionaries(SLOTS, PARTIALS, max_size=5))
def test_what_is_written_is_read_back(found: dict[tuple[int, int], Partial]) -> None:
    rows = make_partial_rows(list(found.items()))
    assert rows.schema == SCHEMA
    assert read_partial_rows(rows) == found


def test_of_one_request_the_longest_is_read() -> None:
    many = [((1, 0), Partial((1,))), ((1, 0), Partial((1, 2))), ((1, 0), Partial((9,)))]
    assert read_partial_rows(make_partial_rows(many)) == {(1, 0): Partial((1, 2))}


# ---- through the journal ---------------------------------------------------------------------------------------------


class DyingPool(InlinePool):
    """Ends its first worker without mercy when `is_time`."""

    is_time: Callable[[], bool] = staticmethod(lambda: False)
    num_killed = 0

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        events = super().poll(min(timeout_s, 0.05))
        if self.num_killed or not self.is_time():
            return events
        self.num_killed, victim = 1, "worker-0001"
        self.kill(victim)
        left = [event for event in events if getattr(event, "worker_id", "") != victim]
        return [*left, WorkerLost(victim, "killed by the test")]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RowId, int, int]]:
    """(row, tokens there already, tokens generated) of every part that ended, or was lost with its tokens unknown."""
    parts: list[tuple[RowId, int, int]] = []
    lock, generate = threading.Lock(), SimulatedEngine.generate

    async def record(self: SimulatedEngine, request: Request) -> Generation:
        answer = await generate(self, request)
        done = 0 if request.partial is None else len(request.partial.token_ids)
        with lock:
            parts.append((request.row_id, done, len(answer.token_ids or ())))
        return answer

    monkeypatch.setattr(SimulatedEngine, "generate", record)
    return parts


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """All rows at once in one shard, each of about 90 tokens in parts of 20: no row ends for a while."""
    engine = {"has_latency": True, "slots": ROWS, "max_inflight": ROWS, "decode_tokens_per_s": 100}
    return make_tree(
        tmp_path / "in", tmp_path / "out", tmp_path / "calls",
        engine={**engine, "sigma": 0.0, "mean_tokens": 90, "token_budget": BUDGET},
        sampling={"max_tokens": 200}, cluster={"workers": {"min": 1, "max": 1}},
        output={"rows_per_shard": ROWS, "journal_interval_s": 0.1},
    )  # fmt: skip


def list_partials(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "out" / journal.FOLDER).glob("*-partials.parquet"))


def read_texts(out: Path, files: list[tuple[str, int]]) -> list[Any]:
    return [(row["custom_id"], row["text"], row["completion_tokens"]) for row in check_output(out, files)]


def test_a_lost_worker_costs_a_row_one_part_at_most(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[RowId, int, int]]
) -> None:
    files = write_prompts(tmp_path / "in", (ROWS,))
    pools: list[DyingPool] = []

    def is_time() -> bool:
        """Every row's first part is journaled; none has ended."""
        journaled: set[int] = set()
        for path in list_partials(tmp_path):
            journaled |= set(pq.read_table(path)["source_row"].to_pylist())
        return len(journaled) == ROWS

    def create_pool(setup: WorkerSetup) -> DyingPool:
        pools.append(DyingPool(setup))
        pools[-1].is_time = is_time  # type: ignore[method-assign]
        return pools[-1]

    view = RecordingView()
    report = run_job(make_spec(tree), view, create_pool=create_pool)
    assert report["exit_code"] == 0, view.warned
    assert pools[0].num_killed == 1
    begun_anew = [row_id for row_id, done, _ in asked if done == 0]
    assert len(begun_anew) == ROWS, "each row was begun once"
    assert list_partials(tmp_path) == [], "they went with the shard's commit"
    check_conserved(tmp_path / "out", files)
    plain = merge(tree, {"output": {"path": str(tmp_path / "plain")}, "engine": {"has_latency": False}})
    monkeypatch.undo()
    run(plain)
    assert read_texts(tmp_path / "out", files) == read_texts(tmp_path / "plain", files)


def test_many_segments_of_a_shard_become_one(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[RowId, int, int]]
) -> None:
    files = write_prompts(tmp_path / "in", (ROWS,))
    monkeypatch.setattr(spill, "MAX_SEGMENTS", 2)
    most: list[int] = []
    write = spill.Spill._write_partials

    async def look(self: spill.Spill, *args: Any) -> None:
        await write(self, *args)
        most.append(len(list_partials(tmp_path)))

    monkeypatch.setattr(spill.Spill, "_write_partials", look)
    report, view = run(merge(tree, {"engine": {"sigma": 0.4}, "output": {"journal_interval_s": 0.02}}))
    assert report["exit_code"] == 0, view.warned
    assert len(most) > 4
    assert max(most) <= 5, "the driver deletes merged ones at its next turn"
    check_output(tmp_path / "out", files)
    del asked


def test_a_killed_run_leaves_them_to_the_next_and_a_damaged_one_is_named(tree: Tree, tmp_path: Path) -> None:
    files, out = write_prompts(tmp_path / "in", (ROWS,)), tmp_path / "out"
    slow = merge(tree, {"engine": {"decode_tokens_per_s": 25}})
    with running(tmp_path, slow) as job:
        wait_for(lambda: list_partials(tmp_path) or not job.is_running)
        job.kill()
    (path, *_) = list_partials(tmp_path)
    assert not any(path.name in str(finding) for finding in verify(Storage(str(out))).findings)
    data = bytearray(path.read_bytes())
    data[40] ^= 0xFF
    path.write_bytes(data)
    assert any(path.name in str(finding) for finding in verify(Storage(str(out))).findings)
    report, view = run(merge(tree, {"engine": {"has_latency": False}}))
    assert report["exit_code"] == 0
    assert any(path.name in warning for warning in view.warned)
    check_output(out, files)
    assert list_partials(tmp_path) == []
