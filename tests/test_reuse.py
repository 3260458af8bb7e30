"""A run that reuses earlier outputs: only what is new or changed is sent, and the output is a dataset like any other."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from jobs_util import (
    SLOW_ENGINE,
    Tree,
    check_conserved,
    check_output,
    make_prompts,
    make_tree,
    max_calls_within,
    merge,
    put_file,
    read_bytes,
    read_rows,
    read_stats,
    run,
    running,
    wait_for,
    write_file,
)

from batchgen.engines.simulated import read_calls
from batchgen.errors import InputError, SpecError
from batchgen.reuse import index
from batchgen.specs.load import make_spec
from batchgen.storage import Storage
from batchgen.verify.verify import verify

ANSWER = (
    "text",
    "reasoning",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "row_fingerprint",
)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("s3_url")) if request.param == "s3" else str(tmp_path)


def change(table: pa.Table, rows: set[int]) -> pa.Table:
    prompts = [f"{text} changed" if row in rows else text for row, text in enumerate(table["prompt"].to_pylist())]
    return table.set_column(0, "prompt", pa.array(prompts))


def make_day(place: str, calls: Path, day: int, table: pa.Table, **over: Any) -> Tree:
    """The job of one day over its own input, into its own folder."""
    write_file(f"{place}/day-{day}.parquet", table, row_group_size=16)
    return make_tree(f"{place}/day-{day}.parquet", f"{place}/out-{day}", calls / str(day), **over)


def list_called(calls: Path, day: int) -> list[int]:
    return sorted(row for _, row, _, _ in read_calls(str(calls / str(day))))


def run_well(tree: Tree) -> dict[str, Any]:
    report, view = run(tree)
    assert (report["exit_code"], view.warned) == (0, [])
    verdict = verify(Storage(tree["output"]["path"]), with_input=True)
    assert (verdict.findings, verdict.todo) == ([], [])
    return report


def by_prompt(tree: Tree) -> dict[str, dict[str, Any]]:
    return {row["custom_id"]: row for row in read_rows(tree["output"]["path"])}


KEYED = {"custom_id": "key"}


def test_only_changed_and_new_rows_are_generated(place: str, tmp_path: Path) -> None:
    """Rows changed in place, some gone, some new: the rest moves to other places and keeps its answers."""
    first = make_day(place, tmp_path, 1, make_prompts(60), input=KEYED)
    second_rows = pa.concat_tables([change(make_prompts(60), {7, 30}).slice(3), make_prompts(4, 100)])
    second = make_day(place, tmp_path, 2, second_rows, input={**KEYED, "reuse_from": f"{place}/out-1"})
    run_well(first)
    report = run_well(second)
    assert list_called(tmp_path, 2) == [4, 27, 57, 58, 59, 60]
    rows = check_output(f"{place}/out-2", [(f"{place}/day-2.parquet", 61)])
    old, new = by_prompt(first), by_prompt(second)
    stats = read_stats(f"{place}/out-2")
    for key, row in new.items():
        if row["source_row"] in {4, 27, 57, 58, 59, 60}:
            assert row["reused_from"] is None
            assert stats[row["batch_id"]]["outcome"] == "committed"
            continue
        assert {name: row[name] for name in ANSWER} == {name: old[key][name] for name in ANSWER}
        assert row["reused_from"] == f"{place}/out-1/{old[key]['batch_id']}"
        assert (row["num_attempts"], row["latency_s"], row["ttft_s"], row["queued_s"]) == (0, None, None, None)
        assert stats[row["batch_id"]]["outcome"] == "reused"
    made = sum(row["completion_tokens"] for row in rows if row["reused_from"] is None)
    carried = sum(row["completion_tokens"] for row in rows if row["reused_from"] is not None)
    assert (report["job"]["completion_tokens"], report["job"]["completion_tokens_reused"]) == (made, carried)
    assert report["job"]["rows_reused"] == 55


def test_a_row_says_where_it_was_generated_first(tmp_path: Path) -> None:
    """Reused of a reused one: the first origin stays, whatever became of its folder."""
    place = str(tmp_path)
    for day in (1, 2, 3):
        over = {**KEYED, **({"reuse_from": f"{place}/out-{day - 1}"} if day > 1 else {})}
        run_well(make_day(place, tmp_path, day, make_prompts(20), input=over))
    assert list_called(tmp_path, 3) == []
    assert {row["reused_from"].rpartition("/")[0] for row in read_rows(f"{place}/out-3")} == {f"{place}/out-1"}


def test_errors_are_made_anew_and_samples_kept_apart(tmp_path: Path) -> None:
    place = str(tmp_path)
    engine = {"reject_text": "number 5 "}
    retry = {"max_error_rate": 1.0}
    first = make_day(place, tmp_path, 1, make_prompts(12), engine=engine, retry=retry, sampling={"n": 2})
    second = make_day(place, tmp_path, 2, make_prompts(12), sampling={"n": 3}, input={"reuse_from": [f"{place}/out-1"]})
    run(first)
    run_well(second)
    called = {(row, sample) for _, row, sample, _ in read_calls(str(tmp_path / "2"))}
    assert called == {(5, 0), (5, 1)} | {(row, 2) for row in range(12)}
    old = {(row["source_row"], row["sample_index"]): row["text"] for row in read_rows(f"{place}/out-1")}
    new = {(row["source_row"], row["sample_index"]): row for row in read_rows(f"{place}/out-2")}
    assert all(new[key]["text"] == old[key] for key in new if new[key]["reused_from"])


OTHERS: list[Tree] = [
    {"sampling": {"temperature": 0.5}},
    {"sampling": {"seed": 1}},
    {"sampling": {"max_tokens": 31}},
    {"prompt": {"chat": False}},
    {"prompt": {"system": "Be brief."}},
    {"model": {"path": "/models/other"}},
]


@pytest.mark.parametrize("over", OTHERS, ids=str)
def test_what_makes_other_answers_reuses_nothing(tmp_path: Path, over: Tree) -> None:
    place = str(tmp_path)
    run_well(make_day(place, tmp_path, 1, make_prompts(10)))
    run_well(make_day(place, tmp_path, 2, make_prompts(10), **merge(over, {"input": {"reuse_from": f"{place}/out-1"}})))
    assert list_called(tmp_path, 2) == list(range(10))


def test_the_first_output_that_has_a_row_gives_it(tmp_path: Path) -> None:
    place = str(tmp_path)
    run_well(make_day(place, tmp_path, 1, make_prompts(10)))
    run_well(make_day(place, tmp_path, 2, make_prompts(20)))
    outs = [f"{place}/out-1", f"{place}/out-2"]
    run_well(make_day(place, tmp_path, 3, make_prompts(25), input={"reuse_from": outs}))
    rows = read_rows(f"{place}/out-3")
    origins = [row["reused_from"] and row["reused_from"].rpartition("/")[0] for row in rows]
    assert origins == [outs[0]] * 10 + [outs[1]] * 10 + [None] * 5


def test_turns_of_rows_that_stand_several_times_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MAX_TURNS", 4)
    prints = [bytes([number]) * 16 for number in range(10)]
    columns = {"row_fingerprint": pa.array(prints, pa.binary(16)), "status": ["ok"] * 10}
    found = index.build_index(index.make_pairs(number, pa.table(columns)) for number in range(2))
    assert [found.find(prints[:1]) for _ in range(3)] == [[(0, 0)], [(1, 0)], [(0, 0)]]
    found.find(prints)
    assert len(found._turns) <= 4


# ---- refused ---------------------------------------------------------------------------------------------------------


def refuse(tree: Tree) -> str:
    with pytest.raises((InputError, SpecError)) as error:
        run(tree)
    return str(error.value)


def test_what_can_not_be_reused_is_refused_in_a_sentence(tmp_path: Path) -> None:
    place = str(tmp_path)
    run_well(make_day(place, tmp_path, 1, make_prompts(5), output={"row_fingerprints": False}))
    run_well(make_day(place, tmp_path, 2, make_prompts(5)))
    day = make_day(place, tmp_path, 3, make_prompts(5))
    bare = merge(day, {"input": {"reuse_from": f"{place}/out-1"}})
    assert "out-1 has no row fingerprints (output.row_fingerprints); name one that has" in refuse(bare)
    assert "nowhere holds no job of batchgen" in refuse(merge(day, {"input": {"reuse_from": f"{place}/nowhere"}}))
    assert "is this job's own output" in refuse(merge(day, {"input": {"reuse_from": f"{place}/out-3"}}))
    ids = {"input": {"reuse_from": f"{place}/out-2"}, "output": {"token_ids": True}}
    assert "out-2 has no column token_ids" in refuse(merge(day, ids))
    with pytest.raises(SpecError, match="reuse_from goes by row fingerprints"):
        make_spec(merge(bare, {"output": {"row_fingerprints": False}}))
    assert not Path(place, "out-3").exists()


def test_a_damaged_output_is_named_and_nothing_of_it_is_sealed_anew(tmp_path: Path) -> None:
    """Flipped bits of a text that Parquet itself would not notice."""
    place = str(tmp_path)
    run_well(make_day(place, tmp_path, 1, make_prompts(20)))
    name = f"{place}/out-1/data/shard-000000001.parquet"
    data = bytearray(read_bytes(name))
    data[40] ^= 1
    put_file(name, bytes(data))
    report, _ = run(make_day(place, tmp_path, 2, make_prompts(20), input={"reuse_from": f"{place}/out-1"}))
    assert report["exit_code"] == 3
    assert f"{name}: was changed since it was written" in report["message"]
    rows = read_rows(f"{place}/out-2") if list(Path(place, "out-2").glob("data/*")) else []
    assert all(row["source_row"] < 10 for row in rows)


# ---- resumed ---------------------------------------------------------------------------------------------------------


def test_reuse_may_change_between_runs_of_a_job(tmp_path: Path) -> None:
    """It is no part of the fingerprint: the folder may be gone when the job goes on."""
    place = str(tmp_path)
    run_well(make_day(place, tmp_path, 1, make_prompts(40)))
    tree = make_day(place, tmp_path, 2, make_prompts(40), input={"reuse_from": f"{place}/out-1"})
    assert run(tree, limit=15)[0]["exit_code"] == 0
    tree["input"].pop("reuse_from")
    run_well(tree)
    assert len(list_called(tmp_path, 2)) == 25


def test_a_job_that_began_without_fingerprints_goes_on_without(tmp_path: Path) -> None:
    """As an earlier version left it: its spec does not know the field."""
    place = str(tmp_path)
    tree = make_day(place, tmp_path, 1, make_prompts(40), output={"row_fingerprints": False})
    assert run(tree, limit=15)[0]["exit_code"] == 0
    saved = json.loads(read_bytes(f"{place}/out-1/_batchgen/spec.json"))
    del saved["spec"]["output"]["row_fingerprints"], saved["is_sealed"], saved["sha256"]
    put_file(f"{place}/out-1/_batchgen/spec.json", json.dumps(saved).encode())
    del tree["output"]["row_fingerprints"]
    Path(place, "out-1", "manifest.json").unlink()
    report, _ = run(tree)
    assert report["exit_code"] == 0
    assert "row_fingerprint" not in read_rows(f"{place}/out-1")[0]
    assert verify(Storage(f"{place}/out-1")).findings == []
    assert "began without row fingerprints" in refuse(merge(tree, {"input": {"reuse_from": f"{place}/out-2"}}))


def test_a_run_killed_in_mid_reuse_goes_on_and_makes_nothing_twice(place: str, tmp_path: Path) -> None:
    """SIGKILL of driver and workers, which are one process here, twice: of the rows that the earlier output has none
    is ever sent; of all others none more often than a kill can cost."""
    num_rows, window, num_workers, kills = 240, 8, 2, 2
    changed = {row for row in range(num_rows) if row % 4 == 1}
    slow = {**SLOW_ENGINE, "decode_tokens_per_s": 60, "slots": 4, "max_inflight": window}
    first = make_day(place, tmp_path, 1, make_prompts(num_rows), input=KEYED)
    table = change(make_prompts(num_rows), changed)
    over = merge({"input": KEYED, "engine": slow}, {"input": {"reuse_from": f"{place}/out-1"}})
    second = make_day(place, tmp_path, 2, table, **merge(over, {"output": {"rows_per_shard": 40}}))
    run_well(first)
    for _ in range(kills):
        before = len(list_called(tmp_path, 2))
        with running(tmp_path, second) as job:
            wait_for(lambda before=before: len(list_called(tmp_path, 2)) >= before + 12 or not job.is_running)
            assert job.is_running
            job.kill()
    report = run_well(merge(second, {"engine": {"has_latency": False}}))
    rows = check_output(f"{place}/out-2", [(f"{place}/day-2.parquet", num_rows)])
    check_conserved(f"{place}/out-2", [(f"{place}/day-2.parquet", num_rows)])
    called = list_called(tmp_path, 2)
    assert set(called) == changed
    lost_a_kill = num_workers * window + max_calls_within(tmp_path / "2", 0.3 + 0.25)
    assert len(called) <= len(changed) + kills * lost_a_kill
    assert report["job"]["rows_reused"] == num_rows - len(changed)
    old = by_prompt(first)
    for row in rows:
        assert (row["reused_from"] is None) == (row["source_row"] in changed)
        if row["reused_from"] is not None:
            assert {name: row[name] for name in ANSWER} == {name: old[row["custom_id"]][name] for name in ANSWER}


def test_copies_outlive_kills(tmp_path: Path) -> None:
    """Each prompt stands in six rows. What was copied is journaled like an answer, and no answer is asked for again by
    those that have it."""
    place, num_rows, num_prompts, kills = str(tmp_path), 180, 30, 2
    table = make_prompts(num_rows)
    texts = pa.array([f"question {row % num_prompts}" for row in range(num_rows)])
    slow = {**SLOW_ENGINE, "decode_tokens_per_s": 60, "slots": 4, "max_inflight": 4}
    over = {"engine": slow, "sampling": {"temperature": 0}, "cluster": {"workers": {"min": 1, "max": 1}}}
    tree = make_day(place, tmp_path, 1, table.set_column(0, "prompt", texts), **merge(over, {"input": KEYED}))
    for _ in range(kills):
        before = len(list_called(tmp_path, 1))
        with running(tmp_path, tree) as job:
            wait_for(lambda before=before: len(list_called(tmp_path, 1)) >= before + 8 or not job.is_running)
            assert job.is_running
            job.kill()
    run_well(merge(tree, {"engine": {"has_latency": False}}))
    rows = check_output(f"{place}/out-1", [(f"{place}/day-1.parquet", num_rows)])
    check_conserved(f"{place}/out-1", [(f"{place}/day-1.parquet", num_rows)])
    # A new process remembers no answer: each prompt may be asked for once in each run.
    assert len(list_called(tmp_path, 1)) <= num_prompts * (kills + 1)
    assert sum(row["reused_from"] is not None for row in rows) >= num_rows - num_prompts * (kills + 1)
