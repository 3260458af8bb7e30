"""Whole jobs on the local disk: what comes out, what a second run does, what the exit code says."""

import datetime
import decimal
import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pytest
from jobs_util import (
    SLOW_ENGINE,
    RecordingView,
    Tree,
    call_cli,
    check_conserved,
    check_output,
    count_calls,
    get_key,
    list_keys,
    list_output,
    make_prompts,
    make_tree,
    read_bytes,
    read_folder,
    read_rows,
    read_stats,
    read_table,
    run,
    run_cli,
    run_to_end,
    write_file,
    write_prompts,
    write_spec,
)
from makers import make_job_spec, make_lease, make_ok, make_rows, make_shard

from batchgen import manifest
from batchgen.driver.control import request_cancel
from batchgen.driver.job import open_job, reopen
from batchgen.driver.run import run_job
from batchgen.engines.simulated import read_calls
from batchgen.errors import InputError
from batchgen.journal import make_segment_path, write_segment
from batchgen.specs.load import make_spec
from batchgen.storage import Storage
from batchgen.verify.verify import verify
from batchgen.worker.open_shard import OpenShard
from batchgen.worker.prepare import make_inputs
from batchgen.worker.shard_files import ShardFiles
from batchgen.write import make_output_schema, make_result_schema

COLUMNS = [
    *("custom_id", "source_file", "source_row", "sample_index"),
    *("text", "reasoning", "finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens"),
    *("status", "error_type", "error_message", "is_retryable", "num_attempts"),
    *("queued_s", "ttft_s", "latency_s", "batch_id"),
    *("row_fingerprint", "reused_from"),
]


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[str, int]]:
    return write_prompts(tmp_path / "in")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    return tmp_path / "calls"


@pytest.fixture
def tree(tmp_path: Path, files: list[tuple[str, int]], out: Path, calls: Path) -> Tree:
    del files
    return make_tree(tmp_path / "in", out, calls)


def change(tree: Tree, section: str, **fields: Any) -> Tree:
    return {**tree, section: {**tree.get(section, {}), **fields}}


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_a_whole_job(tree: Tree, files: list[tuple[str, int]], out: Path, calls: Path) -> None:
    report, _ = run(tree)
    rows = check_output(out, files)
    check_conserved(out, files)
    assert report["exit_code"] == 0
    assert report["state"] == "finished"
    assert (out / "_SUCCESS").exists()
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["num_attempts"] for row in rows} == {1}
    assert sorted((f, r, s) for f, r, s, _ in read_calls(str(calls))) == list_keys(files)


def test_the_columns_are_the_documented_ones(tree: Tree, out: Path) -> None:
    run(tree)
    for name in list_output(out, "data"):
        table = read_table(name)
        assert table.schema.names == COLUMNS
        assert table.schema.field("source_row").type == pa.int64()
        assert table.schema.field("sample_index").type == pa.int32()
        assert not table.schema.field("batch_id").nullable
        assert json.loads(table.schema.metadata[b"batchgen"])["format_version"] == 1


def test_optional_columns_and_passthrough_have_their_places(tree: Tree, out: Path) -> None:
    tree = change(change(tree, "output", token_ids=True), "input", passthrough=["key", "prompt"])
    run(change(tree, "prompt", sampling=None))
    names = read_folder(out).schema.names
    assert names == [*COLUMNS[:4], "key", "prompt", *COLUMNS[4:10], "token_ids", *COLUMNS[10:]]


def test_passthrough_keeps_types_and_values(tmp_path: Path, out: Path) -> None:
    when = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC)
    columns = {
        "tiny": pa.array([1, None, -3], pa.int8()),
        "big": pa.array([2**63 - 1, -(2**63), None], pa.int64()),
        "unsigned": pa.array([0, 2**64 - 1, None], pa.uint64()),
        "when": pa.array([when, None, when], pa.timestamp("us", "UTC")),
        "nanos": pa.array([1_767_323_045_123_456_789, None, 1], pa.timestamp("ns")),
        "day": pa.array([datetime.date(2026, 1, 2), None, datetime.date(1, 1, 1)], pa.date32()),
        "nested": pa.array([[["a"], []], None, [None, ["b", None]]], pa.list_(pa.list_(pa.string()))),
        "price": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("-99999.99")], pa.decimal128(12, 2)),
        "label": pa.array(["x", None, "x"]).dictionary_encode(),
        "pair": pa.array([{"a": 1, "b": "é"}, None, {"a": None, "b": None}]),
        "blob": pa.array([b"\xff\x00", None, b""], pa.binary()),
        "flag": pa.array([True, None, False]),
        "nothing": pa.nulls(3),
        "counts": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int32())),
    }
    table = pa.table({"prompt": ["a", "b", "c"], **columns})
    write_file(tmp_path / "in.parquet", table)
    run(make_tree(tmp_path / "in.parquet", out, input={"passthrough": list(columns)}, output={"rows_per_shard": 2}))
    found = read_folder(out).select(list(columns))
    expected = read_table(str(tmp_path / "in.parquet")).select(list(columns))
    assert found.schema.types == expected.schema.types
    assert found.cast(expected.schema).equals(expected)


def test_passthrough_types_of_many_files_meet(tmp_path: Path, out: Path) -> None:
    write_file(tmp_path / "in/a.parquet", pa.table({"prompt": ["a"], "x": pa.array([1], pa.int32())}))
    write_file(tmp_path / "in/b.parquet", pa.table({"prompt": ["b"], "x": pa.array([2**40], pa.int64())}))
    write_file(tmp_path / "in/c.parquet", pa.table({"prompt": ["c"], "x": pa.nulls(1)}))
    run(make_tree(tmp_path / "in", out, input={"passthrough": ["x"]}))
    assert read_folder(out)["x"].to_pylist() == [1, 2**40, None]
    assert {str(read_table(name).schema.field("x").type) for name in list_output(out, "data")} == {"int64"}


def test_n_samples_a_row(tree: Tree, files: list[tuple[str, int]], out: Path, calls: Path) -> None:
    run(change(tree, "sampling", n=3, seed=7))
    rows = check_output(out, files, n=3)
    check_conserved(out, files, n=3)
    assert count_calls(calls) == 3 * 55
    assert len({row["text"] for row in rows if row["source_row"] == 0}) > 2


def test_custom_id_is_the_users_or_made(tree: Tree, files: list[tuple[str, int]], out: Path, tmp_path: Path) -> None:
    run(tree)
    assert {row["custom_id"] for row in read_rows(out)} == {f"{name}:{row}" for name, row, _ in list_keys(files)}
    own = tmp_path / "own"
    report, _ = run(change(change(tree, "output", path=str(own)), "input", custom_id="key"))
    assert [row["custom_id"] for row in read_rows(own)] == [f"row-{i}" for i in range(55)]
    assert report["custom_id"] == "unique"


def test_a_number_may_be_the_custom_id(tmp_path: Path, out: Path) -> None:
    write_file(tmp_path / "in.parquet", pa.table({"prompt": ["a", "b"], "id": [7, -8]}))
    run(make_tree(tmp_path / "in.parquet", out, input={"custom_id": "id"}))
    assert [row["custom_id"] for row in read_rows(out)] == ["7", "-8"]


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "struct"])
def test_sampling_of_a_row_wins(tmp_path: Path, out: Path, as_json: bool) -> None:
    own: list[dict[str, Any] | None] = [{"max_tokens": 3}, None, {"max_tokens": 5}]
    column = pa.array([value and json.dumps(value) for value in own]) if as_json else pa.array(own)
    write_file(tmp_path / "in.parquet", pa.table({"prompt": ["a", "b", "c"], "how": column}))
    run(make_tree(tmp_path / "in.parquet", out, prompt={"sampling": "how"}, engine={"mean_tokens": 20, "sigma": 0.0}))
    rows = read_rows(out)
    assert [row["completion_tokens"] for row in rows] == [3, 20, 5]
    assert [row["finish_reason"] for row in rows] == ["length", "stop", "length"]


def test_reasoning_is_split_from_the_answer(tree: Tree, files: list[tuple[str, int]], out: Path) -> None:
    run(change(change(tree, "sampling", thinking=True), "engine", mean_tokens=60, sigma=0.0))
    rows = check_output(out, files)
    assert {row["reasoning"] for row in rows} == {"considering"}
    assert not any("think" in row["text"] for row in rows)


def test_the_same_spec_makes_the_same_rows(tree: Tree, out: Path, tmp_path: Path) -> None:
    run(change(tree, "sampling", seed=1))
    other = tmp_path / "other"
    run(change(change(tree, "sampling", seed=1), "output", path=str(other), rows_per_shard=7))
    kept = [name for name in COLUMNS if not name.endswith("_s") and name != "batch_id"]
    assert read_folder(out).select(kept).equals(read_folder(other).select(kept))


@pytest.mark.parametrize("kind", ["template", "messages", "token_ids", "bare"])
def test_every_kind_of_prompt(tmp_path: Path, out: Path, kind: str) -> None:
    chat = [{"role": "user", "content": "hello"}]
    table = pa.table(
        {
            "messages": [chat, chat],
            "json": [json.dumps(chat)] * 2,
            "ids": pa.array([[1, 2, 3], [4]], pa.list_(pa.int32())),
            "a": pa.array(["x", "y"]).dictionary_encode(),
            "b": [1.5, 2.0],
        }
    )
    write_file(tmp_path / "in.parquet", table)
    prompt = {
        "template": {"template": "{{{a}}} is {b}"},
        "messages": {"messages": "json"},
        "token_ids": {"prompt_token_ids": "ids"},
        "bare": {"column": "a", "chat": False},
    }[kind]
    run(make_tree(tmp_path / "in.parquet", out, prompt=prompt))
    expected = {
        "template": len("<user>{x} is 1.5\n<assistant>"),
        "messages": len("<user>hello\n<assistant>"),
        "token_ids": 3,
        "bare": 1,
    }[kind]
    assert check_output(out, [(str(tmp_path / "in.parquet"), 2)])[0]["prompt_tokens"] == expected


# ---- going on --------------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing(tree: Tree, files: list[tuple[str, int]], out: Path, calls: Path) -> None:
    run(tree)
    before = {name: read_bytes(name) for name in list_output(out, "data")}
    report, view = run(tree)
    assert report["exit_code"] == 0
    assert any("nothing left to do" in message for message in view.said)
    assert count_calls(calls) == 55
    assert {name: read_bytes(name) for name in list_output(out, "data")} == before
    assert (out / "_SUCCESS").exists()
    check_output(out, files)


def test_a_trial_is_kept_by_the_full_run(tree: Tree, files: list[tuple[str, int]], out: Path, calls: Path) -> None:
    report, _ = run(tree, limit=17)
    assert report["exit_code"] == 0
    assert report["rows"]["is_complete"]
    assert not (out / "_SUCCESS").exists()
    trial = check_output(out, [(files[0][0], 17)])
    assert count_calls(calls) == 17
    run(tree)
    rows = check_output(out, files)
    check_conserved(out, files)
    assert rows[:17] == trial
    assert count_calls(calls) == 55
    assert (out / "_SUCCESS").exists()


def test_trials_may_grow_and_shrink(tree: Tree, files: list[tuple[str, int]], out: Path, calls: Path) -> None:
    for limit in (5, 40, 10):
        run(tree, limit=limit)
        check_output(out, [(files[0][0], 5)] if limit == 5 else [(files[0][0], 30), (files[1][0], 10)])
    assert count_calls(calls) == 40
    run(tree)
    check_output(out, files)
    assert count_calls(calls) == 55


def test_a_cancelled_run_goes_on_without_repeating(
    tree: Tree, files: list[tuple[str, int]], out: Path, calls: Path
) -> None:
    slow = change(change(tree, "engine", **SLOW_ENGINE | {"slots": 2}), "cluster", lease_ttl_s=2.0)

    class Canceller(RecordingView):
        def show(self, progress: Any) -> None:
            if progress.num_rows_done >= 8 and not self.shown:
                self.shown.append(progress)
                request_cancel(Storage(str(out)))

    report = run_job(make_spec(slow), Canceller())
    assert (report["state"], report["exit_code"]) == ("stopped", 3)
    assert "cancel" in report["message"]
    assert not (out / "_SUCCESS").exists()
    num_before = count_calls(calls)
    assert 8 <= num_before < 55
    report, _ = run(tree)
    assert report["exit_code"] == 0
    check_output(out, files)
    check_conserved(out, files)
    assert count_calls(calls) == 55  # what was in flight was drained and journaled
    assert list_output(out, "_batchgen/journal") == []
    stats = read_stats(out)
    assert {row["outcome"] for row in stats.values()} == {"committed", "lost"}
    lost = [row for row in stats.values() if row["outcome"] == "lost"]
    assert all(row["worker"] and row["node"] and row["wall_s"] is not None for row in lost)
    assert sum(row["num_rows_ok"] or 0 for row in stats.values()) == 55
    assert sum(row["num_rows_from_journal"] or 0 for row in stats.values()) > 0


@pytest.fixture
def restless_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless_threads")
def test_rows_are_journaled_while_their_shard_is_committed() -> None:
    """The journal runs on the worker's event loop, the commit in a thread: no row may be taken twice."""
    spec = make_job_spec()
    schema, passthrough = make_result_schema(spec), pa.schema([])
    for _ in range(40):
        shard = OpenShard(make_lease(make_shard(row_end=250)), 1, schema)
        shard.add_inputs(make_inputs(pa.record_batch({"x": range(250)}), ["id"] * 250, passthrough, "/f"))
        for row in range(250):
            shard.add(make_ok(row))
        with ThreadPoolExecutor(1) as commit:
            made = commit.submit(shard.make_parts, make_output_schema(spec, passthrough))
            while not made.done():
                shard.take_unflushed()
        assert made.result().output.num_rows == 250


def test_success_goes_when_the_verdict_changes(tree: Tree, files: list[tuple[str, int]], out: Path) -> None:
    """`_SUCCESS` is the last run's verdict: stricter limits on the same dataset take it away."""
    poisoned = change(tree, "engine", reject_text="number 7")
    lenient, strict = change(poisoned, "retry", max_error_rate=0.9), change(poisoned, "retry", max_error_rate=0.0)
    report, _ = run(lenient)
    assert report["rows"]["error"] > 0
    assert (report["exit_code"], (out / "_SUCCESS").exists()) == (0, True)
    report, _ = run(strict)
    assert (report["exit_code"], (out / "_SUCCESS").exists()) == (1, False)
    check_conserved(out, files)


# ---- error rows ------------------------------------------------------------------------------------------------------


def test_a_poison_row_is_one_error_row(tmp_path: Path, out: Path, calls: Path) -> None:
    table = make_prompts(40)
    prompts = ["POISON" if i == 23 else text for i, text in enumerate(table["prompt"].to_pylist())]
    files = [(write_file(tmp_path / "in.parquet", table.set_column(0, "prompt", [prompts])), 40)]
    tree = make_tree(tmp_path / "in.parquet", out, calls, engine={"reject_text": "POISON"})
    report, _ = run(tree)
    rows = check_output(out, files)
    check_conserved(out, files)
    assert [row["source_row"] for row in rows if row["status"] == "error"] == [23]
    assert (rows[23]["error_type"], rows[23]["is_retryable"], rows[23]["num_attempts"]) == ("rejected", False, 1)
    assert "POISON" not in rows[23]["error_message"]
    assert report["exit_code"] == 1
    assert report["message"].startswith(
        "1 of 40 rows are errors, more than retry.max_error_rate (0) allows: no _SUCCESS"
    )
    assert not (out / "_SUCCESS").exists()
    assert count_calls(calls) == 40
    report, _ = run(tree)  # not retryable: nothing to do, the verdict stays
    assert report["exit_code"] == 1
    assert count_calls(calls) == 40
    report, _ = run(change(tree, "retry", max_error_rate=0.05))
    assert (report["exit_code"], report["message"]) == (0, None)
    assert (out / "_SUCCESS").exists()


def test_failures_are_tried_again(tree: Tree, files: list[tuple[str, int]], out: Path, calls: Path) -> None:
    report, _ = run(change(tree, "engine", failure_rate=0.4))
    rows = check_output(out, files)
    assert report["exit_code"] == 0
    num_again = sum(row["num_attempts"] == 2 for row in rows)
    assert {row["num_attempts"] for row in rows} == {1, 2}
    assert count_calls(calls) == 55 + num_again
    assert sum(row["num_retries"] for row in read_stats(out).values()) == num_again == report["job"]["num_retries"]


def test_bad_rows_are_no_negative_retries(tmp_path: Path, out: Path) -> None:
    write_file(tmp_path / "in.parquet", pa.table({"prompt": ["a", None, "", "b"]}))
    run(make_tree(tmp_path / "in.parquet", out))
    assert [row["num_attempts"] for row in read_rows(out)] == [1, 0, 0, 1]
    assert [row["num_retries"] for row in read_stats(out).values()] == [0]


def test_retryable_error_rows_are_replaced_by_a_later_run(
    tree: Tree, files: list[tuple[str, int]], out: Path, calls: Path
) -> None:
    flaky = change(change(tree, "engine", failure_rate=0.3), "retry", max_attempts=1)
    report, _ = run(flaky)
    before = check_output(out, files)
    failed = [get_key(row) for row in before if row["status"] == "error"]
    assert 5 < len(failed) < 30
    assert {row["error_type"] for row in before if row["status"] == "error"} == {"engine_error"}
    assert report["exit_code"] == 1
    assert report["rows"]["retryable"] == len(failed)
    report, _ = run(tree)
    rows = check_output(out, files)
    check_conserved(out, files)
    assert report["exit_code"] == 0
    assert (out / "_SUCCESS").exists()
    assert [row for row in rows if get_key(row) not in failed] == [row for row in before if row["status"] == "ok"]
    again = [row for row in rows if get_key(row) in failed]
    assert {(row["status"], row["batch_id"][-5:]) for row in again} == {("ok", "e2-a2")}
    assert sorted(get_key(row) for row in again) == sorted(key[:3] for key in read_calls(str(calls))[55:])
    stats = read_stats(out)
    second = [row for row in stats.values() if row["epoch"] == 2]
    assert {(row["attempt"], row["outcome"]) for row in second} == {(2, "committed")}
    assert sum(row["num_rows_ok"] for row in second) == len(failed)
    assert sum(row["num_rows_copied"] for row in second) == sum(row["num_rows_ok"] for row in stats.values()) - len(
        failed
    ) - count_ok_elsewhere(before, failed)


def count_ok_elsewhere(rows: list[dict[str, Any]], failed: list[tuple[str, int, int]]) -> int:
    """Good rows of shards that had no failed row."""
    touched = {row["batch_id"] for row in rows if get_key(row) in failed}
    return sum(row["batch_id"] not in touched for row in rows)


def test_only_retry_errors_all_touches_bad_rows(
    tree: Tree, files: list[tuple[str, int]], out: Path, calls: Path
) -> None:
    run(change(change(tree, "engine", reject_text="number 7"), "sampling", n=2))
    before = check_output(out, files, n=2)
    assert [row["source_row"] for row in before if row["status"] == "error"] == [7, 7]
    mended = change(tree, "sampling", n=2)
    run(mended)
    assert check_output(out, files, n=2) == before
    run(change(mended, "retry", errors="none"))
    assert count_calls(calls) == 110
    report, _ = run(change(mended, "retry", errors="all"))
    rows = check_output(out, files, n=2)
    assert report["exit_code"] == 0
    assert count_calls(calls) == 112
    assert [row for row in rows if row["source_row"] != 7] == [row for row in before if row["source_row"] != 7]
    assert {row["batch_id"][-5:] for row in rows if row["source_row"] == 7 and row["source_file"] == files[0][0]} == {
        "e4-a2"
    }


def test_a_replacement_that_fails_again_counts_on(
    tree: Tree, files: list[tuple[str, int]], out: Path, calls: Path
) -> None:
    flaky = change(change(tree, "engine", failure_rate=0.2), "retry", max_attempts=1)
    for _ in range(3):
        report, _ = run(flaky)
        assert report["exit_code"] == 1
    rows = check_output(out, files)
    failed = [row for row in rows if row["status"] == "error"]
    assert {row["batch_id"][-5:] for row in failed} == {"e3-a3"}
    assert count_calls(calls) == 55 + 2 * len(failed)
    read_stats(out)


def test_a_zombies_late_rows_of_a_run_that_is_over_do_not_count(
    tree: Tree, files: list[tuple[str, int]], out: Path
) -> None:
    """Its batch was lost without a row, and batch_stats says so. What it journals when it wakes up must not enter the file
    that another run makes of that shard, however late an attempt it was of."""
    flaky = change(change(tree, "engine", failure_rate=0.3), "retry", max_attempts=1)
    run(flaky)
    failed = next(row for row in check_output(out, files) if row["status"] == "error")
    spec, storage, shard = make_spec(tree), Storage(str(out)), int(failed["batch_id"].split("-")[1])
    late = make_rows(make_ok(failed["source_row"], text="late"), batch_id=f"shard-{shard:09d}-e1-a9", spec=spec)
    path = make_segment_path(1, "worker-0009", 1)
    refs = write_segment(storage, path, {shard: late}, spec.fingerprint())
    found, _ = ShardFiles(storage, spec, pa.schema([])).read_journal(
        make_lease(make_shard(shard), epoch=2, journal=tuple(refs.values())), after_epoch=1
    )
    assert found.num_rows == 0
    report, _ = run(tree)
    assert report["exit_code"] == 0
    rows = check_output(out, files)
    check_conserved(out, files)
    assert "late" not in {row["text"] for row in rows}
    assert list_output(out, "_batchgen/journal") == []
    assert verify(storage).exit_code == 0


# ---- exit codes of the command ---------------------------------------------------------------------------------------


def test_exit_codes_and_the_last_line(tree: Tree, files: list[tuple[str, int]], out: Path, tmp_path: Path) -> None:
    ended = run_to_end(tmp_path, tree)
    assert ended.code == 0
    assert ended.report["rows"]["ok"] == 55
    assert json.loads(read_bytes(f"{out}/report.json")) == ended.report
    ended = run_cli(tmp_path, "run", write_spec(tmp_path, tree), "--set", "sampling.max_tokens=3")
    assert ended.code == 2
    assert "sampling.max_tokens" in ended.err
    bad = change(change(tree, "engine", reject_text="number 7"), "output", path=str(tmp_path / "bad"))
    assert run_to_end(tmp_path, bad).code == 1
    check_output(tmp_path / "bad", files)


def test_commands_that_look(tree: Tree, files: list[tuple[str, int]], out: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, tree)
    ended = call_cli("validate", spec, "--json")
    assert (ended.code, ended.report["rows"]) == (0, 55)
    assert "<user>question number 0 é" in ended.out
    planned = call_cli("plan", spec, "--json").report
    assert (planned["shards_to_do"], planned["is_frozen"]) == (planned["shards"], False)
    assert not (out / "_batchgen/spec.json").exists()
    run(tree)
    planned = call_cli("plan", spec, "--json").report
    assert (planned["shards_to_do"], planned["is_frozen"]) == (0, True)
    assert call_cli("status", str(out), "--json").report["progress"]["num_rows_done"] == 55
    assert call_cli("report", str(out), "--json").report["rows"]["ok"] == 55
    assert call_cli("cancel", str(out)).code == 2
    assert call_cli("report", str(tmp_path / "in")).code == 2
    assert files


# ---- reports and stats -----------------------------------------------------------------------------------------------


def test_batch_stats_say_what_was_done(tree: Tree, out: Path) -> None:
    run(change(tree, "engine", has_latency=True, decode_tokens_per_s=2000))
    rows, stats = read_rows(out), read_stats(out)
    assert {row["batch_id"] for row in rows} == stats.keys()
    for batch_id, row in stats.items():
        mine = [r for r in rows if r["batch_id"] == batch_id]
        assert row["num_rows_ok"] == len(mine)
        assert row["completion_tokens"] == sum(r["completion_tokens"] for r in mine)
        assert row["prompt_tokens"] == sum(r["prompt_tokens"] for r in mine)
        assert row["latency_max_s"] == max(r["latency_s"] for r in mine)
        assert row["ttft_p50_s"] is not None
        assert row["wall_s"] >= row["latency_max_s"]
        assert row["tokens_per_s"] == pytest.approx(row["completion_tokens"] / row["wall_s"])
        assert row["tokens_per_s_per_gpu"] is None  # no GPU: unknown, not 0
        assert (row["outcome"], row["engine_kind"], row["window"]) == ("committed", "simulated", 256)
        reasons = {reason["value"]: reason["count"] for reason in row["finish_reasons"]}
        assert reasons == Counter(r["finish_reason"] for r in mine)


def test_report_files(tree: Tree, files: list[tuple[str, int]], out: Path) -> None:
    run(change(tree, "prompt", system="<b>bold</b>"))
    report = check_conserved(out, files)
    assert 0 <= report["run"]["window_share"] <= 1
    assert report["job"]["batches"] == {"committed": len(list_output(out, "data"))}
    page = (out / "report.html").read_text()
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold" in page
    assert "of 55; 0 errors" in page
    assert "http" not in page.replace("http-equiv", "")  # offline


def test_text_stays_in_the_output(tree: Tree, tmp_path: Path, out: Path) -> None:
    ended = run_to_end(tmp_path, change(tree, "engine", reject_text="number 7"))
    text = max((row["text"] or "" for row in read_rows(out)), key=len)  # four letters may stand anywhere
    assert len(text) > 20
    logged = ended.err + ended.out + (out / "report.html").read_text()
    assert "question number" not in logged
    assert text not in logged


# ---- the input changes under a job -----------------------------------------------------------------------------------


def test_new_files_are_left_out_with_a_warning(
    tree: Tree, files: list[tuple[str, int]], out: Path, calls: Path, tmp_path: Path
) -> None:
    run(tree, limit=20)
    write_file(tmp_path / "in/aaa new.parquet", make_prompts(3))
    _, view = run(tree)
    assert any("aaa new.parquet" in warning for warning in view.warned)
    check_output(out, files)
    assert count_calls(calls) == 55


def test_a_plan_that_grew_meanwhile_is_read_again(tree: Tree, out: Path) -> None:
    """Two runs open the same folder; the first one plans more rows and ends before the second one holds it."""
    run(tree, limit=5)
    storage = Storage(str(out))
    opened = open_job(make_spec(tree), storage)
    run(tree, limit=43)
    job = reopen(opened, storage)
    assert job.plan.shards[:-2] == tuple(manifest.read_plan(storage)[2])  # type: ignore[index]
    run(tree)
    assert open_job(make_spec(tree), storage).plan == job.plan


@pytest.mark.parametrize("has_gone", [True, False])
def test_planned_files_must_stay(
    tree: Tree, files: list[tuple[str, int]], out: Path, calls: Path, has_gone: bool
) -> None:
    run(tree, limit=20)
    name = files[1][0]
    if has_gone:
        Path(name).unlink()
    else:
        write_file(name, make_prompts(26))
    with pytest.raises(InputError) as refused:
        run(tree)
    assert name in str(refused.value)
    assert ("gone" if has_gone else "changed") in str(refused.value)
    assert count_calls(calls) == 20
    check_output(out, [(files[0][0], 20)])


# ---- readers ---------------------------------------------------------------------------------------------------------


def test_other_readers(tree: Tree, files: list[tuple[str, int]], out: Path) -> None:
    tree = change(change(tree, "output", token_ids=True), "input", passthrough=["key"])
    run(change(tree, "engine", reject_text="number 7"))
    rows = check_output(out, files)
    found = duckdb.sql(
        f"select count(*), count(distinct (source_file, source_row, sample_index)), sum(completion_tokens), "
        f"count(*) filter (status = 'error') from read_parquet('{out}/data/*.parquet')"
    ).fetchall()
    assert found == [(55, 55, sum(row["completion_tokens"] or 0 for row in rows), 1)]
    stats = duckdb.sql(
        f"select sum(num_rows_ok), sum(list_sum([f.count for f in finish_reasons if f.value = 'stop'])), "
        f"sum(num_rows_error) from read_parquet('{out}/batch_stats/*.parquet')"
    ).fetchall()
    assert stats == [(54, sum(row["finish_reason"] == "stop" for row in rows), 1)]
    frame = pd.read_parquet(out / "data")
    assert frame["text"].isna().sum() == 1
    assert list(frame["key"]) == [f"row-{i}" for i in range(55)]
    assert len(pd.read_parquet(out / "batch_stats")) == len(list_output(out, "data"))


def test_datasets_reads_it(tree: Tree, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    run(change(change(tree, "output", token_ids=True), "engine", reject_text="number 7"))
    datasets.disable_progress_bars()
    for folder, num_rows in (("data", 55), ("batch_stats", len(list_output(out, "data")))):
        found = datasets.load_dataset(
            "parquet", data_files=f"{out}/{folder}/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
        )
        assert found.num_rows == num_rows
