"""Gates: what fails a run whose command did all it was asked, and that a run with other gates goes on."""

import json
import re
from dataclasses import replace
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
    read_rows,
    run,
    write_file,
    write_prompts,
)

from batchgen.errors import OutputError, SpecError
from batchgen.gates import scan
from batchgen.gates import texts as gate_texts
from batchgen.gates.count import Rules, make_counter
from batchgen.gates.decide import Counts, judge_canary, judge_final
from batchgen.gates.fit import make_schema_test
from batchgen.gates.texts import TextTally, digest_texts, dump_text_sample, make_text_sample, parse_text_sample
from batchgen.manifest import load_committed
from batchgen.plan import make_plan
from batchgen.records import InputFile
from batchgen.spec import JobSpec
from batchgen.specs.gates import CanaryGate, FinalGate
from batchgen.specs.load import make_spec
from batchgen.specs.patterns import match_any
from batchgen.specs.sampling import find_fault
from batchgen.storage import Storage
from batchgen.verify.verify import verify
from batchgen.worker.shard_footer import read_text_sample

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
    spread = FinalGate(min_p50_tokens=20, max_p99_tokens=900)
    assert judge_final(spread, COUNTS, 20.0, 900.0) == []
    told = [str(failed) for failed in judge_final(spread, COUNTS, 19.0, 901.0)]
    assert told == [
        "gates.final.min_p50_tokens: 19 where the limit is 20",
        "gates.final.max_p99_tokens: 901 where the limit is 900",
    ]
    assert [failed.what for failed in judge_final(spread, Counts(rows=3, errors=3))] == ["min_p50_tokens"]


@given(
    st.lists(st.lists(st.sampled_from(["", "a", "b", "I'm sorry", '{"n": 1}', '{"n": "x"}']), max_size=6), max_size=5)
)
def test_rows_count_the_same_however_they_are_cut(tables: list[list[str]]) -> None:
    schema = '{"type": "object", "properties": {"n": {"type": "integer"}}}'
    count = make_counter(Rules(("^I'm sorry",), schema))
    texts = [text for table in tables for text in table]
    parts = [count(make_rows(table)) for table in tables]
    whole = count(make_rows(texts))
    assert whole == replace(
        whole,
        **{name: sum(getattr(part, name) for part in parts) for name in ("tokens", "truncated", "refused", "unfit")},
    )
    assert (whole.tokens, whole.refused) == (len(texts), texts.count("I'm sorry"))
    assert whole.unfit == len(texts) - texts.count('{"n": 1}')
    for order in (tables, tables[::-1]):
        tally = TextTally()
        for table in order:
            sample = make_text_sample([digest_texts(make_rows(table))])
            tally.add(parse_text_sample(dump_text_sample(sample)))
        assert (tally.num_answers, tally.count_repeated()) == (len(texts), len(texts) - len(set(texts)))


def tell_repeated(files: list[list[str]], max_digests: int) -> int:
    tally = TextTally()
    for file in files:
        sample = make_text_sample([digest_texts(make_rows(file))], max_digests)
        assert len(sample.digests) <= max_digests
        tally.add(sample)
    assert tally.num_answers == sum(map(len, files))
    assert tally._num_kept <= gate_texts.MAX_ADDED
    return tally.count_repeated()


def test_repeats_are_known_from_small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no text; of one in half of all answers, which a draw of texts would miss; of texts that stand in two files."""
    monkeypatch.setattr(gate_texts, "MAX_ADDED", 1000)
    unique = [[f"{file} {row}" for row in range(2000)] for file in range(40)]
    assert tell_repeated(unique, 64) == 0
    half = [[*file[:1000], *["I can't"] * 1000] for file in unique]
    assert tell_repeated(half, 64) == pytest.approx(40_000, rel=0.01)
    twice = [[*file[:1600], *[f"{number % 20} x{row}" for row in range(400)]] for number, file in enumerate(unique)]
    assert tell_repeated(twice, 64) == pytest.approx(8_000, rel=0.2)
    monkeypatch.setattr(gate_texts, "MAX_ADDED", 100_000)
    assert tell_repeated(twice, 10_000) == 8_000, "with room for all nothing is estimated"


def test_a_sample_that_is_none_is_refused() -> None:
    for raw in (b"", b"{}", b"[]", b'{"num_answers": 1, "num_texts": 1, "num_bits": 0, "digests": "AAA"}'):
        with pytest.raises(ValueError, match=r"."):
            parse_text_sample(raw)


def make_rows(texts: list[str]) -> pa.Table:
    names = {"status": "ok", "finish_reason": "stop", "completion_tokens": 1}
    same = {
        name: pa.array([value] * len(texts), pa.int64() if value == 1 else pa.string()) for name, value in names.items()
    }
    copied = pa.array(texts, pa.string_view())  # of a type that Arrow can't filter
    return pa.table({**same, "text": pa.array(texts, pa.string()), "copied": copied})


def test_what_a_refusal_and_a_misfit_are() -> None:
    told = match_any(pa.array(["I can't", "Yes, as an AI", "I can", None]), ["^I can(no|')t", "as an AI"])
    assert told.to_pylist() == [True, True, False, False]
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


@pytest.mark.s3
def test_gates_on_s3(s3_url: str) -> None:
    """A canary stops the run; with another it goes on to a final gate, which reads rows there, and then ends well."""
    write_file(f"{s3_url}/in.parquet", make_prompts(60), row_group_size=20)
    slow = {"has_latency": True, "decode_tokens_per_s": 200, "slots": 4, "max_inflight": 6}
    tree = make_tree(f"{s3_url}/in.parquet", f"{s3_url}/out", engine=slow, sampling={"temperature": 0, "max_tokens": 5})
    gates: list[tuple[Tree, int, str]] = [
        ({"canary": {"rows": 12, "max_truncation_rate": 0.1}}, 4, "max_truncation_rate"),
        (
            {"canary": {"rows": 12, "max_truncation_rate": 1}, "final": {"max_duplicate_rate": 0}},
            4,
            "max_duplicate_rate",
        ),
        ({"final": {"max_duplicate_rate": 1, "max_refusal_rate": 1}, "refusals": ["amber"]}, 0, ""),
    ]
    for gate, code, what in gates:
        tree["gates"] = gate
        report, _ = run(tree)
        assert report["exit_code"] == code
        assert [failed["what"] for failed in report["gates"]["failed"]] == ([what] if what else [])
        assert json.loads(read_bytes(f"{s3_url}/out/_batchgen/gates.json")) == report["gates"]
        assert (Storage(f"{s3_url}/out").info("_SUCCESS") is not None) == (code == 0)
    rows = check_output(f"{s3_url}/out", [(f"{s3_url}/in.parquet", 60)])
    texts = [row["text"] for row in rows]
    seen = report["gates"]["seen"]["final"]
    assert (seen["num_hashed"], seen["num_repeated"]) == (60, 60 - len(set(texts)))
    assert seen["refused"] == sum("amber" in text for text in texts) > 0


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


def test_a_final_gate_knows_how_lengths_are_spread(tmp_path: Path) -> None:
    """Half of the answers are short: their mean and their largest say little of that. From footers alone."""
    own = [{"max_tokens": 3 if row % 2 else 100} for row in range(60)]
    write_file(tmp_path / "in.parquet", make_prompts(60).append_column("own", pa.array(own)))
    over: Tree = {"engine": {"mean_tokens": 3000, "sigma": 0.1}, "prompt": {"sampling": "own"}}
    tree = make_tree(tmp_path / "in.parquet", tmp_path / "out", **over)
    for gate, failed in (
        ({"min_p50_tokens": 3.5, "max_p99_tokens": 80}, {"min_p50_tokens": 3.0, "max_p99_tokens": 100.0}),
        ({"min_p50_tokens": 2.5, "max_p99_tokens": 120}, {}),
    ):
        tree["gates"] = {"final": gate}
        report, _ = run(tree)
        assert {one["what"]: one["found"] for one in report["gates"]["failed"]} == pytest.approx(failed, rel=0.1)
        assert report["exit_code"] == (4 if failed else 0)


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
    run(tree)
    duplicates = {"final": {"min_mean_tokens": 0, "max_duplicate_rate": 1}}
    tree["gates"] = duplicates
    monkeypatch.setattr(scan, "BATCH_ROWS", 7)
    from_rows = run(tree)[0]["gates"]["seen"]["final"]
    assert (from_rows["rows"], from_rows["errors"], from_rows["num_hashed"]) == (40, 1, 39)
    texts = {row["text"] for row in read_rows(f"{tmp_path}/out") if row["status"] == "ok"}
    assert (from_rows["truncated"], from_rows["num_repeated"]) == (None, 39 - len(texts))
    monkeypatch.setattr(scan, "_iter_rows", None)
    other = {**tree, "output": {**tree["output"], "path": f"{tmp_path}/other"}, "gates": duplicates}
    assert run(other)[0]["gates"]["seen"]["final"] == from_rows
    tree["gates"] = {"final": {"min_rows_ok": 40, "max_error_rate": 0.5, "max_truncation_rate": 1}}
    report, _ = run(tree)
    assert [failed["what"] for failed in report["gates"]["failed"]] == ["min_rows_ok"]
    asked = {name: count for name, count in report["gates"]["seen"]["final"].items() if count is not None}
    cut_off = [row["finish_reason"] for row in read_rows(f"{tmp_path}/out")].count("length")
    assert asked == {"rows": 40, "errors": 1, "truncated": cut_off}


def test_workers_count_for_the_gates_they_know_and_rows_are_read_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same figures from footers as from rows, errors among them; with other rules the rows are read again."""
    write_file(tmp_path / "in.parquet", make_prompts(40))
    over: Tree = {"engine": {"reject_text": "number 3 "}, "retry": {"max_error_rate": 1.0}}
    tree = make_tree(tmp_path / "in.parquet", tmp_path / "out", **over)
    rates = {"max_refusal_rate": 1, "max_schema_failure_rate": 1, "max_mean_tokens": 1e9, "max_truncation_rate": 1}
    tree["gates"] = {
        "canary": {"rows": 9, **{name: rates[name] for name in ("max_refusal_rate", "max_truncation_rate")}},
        "final": rates,
        "refusals": ["[aeiou]{2}", "q"],
        "json_schema": {"type": "integer"},
    }
    opened: list[str] = []
    iter_rows = scan._iter_rows
    monkeypatch.setattr(scan, "_iter_rows", lambda *args: opened.append(args[1].shard.info.path) or iter_rows(*args))
    known = run(tree)[0]["gates"]["seen"]
    assert opened == []
    tree["gates"]["refusals"] = ["q", "[aeiou]{2}"]  # the same, and not known to be
    read = run(tree)[0]["gates"]["seen"]
    assert len(opened) > 3
    assert read == known
    final = known["final"]
    texts = [row["text"] for row in read_rows(f"{tmp_path}/out") if row["status"] == "ok"]
    assert (final["rows"], final["errors"], final["unfit"]) == (40, 1, 39)
    assert final["refused"] == sum(bool(re.search("[aeiou]{2}|q", text)) for text in texts) > 0
    assert known["canary"]["rows"] == 9


def test_a_pattern_that_python_would_take_years_for_is_looked_for_at_once() -> None:
    text = "a" * 5000 + "!"
    assert match_any(pa.array([text]), ["^(a+)+$"]).to_pylist() == [False]
    for schema in (
        {"pattern": "^(a+)+$"},
        {"patternProperties": {"^(a+)+$": {}}, "additionalProperties": False},
        {"propertyNames": {"pattern": "^(a+)+$"}},
    ):
        is_fit = make_schema_test(json.dumps(schema))
        assert is_fit(json.dumps(text if "pattern" in schema else {text: 1})) is False
        assert is_fit(json.dumps("aaa" if "pattern" in schema else {"aaa": 1})) is True


def test_more_properties_are_told_from_known_ones() -> None:
    schema = {"properties": {"a": {}}, "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False}
    is_fit = make_schema_test(json.dumps(schema))
    found = [is_fit(text) for text in ('{"a": 1, "x1": 2}', '{"x": "no"}', '{"b": 1}', '{"\\ud800": 1}', "3")]
    assert found == [True, False, False, False, True]
    is_fit = make_schema_test('{"additionalProperties": {"type": "integer"}}')
    assert [is_fit(text) for text in ('{"a": 1}', '{"a": "1"}')] == [True, False]


def test_a_reference_to_nowhere_is_refused_and_none_is_fetched() -> None:
    nowhere = ("#/$defs/gone", "http://127.0.0.1:9/schema", "#gone", "#/$defs/a/type", "#/$defs/a/type/x", "http://[")
    for target in nowhere:
        schema = {"$defs": {"a": {"type": "object"}}, "properties": {"b": {"items": {"$ref": target}}}}
        with pytest.raises(SpecError, match=r"has a '\$ref' that leads nowhere; put what it names under \$defs"):
            make_spec(make_tree("in", "out", gates={"json_schema": schema}))
        with pytest.raises(SpecError, match="leads nowhere"):
            make_spec(make_tree("in", "out", sampling={"guided": {"json_schema": schema}}))
    for draft in ("2020-12/schema", "2019-09/schema"):
        schema = {"$schema": f"https://json-schema.org/draft/{draft}", "$defs": {"a": {"$anchor": "x"}}, "$ref": "#x"}
        assert find_fault(json.dumps(schema)) is None
    old = {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": {}}, "$ref": "#/definitions/a"}
    assert find_fault(json.dumps(old)) is None
    assert find_fault('{"properties": {"$ref": {"type": "string"}}, "items": {"$ref": "#"}}') is None
    assert make_schema_test('{"$defs": {"a": {"type": "object"}}, "$ref": "#/$defs/a"}')("{}") is True


def blank_rows(path: Path) -> None:
    """Its footer stands, and vouches for what is no more."""
    content = path.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    path.write_bytes(b"PAR1" + bytes(start - 4) + content[start:])


def test_rows_that_can_not_be_read_stop_the_run_and_leave_a_report(tmp_path: Path) -> None:
    """The final gate has to read a file that was damaged behind its commit."""
    tree, _ = make_job(tmp_path, {}, engine={"has_latency": False})
    assert run(tree)[0]["exit_code"] == 0
    path = sorted((tmp_path / "out" / "data").iterdir())[1]
    blank_rows(path)
    tree["gates"] = {"final": {"max_duplicate_rate": 1}}
    report, _ = run(tree)
    assert (report["exit_code"], report["state"]) == (3, "stopped")
    assert "gates could not be looked at" in report["message"]
    assert path.name in report["message"]
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert json.loads(read_bytes(f"{tmp_path}/out/report.json"))["state"] == "stopped"


def test_a_canary_that_can_not_be_read_stops_the_run(tmp_path: Path) -> None:
    """Its rows are of an earlier run, whose workers counted by no rules."""
    tree, _ = make_job(tmp_path, {}, engine={"has_latency": False}, input={"limit": 150})
    assert run(tree)[0]["exit_code"] == 0
    path = min((tmp_path / "out" / "data").iterdir())
    blank_rows(path)
    tree["gates"], tree["input"]["limit"] = {"refusals": ["x"], "canary": {"rows": 10, "max_refusal_rate": 1}}, None
    report, view = run(tree)
    assert (report["exit_code"], report["state"]) == (3, "stopped")
    assert path.name in report["message"]
    assert any("stopping" in told for told in view.warned)


def test_a_footer_that_was_changed_since_is_not_asked(tmp_path: Path) -> None:
    """Its sample may be of other rows than those that are there."""
    tree, _ = make_job(tmp_path, {"final": {"max_duplicate_rate": 1}}, engine={"has_latency": False})
    run(tree)
    storage = Storage(str(tmp_path / "out"))
    first, second, *_ = load_committed(storage, make_spec(tree).fingerprint()).values()
    sample = read_text_sample(storage, first.info.path, first.footer_sha256)
    assert sample is not None
    assert sample.num_answers == first.footer.num_rows_ok
    with pytest.raises(OutputError, match=f"{first.info.path}: was changed since it was written"):
        read_text_sample(storage, first.info.path, second.footer_sha256)


BAD: list[tuple[Tree, str]] = [
    ({"canary": {"max_refusal_rate": 0.1}}, "give what a refusal looks like"),
    ({"canary": {"max_schema_failure_rate": 0.1}}, "give gates.json_schema or sampling.guided.json_schema"),
    ({"refusals": ["("]}, "is no regular expression of RE2 (missing ); lookaround"),
    ({"refusals": ["a", "(?!x)"]}, "gates.refusals: number 1 is no regular expression of RE2"),
    (
        {"canary": {"max_schema_failure_rate": 0.1}, "json_schema": {"items": {"pattern": "(?=x)"}}},
        "of the schema, what stands under 'pattern' is no regular expression of RE2",
    ),
    (
        {"final": {"max_schema_failure_rate": 0.1}, "json_schema": {"patternProperties": {"(?=x)": {}}}},
        "what stands under 'patternProperties' is no regular expression",
    ),
    (
        {
            "final": {"max_schema_failure_rate": 0.1},
            "json_schema": {"patternProperties": {"x": {}}, "unevaluatedProperties": False},
        },
        "patternProperties and unevaluatedProperties together are not looked at",
    ),
    ({"canary": {"rows": 1_000_001}}, "gates.canary.rows"),
    ({"canary": {"max_error_rate": 2}}, "gates.canary.max_error_rate"),
    ({"final": {"rows": 3}}, "gates.final.rows"),
]


@pytest.mark.parametrize(("gates", "told"), BAD)
def test_gates_that_can_not_be_are_refused(gates: Tree, told: str) -> None:
    with pytest.raises(SpecError, match=re.escape(told)):
        make_spec(make_tree("in", "out", gates=gates))


def test_gates_are_no_part_of_the_fingerprint() -> None:
    def make(gates: Tree) -> JobSpec:
        return make_spec(make_tree("in", "out", gates=gates))

    assert make({}).fingerprint() == make({"canary": {"max_error_rate": 0.1}}).fingerprint()
