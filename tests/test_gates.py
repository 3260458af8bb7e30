"""Gates: what fails a run whose command did all it was asked, and that a run with other gates goes on."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs_util import (
    Tree,
    check_output,
    count_calls,
    make_prompts,
    make_tree,
    merge,
    read_bytes,
    run,
    write_file,
    write_prompts,
)

from batchgen.errors import SpecError
from batchgen.gates import scan
from batchgen.gates.decide import Counts, judge_canary, judge_final
from batchgen.gates.scan import Scanner, make_refusal_test, make_schema_test
from batchgen.plan import make_plan
from batchgen.records import InputFile
from batchgen.spec import JobSpec
from batchgen.specs.gates import CanaryGate, FinalGate
from batchgen.specs.load import make_spec
from batchgen.storage import Storage
from batchgen.verify.verify import verify

COUNTS = Counts(rows=100, errors=4, truncated=20, refused=10, unfit=30, tokens=960, num_hashed=96, num_repeated=24)

# ---- decided ---------------------------------------------------------------------------------------------------------


def test_a_limit_that_is_met_passes_and_one_that_is_exceeded_is_named() -> None:
    met = CanaryGate(max_error_rate=0.04, max_truncation_rate=0.2, max_refusal_rate=0.1, max_schema_failure_rate=0.3)
    assert judge_canary(met, COUNTS) == []
    tight = CanaryGate(max_error_rate=0.03, max_truncation_rate=0.1, max_refusal_rate=0.0, max_schema_failure_rate=0.2)
    told = [str(failed) for failed in judge_canary(tight, COUNTS)]
    assert told == [
        "gates.canary.max_error_rate: 0.04 where the limit is 0.03",
        "gates.canary.max_truncation_rate: 0.2 where the limit is 0.1",
        "gates.canary.max_refusal_rate: 0.1 where the limit is 0",
        "gates.canary.max_schema_failure_rate: 0.3 where the limit is 0.2",
    ]


def test_the_final_gate_looks_at_the_whole() -> None:
    met = FinalGate(min_rows_ok=96, min_mean_tokens=10, max_mean_tokens=10, max_duplicate_rate=0.25)
    assert judge_final(met, COUNTS) == []
    tight = FinalGate(min_rows_ok=97, min_mean_tokens=11, max_mean_tokens=9, max_duplicate_rate=0.2)
    assert [failed.what for failed in judge_final(tight, COUNTS)] == [
        *("min_rows_ok", "min_mean_tokens", "max_mean_tokens", "max_duplicate_rate")
    ]
    assert [failed.found for failed in judge_final(FinalGate(min_mean_tokens=1), Counts(rows=3, errors=3))] == [None]
    assert judge_final(FinalGate(), COUNTS) == judge_canary(CanaryGate(), COUNTS) == []


@given(
    st.lists(st.lists(st.sampled_from(["", "a", "b", "I'm sorry", '{"n": 1}', '{"n": "x"}']), max_size=6), max_size=5)
)
def test_rows_count_the_same_however_they_are_cut(tables: list[list[str]]) -> None:
    gate = FinalGate(max_refusal_rate=0, max_schema_failure_rate=0, max_duplicate_rate=0)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    spec = make_spec(make_tree("in", "out", gates={"refusals": ["^I'm sorry"], "json_schema": schema}))
    texts = [text for table in tables for text in table]
    scanner = Scanner(spec, gate, len(texts) + 1)
    counts = Counts()
    for table in tables:
        counts = counts.add(scanner.count(make_rows(table)))
    assert counts == Scanner(spec, gate, len(texts) + 1).count(make_rows(texts))
    assert (counts.rows, counts.refused) == (len(texts), texts.count("I'm sorry"))
    assert counts.unfit == len(texts) - texts.count('{"n": 1}')
    assert counts.num_repeated == len(texts) - len(set(texts))


def make_rows(texts: list[str]) -> pa.Table:
    names = {"status": "ok", "finish_reason": "stop", "completion_tokens": 1}
    same = {
        name: pa.array([value] * len(texts), pa.int64() if value == 1 else pa.string()) for name, value in names.items()
    }
    return pa.table({**same, "text": pa.array(texts, pa.string())})


def test_what_a_refusal_and_a_misfit_are() -> None:
    is_refusal = make_refusal_test(["^I can(no|')t", "as an AI"])
    assert [is_refusal(text) for text in ("I can't", "Yes, as an AI", "I can")] == [True, True, False]
    is_fit = make_schema_test('{"type": "object", "required": ["a"]}')
    assert [is_fit(text) for text in ('{"a": 1}', "{}", '{"a": 1', "", "[" * 100_000)] == [
        True,
        False,
        False,
        False,
        False,
    ]


def test_a_canary_is_shards_of_its_own() -> None:
    spec = make_spec(make_tree("in", "out", gates={"canary": {"rows": 15}}, output={"rows_per_shard": 100}))
    plan = make_plan(spec, [InputFile("/in", 1, "v", 400, (400,))])
    assert [(shard.row_start, shard.row_end) for shard in plan.shards][:2] == [(0, 15), (15, 112)]
    assert plan.shards[-1].row_end == 400


# ---- carried out -----------------------------------------------------------------------------------------------------


def make_job(folder: Path, gates: Tree, **over: Any) -> tuple[Tree, list[tuple[str, int]]]:
    files = write_prompts(folder / "in", (200, 100))
    slow = {"has_latency": True, "decode_tokens_per_s": 200, "slots": 4, "max_inflight": 6}
    return make_tree(
        folder / "in", folder / "out", folder / "calls", **merge({"engine": slow, "gates": gates}, over)
    ), files


def read_gates(folder: Path) -> Tree:
    return dict(json.loads(read_bytes(f"{folder}/out/_batchgen/gates.json")))


def test_a_canary_stops_the_run_before_most_of_it_is_generated(tmp_path: Path) -> None:
    """Every answer is cut off: seen in the first rows. With the gate changed, the same command finishes."""
    over: Tree = {"sampling": {"max_tokens": 3}, "engine": {"decode_tokens_per_s": 10}}
    tree, files = make_job(tmp_path, {"canary": {"rows": 20, "max_truncation_rate": 0.5}}, **over)
    report, _ = run(tree)
    assert (report["exit_code"], report["state"]) == (4, "gate_failed")
    assert report["message"].startswith("gates.canary.max_truncation_rate: ")
    assert " where the limit is 0.5; mend the job, or change gates" in report["message"]
    assert report["gates"]["failed"][0]["gate"] == "canary"
    assert report["gates"]["seen"]["canary"]["rows"] == 20
    assert read_gates(tmp_path) == report["gates"]
    num_calls = count_calls(tmp_path / "calls")
    assert num_calls < 250
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert verify(Storage(str(tmp_path / "out"))).findings == []

    tree["engine"]["has_latency"] = False
    again, _ = run(tree)
    assert (again["exit_code"], count_calls(tmp_path / "calls")) == (4, num_calls)
    tree["gates"] = {"canary": {"rows": 20, "max_truncation_rate": 1.0}}
    report, _ = run(tree)
    assert (report["exit_code"], report["gates"]["failed"]) == (0, [])
    assert (tmp_path / "out" / "_SUCCESS").exists()
    check_output(tmp_path / "out", files)


def test_a_final_gate_withholds_success(tmp_path: Path) -> None:
    fast: Tree = {"engine": {"has_latency": False}}
    tree, files = make_job(tmp_path, {"final": {"max_mean_tokens": 2, "max_duplicate_rate": 1.0}}, **fast)
    report, _ = run(tree)
    assert (report["exit_code"], report["state"], report["rows"]["is_complete"]) == (4, "gate_failed", True)
    assert [failed["what"] for failed in report["gates"]["failed"]] == ["max_mean_tokens"]
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    check_output(tmp_path / "out", files)
    num_calls = count_calls(tmp_path / "calls")
    tree["gates"] = {"final": {"min_mean_tokens": 2}}
    report, _ = run(tree)
    assert (report["exit_code"], report["state"]) == (0, "finished")
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert count_calls(tmp_path / "calls") == num_calls
    verdict = verify(Storage(str(tmp_path / "out")))
    assert (verdict.findings, verdict.todo) == ([], [])


def test_errors_and_refusals_are_seen(tmp_path: Path) -> None:
    write_file(tmp_path / "in.parquet", make_prompts(40))
    over: Tree = {"engine": {"reject_text": "number 3 "}, "retry": {"max_error_rate": 1.0}}
    tree = make_tree(tmp_path / "in.parquet", tmp_path / "out", **over)
    tree["gates"] = {"canary": {"rows": 10, "max_error_rate": 0.05, "max_refusal_rate": 0.0}, "refusals": ["zzz"]}
    report, _ = run(tree)
    assert [failed["what"] for failed in report["gates"]["failed"]] == ["max_error_rate"]
    assert report["gates"]["seen"]["canary"]["errors"] == 1


def test_errors_that_are_tried_again_are_judged_by_what_comes_of_them(tmp_path: Path) -> None:
    """The server was away: the same command, once it is back, is not held to the errors of then."""
    write_file(tmp_path / "in.parquet", make_prompts(40))
    tree = make_tree(tmp_path / "in.parquet", tmp_path / "out", engine={"failure_rate": 1.0}, retry={"max_attempts": 1})
    tree["gates"] = {"canary": {"rows": 10, "max_error_rate": 0.05}}
    report, _ = run(tree)
    assert (report["exit_code"], report["gates"]["seen"]["canary"]["errors"]) == (4, 10)
    again, _ = run(tree)
    assert (again["exit_code"], again["gates"]["seen"]["canary"]["errors"]) == (4, 10), "it still is away"
    tree["engine"]["failure_rate"] = 0.0
    report, _ = run(tree)
    assert (report["exit_code"], report["gates"]["seen"]["canary"]["errors"]) == (0, 0)
    assert read_gates(tmp_path) == report["gates"]


def test_gates_json_is_of_the_last_run(tmp_path: Path) -> None:
    tree, _ = make_job(tmp_path, {"final": {"max_mean_tokens": 2}}, engine={"has_latency": False})
    assert run(tree)[0]["exit_code"] == 4
    assert read_gates(tmp_path)["failed"] != []
    del tree["gates"]
    assert run(tree)[0]["exit_code"] == 0
    assert read_gates(tmp_path) == {"failed": [], "seen": {}}


def test_what_the_footers_know_is_not_read_and_what_nobody_asked_is_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a final gate over every row. Limits that need rows find the same, however many are read at a time."""
    write_file(tmp_path / "in.parquet", make_prompts(40))
    over: Tree = {"engine": {"reject_text": "number 3 "}, "retry": {"max_error_rate": 1.0}}
    tree = make_tree(tmp_path / "in.parquet", tmp_path / "out", **over)
    tree["gates"] = {"final": {"min_mean_tokens": 0, "max_duplicate_rate": 1}}
    monkeypatch.setattr(scan, "BATCH_ROWS", 7)
    seen = run(tree)[0]["gates"]["seen"]["final"]
    assert (seen["rows"], seen["errors"], seen["truncated"], seen["num_hashed"]) == (40, 1, None, 39)
    monkeypatch.setattr(scan, "_iter_rows", None)
    tree["gates"] = {"final": {"min_rows_ok": 40, "max_error_rate": 0.5}}
    report, _ = run(tree)
    assert [failed["what"] for failed in report["gates"]["failed"]] == ["min_rows_ok"]
    asked = {name: count for name, count in report["gates"]["seen"]["final"].items() if count is not None}
    assert asked == {"rows": 40, "errors": 1}


def test_a_reference_of_a_schema_is_never_fetched_and_nothing_is_of_a_schema_without_it() -> None:
    for target in ("#/$defs/gone", "http://127.0.0.1:9/schema"):
        assert make_schema_test(json.dumps({"$ref": target}))("{}") is False
    assert make_schema_test('{"$defs": {"a": {"type": "object"}}, "$ref": "#/$defs/a"}')("{}") is True


BAD: list[tuple[Tree, str]] = [
    ({"canary": {"max_refusal_rate": 0.1}}, "give what a refusal looks like"),
    ({"canary": {"max_schema_failure_rate": 0.1}}, "give gates.json_schema or sampling.guided.json_schema"),
    ({"refusals": ["("]}, "is no regular expression"),
    ({"canary": {"max_error_rate": 2}}, "gates.canary.max_error_rate"),
    ({"final": {"rows": 3}}, "gates.final.rows"),
]


@pytest.mark.parametrize(("gates", "told"), BAD)
def test_gates_that_can_not_be_are_refused(gates: Tree, told: str) -> None:
    with pytest.raises(SpecError, match=told.replace(".", r"\.")):
        make_spec(make_tree("in", "out", gates=gates))


def test_gates_are_no_part_of_the_fingerprint() -> None:
    def make(gates: Tree) -> JobSpec:
        return make_spec(make_tree("in", "out", gates=gates))

    assert make({}).fingerprint() == make({"canary": {"max_error_rate": 0.1}}).fingerprint()
