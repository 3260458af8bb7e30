"""Exact duplicates inside a run: sent once a job where that changes nothing, and every row there with its identity."""

import asyncio
import random
from array import array
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from jobs_util import Tree, check_output, make_tree, merge, read_stats, run, write_file
from makers import make_error, make_job_spec, make_lease, make_ok, make_rows, make_shard

import batchgen.driver.run
from batchgen.driver.inline_pool import InlinePool
from batchgen.engines.simulated import read_calls
from batchgen.journal import make_segment_path, write_segment
from batchgen.queue.claim_table import make_place
from batchgen.queue.events import ClaimsMade, Heartbeat, PoolEvent, WorkerLost
from batchgen.queue.orders import ClaimsDecided, LookAt
from batchgen.records import JournalRef, Request, Result, RowId, SamplingParams, Slot, TokenLogprob
from batchgen.reuse import copies, desk, duplicates
from batchgen.reuse.answers import Answers
from batchgen.reuse.copies import make_copy
from batchgen.reuse.duplicates import make_duplicates
from batchgen.reuse.lookout import Around
from batchgen.storage import Storage
from batchgen.verify.verify import verify
from batchgen.worker.open_shard import OpenShard
from batchgen.worker.tasks import TaskGroup
from batchgen.worker.worker import WorkerSetup
from batchgen.write import make_result_schema

SAME = b"same" * 4
GREEDY: Tree = {"sampling": {"temperature": 0}, "cluster": {"workers": {"min": 1, "max": 1}}}


def make_job(folder: Path, prompts: list[str], **over: Tree) -> Tree:
    write_file(folder / "in.parquet", pa.table({"prompt": prompts}))
    return make_tree(folder / "in.parquet", folder / "out", folder / "calls", **merge(GREEDY, over))


def run_well(folder: Path, tree: Tree, num_rows: int) -> tuple[list[Tree], int]:
    """(rows, engine calls)."""
    report, _ = run(tree)
    assert report["exit_code"] == 0
    verdict = verify(Storage(str(folder / "out")))
    assert (verdict.findings, verdict.todo) == ([], [])
    rows = check_output(folder / "out", [(str(folder / "in.parquet"), num_rows)], tree["sampling"].get("n", 1))
    return rows, len(read_calls(str(folder / "calls")))


@pytest.mark.parametrize("latency", [False, True])
@pytest.mark.parametrize(
    "prompts", [[f"q{i % 7}" for i in range(60)], [f"q{i // 10}" for i in range(60)]], ids=["far", "near"]
)
def test_greedy_duplicates_are_sent_once(tmp_path: Path, prompts: list[str], latency: bool) -> None:
    """Across the shards of a worker, whether the first is answered already or in flight; adjacent ones keep no slot."""
    engine = {"has_latency": latency, "decode_tokens_per_s": 500, "max_inflight": 4}
    tree = make_job(tmp_path, prompts, engine=engine)
    rows, num_calls = run_well(tmp_path, tree, 60)
    assert num_calls == len(set(prompts))
    texts: dict[str, set[str]] = {}
    for row, prompt in zip(rows, prompts, strict=True):
        texts.setdefault(prompt, set()).add(row["text"])
    assert all(len(found) == 1 for found in texts.values())
    stats = read_stats(tmp_path / "out")
    for row in rows:
        if row["reused_from"] is None:
            assert stats[row["batch_id"]]["outcome"] == "committed"
        else:
            assert stats[row["batch_id"]]["outcome"] == "reused"
            assert stats[row["reused_from"]]["outcome"] == "committed"
            assert (row["num_attempts"], row["latency_s"]) == (0, None)


def test_samples_of_a_greedy_row_are_one_answer(tmp_path: Path) -> None:
    rows, num_calls = run_well(tmp_path, make_job(tmp_path, ["a", "b"], sampling={"n": 3}), 2)
    assert num_calls == 2
    assert [len({row["text"] for row in rows if row["source_row"] == number}) for number in (0, 1)] == [1, 1]


KEPT_APART: list[Tree] = [{"sampling": {"temperature": 1.0}}, {"input": {"duplicates": "generate"}}]
KEPT_APART += [{"sampling": {"temperature": 1.0, "seed": 3}}, {"output": {"row_fingerprints": False}}]


@pytest.mark.parametrize("over", KEPT_APART, ids=str)
def test_what_would_be_drawn_is_drawn_for_each(tmp_path: Path, over: Tree) -> None:
    _, num_calls = run_well(tmp_path, make_job(tmp_path, ["same"] * 30, **over), 30)
    assert num_calls == 30


def test_the_spec_may_allow_it_for_any_sampling(tmp_path: Path) -> None:
    over: Tree = {"sampling": {"temperature": 1.0}, "input": {"duplicates": "copy"}}
    _, num_calls = run_well(tmp_path, make_job(tmp_path, ["same"] * 30, **over), 30)
    assert num_calls == 1


def test_every_duplicate_fails_by_itself(tmp_path: Path) -> None:
    """An error is no answer: it is never copied, whether the engine refuses or a retry runs out."""
    prompts = ["bad"] * 5 + ["good"] * 5
    tree = make_job(tmp_path, prompts, engine={"reject_text": "bad"}, retry={"max_error_rate": 1.0})
    report, _ = run(tree)
    rows = check_output(tmp_path / "out", [(str(tmp_path / "in.parquet"), 10)])
    assert [row["status"] for row in rows] == ["error"] * 5 + ["ok"] * 5
    assert [row["num_attempts"] for row in rows[:5]] == [1] * 5
    assert report["rows"]["error"] == 5
    assert len(read_calls(str(tmp_path / "calls"))) == 6


def test_a_first_attempt_that_fails_is_waited_for(tmp_path: Path) -> None:
    tree = make_job(tmp_path, ["same"] * 20, engine={"failure_rate": 1.0})
    rows, num_calls = run_well(tmp_path, tree, 20)
    assert num_calls == 2
    assert sorted(row["num_attempts"] for row in rows) == [0] * 19 + [2]


# ---- one worker, its driver played here ------------------------------------------------------------------------------


class Played:
    """The real `Duplicates` of a worker that has one shard of ten rows; what it sends and reads again is noted."""

    def __init__(self, folder: Path, **over: Any) -> None:
        self.spec = make_job_spec(**{**GREEDY, "output": {"path": str(folder)}, **over})
        self.emitted, self.sent, self.read = list[PoolEvent](), list[int](), list[list[int]]()
        duplicates = make_duplicates(self.spec, self.push, self.feed)
        assert duplicates is not None
        self.duplicates = duplicates
        self.shard = self.open_shard()
        self.tasks = TaskGroup(pytest.fail)
        answers = Answers(Storage(str(folder)), self.spec)
        duplicates.open(Around("w1", answers, self.emitted.append, self.tasks.spawn, {"batch": self.shard}))
        self.tasks.spawn(duplicates.run())

    def open_shard(self, number: int = 0) -> OpenShard:
        return OpenShard(make_lease(make_shard(number)), 1, make_result_schema(self.spec))

    async def push(self, _: OpenShard, requests: list[Request]) -> None:
        self.sent += [request.row_id.source_row for request in requests]

    async def feed(self, shard: OpenShard, wanted: Collection[Slot] | None = None) -> None:
        rows = sorted(row for row, _ in wanted or ())
        self.read.append(rows)
        for row in rows:
            if self.duplicates.admit(shard, make_same(row)):
                self.sent.append(row)

    def admit(self, *rows: int, fingerprint: bytes = SAME) -> list[bool]:
        return [self.duplicates.admit(self.shard, make_same(row, fingerprint)) for row in rows]

    async def answer(self, *owners: int | None, looks: Sequence[LookAt] = ()) -> ClaimsMade:
        """The driver's word on the next question; None: its own."""
        asked = await self.hear()
        places = array("Q", asked.places)
        told = array("Q", (place if owner is None else owner for owner, place in zip(owners, places, strict=True)))
        await self.duplicates.obey(ClaimsDecided(asked.number, told.tobytes(), tuple(looks)))
        return asked

    async def hear(self) -> ClaimsMade:
        async with asyncio.timeout(20):
            while not self.emitted:
                await asyncio.sleep(0.01)
        event = self.emitted.pop(0)
        assert isinstance(event, ClaimsMade)
        return event

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not is_so():
                await asyncio.sleep(0.01)


def play(folder: Path, act: Callable[[Played], Awaitable[None]], **over: Any) -> None:
    async def main() -> None:
        played = Played(folder, **over)
        await act(played)
        await played.tasks.cancel()

    asyncio.run(main())


def make_same(row: int, fingerprint: bytes = SAME) -> Request:
    return Request(RowId("/data/in.parquet", row, 0), (1,), SamplingParams(temperature=0), fingerprint=fingerprint)


def test_the_first_asks_and_the_others_wait_behind_it(tmp_path: Path) -> None:
    async def act(played: Played) -> None:
        assert played.admit(0, 1, 2) == [False] * 3
        asked = await played.answer(None)
        assert list(array("Q", asked.places)) == [make_place(0, (0, 0), 1)]
        assert played.sent == [0]
        assert played.shard.progress.num_waiting == 2
        assert played.shard.choose_to_give(9) == []  # nothing is known of the journal yet
        played.shard.is_recovered = True
        assert [row for row, _ in played.shard.choose_to_give(9)] == [9, 8, 7, 6, 5, 4, 3, 0]
        played.duplicates.note_result(played.shard, make_same(0), make_ok(0, fingerprint=SAME))
        assert [played.shard.is_finished(row, 0) for row in range(4)] == [False, True, True, False]
        assert played.shard.progress.num_waiting == 0
        assert played.admit(5) == [False]
        assert played.shard.is_finished(5, 0)

    play(tmp_path, act)


def test_many_copies_do_not_hold_the_loop(tmp_path: Path) -> None:
    async def act(played: Played) -> None:
        shard = OpenShard(make_lease(make_shard(row_end=2000)), 1, make_result_schema(played.spec))
        assert not any(played.duplicates.admit(shard, make_same(row)) for row in range(2000))
        await played.answer(None)
        played.duplicates.note_result(shard, make_same(0), make_ok(0, fingerprint=SAME))
        assert sum(shard.is_finished(row, 0) for row in range(2000)) < 300
        await played.until(lambda: all(shard.is_finished(row, 0) for row in range(1, 2000)))

    play(tmp_path, act)


def test_one_that_comes_back_does_not_wait_for_itself(tmp_path: Path) -> None:
    """It was given to another worker and is read again before anybody saw that it had gone."""

    async def act(played: Played) -> None:
        played.admit(0, 1)
        await played.answer(None)
        played.shard.give([(0, 0)], "its share")
        assert played.shard.take_back(["its share"]) == [(0, 0)]
        assert played.admit(0) == [True]
        played.duplicates.note_result(played.shard, make_same(0), make_ok(0, fingerprint=SAME))
        assert played.shard.is_finished(1, 0)

    play(tmp_path, act)


def test_a_row_that_went_to_another_worker_is_waited_for_there(tmp_path: Path) -> None:
    """Whoever waited for it asks, and is told of it; where it comes back it is sent."""

    async def act(played: Played) -> None:
        played.admit(0, 1, 2)
        await played.answer(None)
        played.shard.give([(0, 0)], "its share")
        asked = await played.answer(make_place(0, (0, 0), 1))
        assert list(array("Q", asked.places)) == [make_place(0, (1, 0), 1)]
        assert played.sent == [0]
        played.shard.take_back(["its share"])
        assert played.admit(0, 3) == [True, False]
        played.duplicates.note_result(played.shard, make_same(0), make_ok(0, fingerprint=SAME))
        assert all(played.shard.is_finished(row, 0) for row in (1, 2, 3))

    play(tmp_path, act)


def test_a_row_that_waits_behind_one_that_is_told_to_wait_for_it_is_sent(tmp_path: Path) -> None:
    """The driver knew it from an attempt that was lost."""

    async def act(played: Played) -> None:
        played.admit(0, 1, 2)
        await played.answer(make_place(0, (1, 0), 1))
        await played.until(lambda: played.sent == [1])
        assert played.read == [[1]]
        played.duplicates.note_result(played.shard, make_same(1), make_ok(1, fingerprint=SAME))
        assert all(played.shard.is_finished(row, 0) for row in (0, 2))

    play(tmp_path, act)


def test_after_a_failure_each_is_sent_for_itself(tmp_path: Path) -> None:
    async def act(played: Played) -> None:
        played.admit(0, 1, 2)
        await played.answer(None)
        played.duplicates.note_result(played.shard, make_same(0), make_error(0))
        await played.until(lambda: played.sent == [0, 1, 2])
        assert played.admit(3) == [True]
        assert played.emitted == []

    play(tmp_path, act)


def write_journal(played: Played, *results: Result, number: int = 7, sequence: int = 1) -> JournalRef:
    rows = make_rows(*results, batch_id=f"shard-{number:09d}-e1-a1", spec=played.spec)
    path = make_segment_path(1, "w2", sequence)
    return write_segment(Storage(played.spec.output.path), path, {number: rows}, "job")[number]


def test_an_answer_is_read_from_the_journal_of_another_worker(tmp_path: Path) -> None:
    place = make_place(7, (3, 0), 1)

    async def act(played: Played) -> None:
        ref = write_journal(played, make_ok(2, fingerprint=b"b" * 16), make_ok(3, text="theirs", fingerprint=SAME))
        played.admit(0, 1)
        await played.answer(place, looks=[LookAt(7, is_open=True)])
        await played.duplicates.obey(LookAt(7, ((ref, (place,)),), is_open=True))
        await played.until(lambda: played.shard.is_finished(0, 0) and played.shard.is_finished(1, 0))
        taken = played.shard.take_unflushed()
        assert taken is not None
        rows = taken[0].to_pylist()
        assert [(row["text"], row["reused_from"], row["num_attempts"]) for row in rows] == [
            ("theirs", "shard-000000007-e1-a1", 0)
        ] * 2
        assert {row["batch_id"] for row in rows} == {"shard-000000000-e1-a1r"}
        assert (played.sent, played.read) == ([], [])

    play(tmp_path, act)


def test_an_error_in_the_journal_is_no_answer(tmp_path: Path) -> None:
    place = make_place(7, (3, 0), 1)

    async def act(played: Played) -> None:
        ref = write_journal(played, replace(make_error(3), fingerprint=SAME))
        played.admit(0, 1)
        await played.answer(place, looks=[LookAt(7, ((ref, (place,)),), is_open=True)])
        await played.until(lambda: played.sent == [0, 1])

    play(tmp_path, act)


def test_half_a_fingerprint_may_be_that_of_another(tmp_path: Path) -> None:
    place = make_place(7, (3, 0), 1)

    async def act(played: Played) -> None:
        ref = write_journal(played, make_ok(3, fingerprint=SAME[:8] + b"else" * 2))
        played.admit(0)
        await played.answer(place, looks=[LookAt(7, ((ref, (place,)),), is_open=True)])
        await played.until(lambda: played.sent == [0])

    play(tmp_path, act)


def test_where_nobody_works_on_it_any_more_one_asks_again_and_is_sent(tmp_path: Path) -> None:
    """After a look into the journal, in which it is not, or whose segment is gone."""
    place = make_place(7, (3, 0), 1)

    async def act(played: Played) -> None:
        ref = write_journal(played, make_ok(2, fingerprint=b"b" * 16))
        gone = JournalRef(make_segment_path(1, "w2", 9), 0)
        played.admit(0, 1)
        await played.answer(place, looks=[LookAt(7, ((ref, (place,)), (gone, (place,))))])
        asked = await played.answer(None)
        assert list(array("Q", asked.told)) == [place]
        await played.until(lambda: played.sent == [1])
        played.duplicates.note_result(played.shard, make_same(1), make_ok(1, fingerprint=SAME))
        assert played.shard.is_finished(0, 0)

    play(tmp_path, act)


def test_that_a_shard_was_given_up_is_not_forgotten_where_it_is_lent_again(tmp_path: Path) -> None:
    """Nothing more is told of what was waited for before."""
    place = make_place(7, (3, 0), 1)

    async def act(played: Played) -> None:
        played.admit(0)
        await played.answer(place, looks=[LookAt(7, is_open=True)])
        await played.duplicates.obey(LookAt(7))
        await played.duplicates.obey(LookAt(7, is_open=True))
        asked = await played.answer(place, looks=[LookAt(7, is_open=True)])
        assert list(array("Q", asked.told)) == [place]
        await played.duplicates.obey(LookAt(7))
        await played.answer(None)
        await played.until(lambda: played.sent == [0])

    play(tmp_path, act)


def test_a_shard_that_closes_takes_its_rows_with_it(tmp_path: Path) -> None:
    """Its leader is gone: another shard's row asks. And where the asker's shard closed before the word came."""

    async def act(played: Played) -> None:
        other, third = played.open_shard(1), played.open_shard(2)
        played.admit(0)
        assert not played.duplicates.admit(other, make_same(5))
        assert not played.duplicates.admit(third, make_same(6))
        played.shard.close()
        await played.answer(None)
        assert played.sent == []
        other.close()
        asked = await played.answer(None)
        assert list(array("Q", asked.places)) == [make_place(1, (5, 0), 1)]
        asked = await played.answer(None)
        assert list(array("Q", asked.places)) == [make_place(2, (6, 0), 1)]
        await played.until(lambda: played.sent == [6])

    play(tmp_path, act)


def test_a_shard_that_nothing_is_heard_of_is_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row never waits on one message."""
    monkeypatch.setattr(desk, "RENEW_S", 0.0)
    monkeypatch.setattr(duplicates, "PRUNE_S", 0.0)
    place = make_place(7, (3, 0), 1)

    async def act(played: Played) -> None:
        played.admit(0)
        await played.answer(place, looks=[LookAt(7, is_open=True)])
        asked = await played.answer()
        assert asked.shards == (7,)

    play(tmp_path, act)


def test_more_rows_than_may_wait_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MAX_WAITING", 2)

    async def act(played: Played) -> None:
        assert played.admit(0, 1, 2, 3) == [False, False, False, True]

    play(tmp_path, act)


LOGPROBS = (TokenLogprob(7, -0.5, ((7, -0.5), (None, -1.25))), TokenLogprob(None, -2.0))


@pytest.mark.parametrize("full", [False, True])
def test_a_copy_that_was_read_is_the_copy_that_was_given(tmp_path: Path, full: bool) -> None:
    """All columns, those that a job asks for as well."""
    over: Tree = {"output": {"path": str(tmp_path), "token_ids": full}, "sampling": {"temperature": 0}}
    spec = make_job_spec(**{**over, **({"sampling": {"temperature": 0, "logprobs": 2}} if full else {})})
    whole = replace(make_ok(3, fingerprint=SAME, reasoning="why"), prompt_tokens=3)
    assert whole.generation is not None
    known = replace(whole.generation, token_ids=(7, 8) if full else None, logprobs=LOGPROBS if full else None)
    result = replace(whole, generation=known)
    path, storage = make_segment_path(1, "w2", 1), Storage(str(tmp_path))
    ref = write_segment(storage, path, {7: make_rows(result, spec=spec)}, "job")[7]
    found = Answers(storage, spec).read_segment(ref, [make_place(7, (3, 0), 1)])
    [answer] = found.values()
    assert answer is not None
    copies = [make_copy(RowId("/data/in.parquet", 5, 0), (answer[0], one)) for one in (result, answer[1])]
    given, read = (make_rows(copy, spec=spec) for copy in copies)
    assert read.equals(given)


# ---- more workers than one -------------------------------------------------------------------------------------------


# What one of three workers can have finished in a journal interval of 50 ms, in flight, and read twice.
MAX_LOST = 18


class DyingPool(InlinePool):
    """Ends a worker without mercy when so many rows are done."""

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        events = super().poll(min(timeout_s, 0.05))
        done = sum(shard.num_rows_done for event in events if isinstance(event, Heartbeat) for shard in event.shards)
        if "worker-0001" not in self._threads or done < 20 or self.has_killed:
            return events
        self.has_killed = True
        self.kill("worker-0001")
        left = [event for event in events if getattr(event, "worker_id", "") != "worker-0001"]
        return [*left, WorkerLost("worker-0001", "killed by the test")]

    has_killed = False


def make_shuffled(num_prompts: int, times: int, seed: int = 0) -> list[str]:
    prompts = [f"q{number}" for number in range(num_prompts)] * times
    random.Random(seed).shuffle(prompts)
    return prompts


def check_texts(folder: Path, rows: list[Tree], prompts: list[str]) -> None:
    """One answer a prompt, and all others name the batch that has it."""
    texts: dict[str, set[str]] = {}
    for row, prompt in zip(rows, prompts, strict=True):
        texts.setdefault(prompt, set()).add(row["text"])
    assert all(len(found) == 1 for found in texts.values())
    stats = read_stats(folder / "out")
    assert {stats[row["reused_from"]]["outcome"] for row in rows if row["reused_from"]} <= {
        "committed",
        "lost",
        "shared",
    }


@pytest.mark.parametrize("num_workers", [2, 4])
@pytest.mark.parametrize("latency", [False, True])
def test_a_job_generates_each_request_once(tmp_path: Path, num_workers: int, latency: bool) -> None:
    """Shuffled over all workers, whether the first is in flight, journaled, or committed long ago."""
    prompts = make_shuffled(60, 8)
    over: Tree = {
        "cluster": {"workers": {"min": num_workers, "max": num_workers}},
        "engine": {"has_latency": latency, "decode_tokens_per_s": 400, "slots": 4, "max_inflight": 6},
        "output": {"rows_per_shard": 20},
    }
    rows, num_calls = run_well(tmp_path, make_job(tmp_path, prompts, **over), len(prompts))
    assert num_calls == 60
    check_texts(tmp_path, rows, prompts)


def test_samples_of_greedy_rows_are_generated_once_a_job(tmp_path: Path) -> None:
    prompts = make_shuffled(20, 4)
    over: Tree = {"cluster": {"workers": {"min": 3, "max": 3}}, "sampling": {"n": 3}}
    rows, num_calls = run_well(tmp_path, make_job(tmp_path, prompts, **over), len(prompts))
    assert num_calls == 20
    assert len({row["row_fingerprint"] for row in rows}) == 20


def test_answers_that_nobody_keeps_are_read_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long ago a shard was committed."""
    monkeypatch.setattr(copies, "MAX_BYTES", 0)
    prompts = make_shuffled(30, 6)
    over: Tree = {"cluster": {"workers": {"min": 2, "max": 2}}, "output": {"rows_per_shard": 9}}
    rows, num_calls = run_well(tmp_path, make_job(tmp_path, prompts, **over), len(prompts))
    assert num_calls == 30
    check_texts(tmp_path, rows, prompts)


def test_a_lost_worker_costs_what_it_had_not_journaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who waited for it go on, with what it had journaled."""
    prompts = make_shuffled(60, 6)
    over: Tree = {
        "cluster": {"workers": {"min": 3, "max": 3}},
        "engine": {"has_latency": True, "decode_tokens_per_s": 200, "slots": 4, "max_inflight": 6},
        "output": {"rows_per_shard": 30, "journal_interval_s": 0.05},
    }
    pools: list[DyingPool] = []

    def create_pool(setup: WorkerSetup) -> DyingPool:
        pools.append(DyingPool(setup))
        return pools[-1]

    monkeypatch.setitem(batchgen.driver.run.run_job.__kwdefaults__, "create_pool", create_pool)
    rows, num_calls = run_well(tmp_path, make_job(tmp_path, prompts, **over), len(prompts))
    assert pools[0].has_killed
    assert len({row["row_fingerprint"] for row in rows}) == 60
    assert 60 <= num_calls <= 60 + MAX_LOST


@pytest.mark.s3
def test_duplicates_on_s3_with_a_journal(s3_url: str, tmp_path: Path) -> None:
    """Copies are journaled, committed and verified there like answers."""
    num_rows, prompts = 90, [f"q{i % 9}" for i in range(90)]
    write_file(f"{s3_url}/in.parquet", pa.table({"prompt": prompts}))
    slow = {"has_latency": True, "decode_tokens_per_s": 60, "slots": 2, "max_inflight": 2}
    over = merge(GREEDY, {"engine": slow, "output": {"rows_per_shard": 45, "journal_interval_s": 0.1}})
    assert run(make_tree(f"{s3_url}/in.parquet", f"{s3_url}/out", tmp_path / "calls", **over))[0]["exit_code"] == 0
    verdict = verify(Storage(f"{s3_url}/out"), with_input=True)
    assert (verdict.findings, verdict.todo) == ([], [])
    rows = check_output(f"{s3_url}/out", [(f"{s3_url}/in.parquet", num_rows)])
    assert len(read_calls(str(tmp_path / "calls"))) == len(set(prompts))
    assert len({(prompts[row["source_row"]], row["text"]) for row in rows}) == len(set(prompts))
    assert sum(row["reused_from"] is not None for row in rows) == num_rows - len(set(prompts))
