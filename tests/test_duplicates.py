"""Exact duplicates inside a run: sent once a worker where that changes nothing, and every row there with its identity."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from jobs_util import Tree, check_output, make_tree, merge, read_stats, run, write_file
from makers import make_job_spec, make_lease, make_ok, make_shard

from batchgen.engines.simulated import read_calls
from batchgen.records import Request, RowId, SamplingParams
from batchgen.reuse.duplicates import make_duplicates
from batchgen.storage import Storage
from batchgen.verify.verify import verify
from batchgen.worker.open_shard import OpenShard
from batchgen.write import make_result_schema

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


def test_one_that_comes_back_does_not_wait_for_itself() -> None:
    """It was given to another worker and is read again before anybody saw that it had gone."""
    shard = OpenShard(make_lease(make_shard(row_end=2)), 1, make_result_schema(make_job_spec()))
    duplicates = make_duplicates(make_job_spec(**GREEDY), never)
    assert duplicates is not None
    first, second = (make_request(row, fingerprint=b"same") for row in range(2))
    assert duplicates.admit(shard, first)
    assert not duplicates.admit(shard, second)
    shard.give([first.row_id.slot], "its share")
    assert shard.take_back(["its share"]) == [first.row_id.slot]
    again = replace(first)
    assert duplicates.admit(shard, again)
    duplicates.note_answer(shard, again, make_ok(0))
    assert shard.is_finished(*second.row_id.slot)


def test_what_waits_for_a_copy_is_not_given_away() -> None:
    """Another worker would generate it; it is, once nobody answers for it."""
    shard = OpenShard(make_lease(make_shard(row_end=4)), 1, make_result_schema(make_job_spec()))
    shard.is_recovered = True
    duplicates = make_duplicates(make_job_spec(**GREEDY), never)
    assert duplicates is not None
    assert duplicates.admit(shard, make_request(0, b"same"))
    shard.note_sent(RowId("/f", 0, 0))
    assert not duplicates.admit(shard, make_request(1, b"same"))
    assert shard.choose_to_give(9) == [(3, 0), (2, 0)]
    duplicates.note_answer(shard, make_request(0, b"same"), make_ok(0))
    assert shard.is_finished(1, 0)
    assert shard.waiting == set()


def make_request(row: int, fingerprint: bytes) -> Request:
    return Request(RowId("/f", row, 0), (1,), SamplingParams(temperature=0), fingerprint=fingerprint)


async def never(*_: object) -> None:
    raise AssertionError("nothing has waited in vain")


def test_rows_split_between_workers_all_end(tmp_path: Path) -> None:
    """Where the one that is waited for goes to another worker, or waits for one there."""
    over: Tree = {
        "cluster": {"workers": {"min": 3, "max": 3}},
        "engine": {"has_latency": True, "decode_tokens_per_s": 100, "slots": 2, "max_inflight": 2},
        "output": {"rows_per_shard": 40},
    }
    rows, num_calls = run_well(tmp_path, make_job(tmp_path, [f"q{i % 10}" for i in range(90)], **over), 90)
    assert 10 <= num_calls < 90
    assert len({row["row_fingerprint"] for row in rows}) == 10


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
