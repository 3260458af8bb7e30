"""The report: figures that add up, what is unknown said so, and a page that a real browser opens without a word."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs_util import Tree, call_cli, make_tree, read_rows, run, write_prompts
from makers import make_error, make_job_spec, make_ok, make_rows

from batchgen.batch_stats import STATS_SCHEMA, make_stats_table, read_stats_table
from batchgen.batches import BatchStats
from batchgen.gates.decide import Counts, judge_canary, judge_final, make_gate_report
from batchgen.queue.timeline import MAX_BINS, SPAN_FIELDS, Moment, Timeline
from batchgen.report.by import group_rows
from batchgen.report.distributions import make_bars
from batchgen.report.figures import show, show_amount, show_share, show_short, show_time
from batchgen.report.gates import LABELS, make_gate_checks, show_check
from batchgen.report.generations import choose_rows
from batchgen.report.lanes import MAX_LANES, make_lanes, merge_intervals
from batchgen.report.page import make_html
from batchgen.report.reading import find_report, read_report
from batchgen.report.records import make_record_path, read_records
from batchgen.report.text import make_text_rows
from batchgen.report.value import make_report, make_timeline
from batchgen.report.waste import LOSSES, make_waste
from batchgen.specs.gates import GatesSpec
from batchgen.stats import SKETCH_FIELDS, make_sketch, parse_sketches
from batchgen.storage import Storage
from batchgen.worker.seal import seal_json

SECTIONS = ["rows", "time", "workers", "bill", "latency", "lengths", "errors", "what", "spec"]
CLUSTER = {"pool": "ray", "workers_min": 1, "workers_max": 2, "gpus_per_worker": 8.0, "driver_node": "head"}
EVIL = "</pre><script>document.title='owned'</script><img src=x onerror=alert(1)>\0\ud800'\"&{{ 7*7 }}"


def make_moment(done: int, *, waiting: bool = True, inflight: int = 80, ready: int = 2) -> Moment:
    return Moment(done, 0, 10 * done, 1, ready, ready, inflight, 100, waiting)


# ---- over time -------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 4000), st.integers(0, 50)), min_size=1, max_size=60))
def test_bins_add_up_to_the_whole_whatever_the_run_took(turns: list[tuple[float, int]]) -> None:
    timeline, now, done = Timeline(100.0), 100.0, 0
    timeline.turn(make_moment(0), now)
    for seconds, rows in turns:
        now, done = now + seconds, done + rows
        timeline.turn(make_moment(done), now)
    assert len(timeline.bins) <= MAX_BINS
    for name in SPAN_FIELDS:
        assert sum(getattr(span, name) for span in timeline.bins) == pytest.approx(getattr(timeline.total, name))
    assert timeline.total.rows == done
    assert timeline.total.seconds == pytest.approx(now - 100)
    assert timeline.total.ready_s == pytest.approx(2 * (now - 100))


def test_the_tail_begins_anew_when_a_shard_comes_back() -> None:
    timeline = Timeline(0.0)
    for now, waiting in enumerate([True, True, False, False, True, False, False]):
        timeline.turn(make_moment(now, waiting=waiting), float(now))
    assert timeline.tail_began_s == 5.0
    assert timeline.tail.seconds == 1.0
    assert timeline.total.seconds == 6.0


def test_a_driver_that_was_busy_elsewhere_is_no_dip_of_the_run() -> None:
    timeline = Timeline(0.0)
    for now in (0.0, 1.0, 2.0, 9.0, 10.0):
        timeline.turn(make_moment(int(10 * now)), now)
    bins = {name: [getattr(span, name) for span in timeline.bins] for name in SPAN_FIELDS}
    shown = make_timeline(make_record(bin_s=timeline.bin_s, bins=bins))
    assert shown["rows_per_s"] == pytest.approx([10.0] * 11)
    assert shown["inflight"] == pytest.approx([80.0] * 11)


# ---- hours -----------------------------------------------------------------------------------------------------------


def make_record(**over: Any) -> dict[str, Any]:
    span = {"seconds": 100.0, "rows": 10, "ready_s": 180.0, "inflight_s": 8000.0, "window_s": 10_000.0}
    tail = {"seconds": 20.0, "ready_s": 40.0, "inflight_s": 1000.0, "window_s": 2000.0, "began_s": 80.0}
    return {
        "epoch": 1, "state": "finished", "message": None, "began_at": 1e9, "elapsed_s": 100.0, "worker_s": 200.0,
        "startup_s": 20.0, "num_tokens": 1000, "total": span, "tail": tail, "bin_s": 50.0, "workers": [],
        "bins": {name: [1.0, 1.0] for name in SPAN_FIELDS}, "gpu_hour_cost": 3.0, "cluster": CLUSTER,
        **over,
    }  # fmt: skip


def test_worker_time_is_useful_or_lost_to_one_of_four_reasons() -> None:
    waste = make_waste(make_record(), 900, is_settled=True)
    assert waste["startup"] == 20
    assert waste["tail"] == pytest.approx(40 * 0.5)
    assert waste["starvation"] == pytest.approx(140 * (1 - 7000 / 8000))
    assert waste["retries"] == pytest.approx(0.1 * (200 - 20 - 20 - 17.5))
    assert sum(waste[name] or 0 for name in ("useful", *LOSSES)) == pytest.approx(200)


@given(st.lists(st.floats(0, 300), min_size=8, max_size=8))
def test_worker_time_adds_up_whatever_a_record_says(seconds: list[float]) -> None:
    """One of a run's first second is made of few looks: they see more of the window than there was of the worker."""
    worker, startup, *spans = seconds
    names = ("ready_s", "inflight_s", "window_s")
    total, tail = dict(zip(names, spans[:3], strict=True)), dict(zip(names, spans[3:], strict=True))
    waste = make_waste(make_record(worker_s=worker, startup_s=startup, total=total, tail=tail), 900, is_settled=True)
    parts = [waste[name] or 0.0 for name in ("useful", *LOSSES)]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(worker)


def test_retries_are_unknown_while_a_journal_may_hold_what_seems_lost() -> None:
    assert make_waste(make_record(), 900, is_settled=False)["retries"] is None
    assert make_waste(make_record(num_tokens=0), 0, is_settled=True)["retries"] is None
    assert make_waste(make_record(), None, is_settled=True)["retries"] is None
    assert (
        make_waste(make_record(), 1005, is_settled=True)["retries"] == 0
    )  # the last heartbeat was before the last row


def make_value(**over: Any) -> dict[str, Any]:
    rows = {"input": 10, "n": 1, "output": 10, "ok": 10, "error": 0, "retryable": 0, "error_rate": 0.0}
    facts: dict[str, Any] = {
        "epoch": 1,
        "state": "finished",
        "message": None,
        "made_at": 1e9,
        "is_unique_checked": True,
    }
    records = over.pop("records", [make_record()])
    table = over.pop("table", STATS_SCHEMA.empty_table())
    return make_report(
        over.pop("spec", None) or make_job_spec(), {**rows, "is_complete": True}, table, records, **{**facts, **over}
    )


def test_a_run_that_got_to_its_end_with_too_many_errors_is_no_success() -> None:
    assert '<span class="state finished">finished<' in make_html({**make_value(), "exit_code": 0})
    assert '<span class="state gate_failed">too many errors<' in make_html({**make_value(), "exit_code": 1})


def test_the_rate_of_a_run_that_goes_on_is_of_what_it_last_told() -> None:
    """Its batches are newer than that: over its time they would be a rate that nothing had."""
    table = make_stats_table([make_batch(0, "worker-0000", 0, 90, completion_tokens=50_000)])
    going_on = make_value(
        state="running", records=[make_record(state="running", elapsed_s=2.0, num_tokens=100)], table=table
    )
    assert going_on["run"]["tokens_per_s"] == 50
    assert "Run, as last told" in make_html(going_on)
    assert make_value(table=table)["run"]["tokens_per_s"] == 500


def test_the_bill_is_of_all_runs_and_unknown_where_one_has_no_price() -> None:
    two = [make_record(), make_record(epoch=2, worker_s=400.0)]
    bill = make_value(records=two, epoch=2)["bill"]
    assert bill["gpu_hours"] == pytest.approx(600 * 8 / 3600)
    assert bill["cost"] == pytest.approx(600 * 8 / 3600 * 3)
    assert bill["wasted_share"] == pytest.approx(1 - bill["shares"]["useful"])
    two[0]["gpu_hour_cost"] = None
    assert make_value(records=two, epoch=2)["bill"]["cost"] is None


def test_what_nobody_knows_is_unknown_and_not_zero() -> None:
    report = make_value(records=[], epoch=7)
    assert report["timeline"] is None
    assert report["bill"]["gpu_hours"] is None
    assert report["run"]["tokens_per_s"] is None
    assert report["job"]["latency"]["latency_p99_s"] is None
    page = make_html(report)
    assert page.count("unknown") > 8
    assert ">0 ms" not in page


# ---- lanes and bars --------------------------------------------------------------------------------------------------


def make_batch(number: int, worker: str, start: float, wall: float, **over: Any) -> BatchStats:
    batch_id = f"shard-{number:09d}-e000001-a1"
    times = {"worker": worker, "started_at": 1e9 + start, "wall_s": wall}
    return BatchStats(batch_id, f"shard-{number:09d}", 1, 1, "committed", **{**times, **over})


def make_life(worker: str, began: float, ready: float | None, ended: float | None, end: str | None) -> dict[str, Any]:
    return {"worker": worker, "node": "n", "began_s": began, "ready_s": ready, "ended_s": ended, "end": end}


def test_a_lane_is_start_up_busy_idle_and_dead() -> None:
    lives = [
        make_life("w1", 0, 10, None, None),
        make_life("w2", 0, 20, 60, "lost"),
        make_life("w3", 5, None, 50, "start_failed"),
    ]
    batches = [
        make_batch(0, "w1", 10, 30),
        make_batch(1, "w1", 20, 30),
        make_batch(2, "w2", 30, 500),
        make_batch(3, "w1", 90, 10),
    ]
    lanes = make_lanes(make_record(workers=lives), make_stats_table(batches))["lanes"]
    by_name = {lane["worker"]: lane for lane in lanes}
    assert by_name["w1"]["busy"] == [(10, 50), (90, 100)]
    assert (by_name["w1"]["startup_s"], by_name["w1"]["idle_s"]) == (10, 40)
    assert by_name["w2"]["busy"] == [(30, 60)]  # its batch outlived it in nobody's eyes
    assert (by_name["w3"]["startup_s"], by_name["w3"]["busy_s"], by_name["w3"]["idle_s"]) == (45, 0, 0)


def test_of_a_thousand_workers_those_are_shown_that_were_least_busy() -> None:
    lives = [make_life(f"w{i:04d}", 0, 1, None, None) for i in range(1000)]
    batches = [make_batch(i, f"w{i:04d}", 1, 99 if i % 50 else 9) for i in range(1000)]
    lanes = make_lanes(make_record(workers=lives), make_stats_table(batches))
    assert lanes["num_workers"] == 1000
    assert len(lanes["lanes"]) == MAX_LANES
    assert {f"w{i:04d}" for i in range(0, 1000, 50)} <= {lane["worker"] for lane in lanes["lanes"]}


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100))))
def test_merged_intervals_neither_overlap_nor_lose_time(pairs: list[tuple[float, float]]) -> None:
    merged = merge_intervals([(min(pair), max(pair)) for pair in pairs], 0.0)
    assert all(a[1] < b[0] for a, b in pairwise(merged))
    assert all(any(a <= min(pair) and max(pair) <= b for a, b in merged) for pair in pairs if pair[0] != pair[1])


@given(st.dictionaries(st.integers(-200, 900), st.integers(1, 10**9), max_size=80))
def test_bars_hold_every_row(counts: dict[int, int]) -> None:
    bars = make_bars(counts, lambda bucket: (1.02 ** (bucket - 1), 1.02**bucket))
    assert sum(rows for *_, rows in bars) == sum(counts.values())
    assert len(bars) <= 36


def test_sketches_become_columns_and_nothing_is_null() -> None:
    texts = [make_sketch(pa.chunked_array([pa.array(values, pa.float64())])) for values in ([0.1, 0.2, 0.2], [], [3.0])]
    lists = parse_sketches([*texts, None]).to_pylist()
    assert [lists[0] and sum(pair["count"] for pair in lists[0]), lists[1], len(lists[2]), lists[3]] == [
        3,
        None,
        1,
        None,
    ]


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (show(None), "unknown"), (show(1234567), "1,234,567"), (show(0.01234, "s"), "0.0123 s"), (show(0), "0"),
        (show_share(None), "unknown"), (show_share(0.00001), "< 0.1 %"), (show_share(1.0), "100 %"),
        (show_time(3e-4), "300 us"), (show_time(0.0), "0 s"), (show_time(125), "2 min 05 s"),
        (show_time(7325), "2 h 02 min"), (show_time(137_332_140), "38,148 h"), (show_amount(5e-5), "< 0.01"),
        (show_short(12_300), "12.3k"), (show_short(4.5e9), "4.5G"), (show_short(None), "unknown"),
    ],
)  # fmt: skip
def test_figures_as_people_read_them(shown: str, text: str) -> None:
    assert shown == text


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(0, 30))
def test_chosen_rows_are_there_and_each_once(sizes: list[int], count: int) -> None:
    chosen = choose_rows("fingerprint", sizes, count)
    assert len(set(chosen)) == len(chosen) == min(count, sum(sizes))
    assert all(0 <= row < sizes[file] for file, row in chosen)
    assert chosen == choose_rows("fingerprint", sizes, count)


# ---- gates -----------------------------------------------------------------------------------------------------------

COUNT = st.integers(0, 50)
LIMIT = st.none() | st.sampled_from([0.0, 0.1, 0.5, 1.0])


@st.composite
def draw_gates(draw: st.DrawFn) -> tuple[GatesSpec, dict[str, Counts]]:
    rates = [name for name in LABELS if name.endswith("_rate")]
    canary = {name: draw(LIMIT) for name in rates if name != "max_duplicate_rate"}
    means = {
        name: draw(st.none() | st.sampled_from([0.0, 1.0, 9.5])) for name in ("min_mean_tokens", "max_mean_tokens")
    }
    final = {**{name: draw(LIMIT) for name in rates}, **means, "min_rows_ok": draw(st.none() | COUNT)}
    spec = GatesSpec.model_validate({"canary": canary, "final": final, "refusals": ["no"], "json_schema": "{}"})

    def draw_counts() -> Counts:
        rows = draw(COUNT)
        ok = draw(st.integers(0, rows))
        answers = st.integers(0, ok)
        return Counts(rows, rows - ok, draw(answers), draw(answers), draw(answers), draw(COUNT), ok, draw(answers))

    return spec, {name: draw_counts() for name in draw(st.sets(st.sampled_from(["canary", "final"])))}


@given(draw_gates())
def test_every_limit_of_a_gate_is_told_as_the_gate_itself_judges(drawn: tuple[GatesSpec, dict[str, Counts]]) -> None:
    spec, seen = drawn
    failed = [
        one
        for name, counts in seen.items()
        for one in {"canary": judge_canary, "final": judge_final}[name](getattr(spec, name), counts)
    ]
    checks = make_gate_checks(spec.model_dump(mode="json"), make_gate_report(spec, failed, seen))
    limits = {
        (name, what)
        for name in ("canary", "final")
        for what in LABELS
        if getattr(getattr(spec, name), what, None) is not None
    }
    assert {(check["gate"], check["what"]) for check in checks} == limits
    assert {(c["gate"], c["what"], c["limit"], c["found"]) for c in checks if c["is_met"] is False} == {
        (one.gate, one.what, one.limit, one.found) for one in failed
    }
    assert all((check["is_met"] is None) == (check["gate"] not in seen) for check in checks)
    assert all(len(show_check(check)) == 4 for check in checks)


def test_a_report_shows_its_gates_and_one_without_has_no_section() -> None:
    gates = {"canary": {"max_error_rate": 0.01}, "final": {"min_mean_tokens": 50, "min_rows_ok": 3}}
    counts = {"rows": 500, "errors": 20, "truncated": None, "refused": None, "unfit": None, "tokens": None}
    failed = [{"gate": "canary", "what": "max_error_rate", "limit": 0.01, "found": 0.04, "told": "told"}]
    spec = make_job_spec(gates=gates)
    report = make_value(spec=spec, gates={"failed": failed, "seen": {"canary": counts}})
    assert [check["is_met"] for check in report["gate_checks"]] == [False, None, None]
    shown = make_html(report)
    for words in (
        "canary: failed",
        "500 output rows looked at",
        ">4 %<",
        "at most 1 %",
        "final: not looked at",
        "at least 50",
    ):
        assert words in shown, words
    assert dict(make_text_rows(report))["gates"] == "canary failed, final not looked at"
    assert make_html(make_value(spec=spec)).count("not looked at") == 5, "a run that goes on has said nothing yet"
    assert 'id="gates"' not in make_html(make_value())


# ---- real runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tree]:
    """Two runs, some errors; rows asked for."""
    root = tmp_path_factory.mktemp("report")
    write_prompts(root / "in")
    tree = make_tree(root / "in", root / "out", root / "calls")
    tree["output"]["report_rows"] = 3
    tree["input"]["passthrough"] = ["key"]
    tree["retry"] = {"max_error_rate": 0.5}
    tree["engine"] = {**tree["engine"], "reject_text": "number 7"}
    run(tree, limit=20)
    run(tree)
    return root / "out", tree


def test_each_run_leaves_a_record_that_counts_all_its_rows(job: tuple[Path, Tree]) -> None:
    out, _ = job
    records = read_records(Storage(str(out)))
    assert [record["epoch"] for record in records] == [1, 2]
    assert [record["state"] for record in records] == ["finished", "finished"]
    assert sum(record["total"]["rows"] for record in records) == len(read_rows(out))
    for record in records:
        assert sum(record["bins"]["rows"]) == record["total"]["rows"]
        assert record["worker_s"] > 0
        assert {"worker-0001"} <= {life["worker"] for life in record["workers"]} <= {"worker-0001", "worker-0002"}
        assert any(
            life["ready_s"] is not None for life in record["workers"]
        )  # the other may still start when all is done
    report = json.loads((out / "report.json").read_text())
    assert sum(run["rows"] for run in report["runs"]) == report["rows"]["output"]
    assert report["bill"]["worker_hours"] == pytest.approx(sum(record["worker_s"] for record in records) / 3600)
    assert report["bill"]["gpu_hours"] is None


def test_errors_have_a_message_of_ours_and_rows_are_shown_because_asked(job: tuple[Path, Tree]) -> None:
    out, _ = job
    report = json.loads((out / "report.json").read_text())
    kinds = {row["error_type"] for row in read_rows(out)} - {None}
    assert {error["error_type"] for error in report["errors"]} == kinds != set()
    assert all(error["example"] for error in report["errors"])
    by_key = {row["custom_id"]: row for row in read_rows(out)}
    assert len(report["generations"]) == 3
    assert all(by_key[row["custom_id"]]["text"] == row["text"] for row in report["generations"])


def test_a_report_made_of_stats_alone_says_the_same(job: tuple[Path, Tree]) -> None:
    out, _ = job
    saved = json.loads((out / "report.json").read_text())
    made = json.loads(json.dumps(read_report(Storage(str(out)), num_generations=3)))
    differing = {name for name in saved if made[name] != saved[name]}
    assert differing == {"made_at"}


@pytest.fixture(scope="module")
def large(job: tuple[Path, Tree], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000,000 rows."""
    return make_large(job[0], tmp_path_factory.mktemp("large") / "out", num_batches=2000, num_workers=16)


def make_large(source: Path, out: Path, *, num_batches: int, num_workers: int) -> Path:
    """OUT as batches of 500 rows on so many workers leave it, stats synthesised, and no data/ at all."""
    shutil.copytree(source, out)
    shutil.rmtree(out / "data")
    first, *others = sorted((out / "batch_stats").iterdir())
    for path in others:
        path.unlink()
    draw = np.random.default_rng(0)
    sketches = [make_sketch(pa.chunked_array([pa.array(draw.lognormal(1, 1, 500))])) for _ in range(20)]
    counts = {"num_rows_ok": 490, "num_rows_error": 10, "completion_tokens": 50_000, "prompt_tokens": 100_000}
    texts = {"finish_reasons": {"stop": 490}, "error_types": {"timed_out": 10}, "lengths": "9.28:200 10.31:290"}
    batches = [
        make_batch(number, f"worker-{number % num_workers:04d}", 10 + 30 * (number // num_workers), 30 - number % 7,
                   **counts, **texts, sketches=dict.fromkeys(SKETCH_FIELDS, sketches[number % 20]))
        for number in range(num_batches)
    ]  # fmt: skip
    pq.write_table(make_stats_table(replace(batch, epoch=2) for batch in batches), first)
    lives = [make_life(f"worker-{number:04d}", 0, 10, None, None) for number in range(num_workers)]
    took_s = 50.0 + 30 * num_batches / num_workers
    storage = Storage(str(out))
    record = {**unseal(read_records(storage)[-1]), "workers": lives, "began_at": 1e9, "elapsed_s": took_s}
    record |= {"bin_s": took_s / MAX_BINS, "bins": {name: [float(n) for n in range(MAX_BINS)] for name in SPAN_FIELDS}}
    storage.put(make_record_path(2), seal_json(record))
    return out


@pytest.mark.soak
def test_the_page_of_ten_million_rows(job: tuple[Path, Tree], tmp_path: Path) -> None:
    """By the command, in a process of its own; what it takes is printed."""
    out = make_large(job[0], tmp_path / "out", num_batches=20_000, num_workers=1000)
    page, started = tmp_path / "page.html", time.monotonic()
    command = [sys.executable, "-m", "batchgen.cli", "report", str(out), "--html", str(page)]
    code = subprocess.run(command, capture_output=True, timeout=100).returncode
    took_s, size = time.monotonic() - started, page.stat().st_size
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    print(f"10,000,000 rows: {took_s:.1f} s, {size / 1e6:.2f} MB, at most {peak_mb:.0f} MB of memory")
    assert code == 0
    assert 50_000 < size < 5_000_000


def test_the_page_of_a_million_rows_is_made_of_stats_alone_and_stays_small(large: Path) -> None:
    report = read_report(Storage(str(large)))
    assert report["job"]["completion_tokens"] == 100_000_000
    assert 50_000 < len(make_html(report).encode()) < 5_000_000


def test_a_run_that_had_nothing_to_do_shows_the_times_of_the_one_before(job: tuple[Path, Tree], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(job[0], out)
    before = json.loads((out / "report.json").read_text())
    tree = {**job[1], "output": {**job[1]["output"], "path": str(out)}}
    report, _ = run(tree)
    assert report["epoch"] == before["epoch"] + 1
    assert report["run"]["elapsed_s"] is None
    assert report["lanes"]["num_workers"] == before["lanes"]["num_workers"] > 0
    for name in ("timeline", "tail", "runs", "bill"):
        assert report[name]
        assert report[name] == before[name]
    page = (out / "report.html").read_text()
    assert f"Of run {before['epoch']}: this one had nothing to do." in page
    assert "<dd>nothing<small>was left to do" in page
    assert "had nothing to do." not in (job[0] / "report.html").read_text()


def unseal(value: dict[str, Any]) -> dict[str, Any]:
    return {name: held for name, held in value.items() if name not in ("is_sealed", "sha256")}


def test_the_page_of_a_run_that_was_killed(job: tuple[Path, Tree], tmp_path: Path) -> None:
    """As a killed driver leaves its folder: the record says running, nothing was finished."""
    out = tmp_path / "out"
    shutil.copytree(job[0], out)
    for name in ("report.json", "report.html", "manifest.json", "_SUCCESS"):
        (out / name).unlink()
    shutil.rmtree(out / "batch_stats")
    sorted((out / "data").iterdir())[0].unlink()
    record = {**read_records(Storage(str(out)))[-1], "state": "running"}
    Storage(str(out)).put(make_record_path(2), seal_json(unseal(record)))
    ended = call_cli("report", str(out), "--html", str(tmp_path / "page.html"), "--json")
    assert ended.code == 0
    report = json.loads(ended.out.splitlines()[-1])
    assert report["state"] == "killed"
    assert report["rows"]["output"] == len(read_rows(out)) < report["rows"]["input"]
    assert not report["rows"]["is_complete"]
    assert report["job"]["completion_tokens"] == sum(row["completion_tokens"] or 0 for row in read_rows(out))
    assert "not there yet" in (tmp_path / "page.html").read_text()
    assert not (out / "report.html").exists()


def test_a_run_that_was_killed_before_its_first_word_does_not_run(job: tuple[Path, Tree], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(job[0], out)
    (out / "report.json").unlink()
    shutil.rmtree(out / "_batchgen" / "runs")
    found = find_report(Storage(str(out)))
    assert (found["state"], found["epoch"], found["timeline"]) == ("killed", 0, None)
    assert found["run"]["elapsed_s"] is None


def test_p99_of_any_batches_in_sql(job: tuple[Path, Tree]) -> None:
    """The query of docs/batch_stats.md, against the rows themselves."""
    out, _ = job
    docs = (Path(__file__).parent.parent / "docs" / "batch_stats.md").read_text()
    query = (
        docs.split("```sql\n")[1].split("```")[0].replace("OUT/", f"{out}/").replace("where worker = 'worker-0001'", "")
    )
    (found,) = duckdb.sql(query.rstrip().rstrip(";")).fetchall()
    exact = np.quantile(
        [row["latency_s"] for row in read_rows(out) if row["latency_s"] is not None], 0.99, method="lower"
    )
    assert found[0] == pytest.approx(float(exact), rel=0.0101)


def test_files_of_earlier_builds_lack_columns_which_are_null(job: tuple[Path, Tree], tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table = read_stats_table(Storage(str(job[0])))
    younger = ["lengths", "error_examples", "latency_sketch"]
    (tmp_path / "batch_stats").mkdir()
    pq.write_table(table.drop_columns(younger), tmp_path / "batch_stats" / "run-000001.parquet")
    found = read_stats_table(Storage(str(tmp_path)))
    assert found.schema == STATS_SCHEMA
    assert all(found[name].null_count == table.num_rows for name in younger)


def ask_by(out: Path, column: str) -> dict[str, Any]:
    ended = call_cli("report", str(out), "--by", column, "--json")
    assert ended.code == 0, ended.err
    return dict(ended.report["by"])


@pytest.mark.parametrize(
    ("column", "source"),
    [("worker", "batch_stats"), ("source_file", "batch_stats"), ("status", "data"), ("key", "data")],
)
def test_figures_by_a_column_are_those_of_its_rows(job: tuple[Path, Tree], column: str, source: str) -> None:
    out, _ = job
    found = ask_by(out, column)
    assert found["source"] == source
    rows = read_rows(out)
    workers = {row["batch_id"]: row["worker"] for row in read_stats_table(Storage(str(out))).to_pylist()}
    values = [workers[row["batch_id"]] if column == "worker" else row[column] for row in rows]
    assert {group["value"] for group in found["groups"]} == set(values)
    for group in found["groups"]:
        mine = [row for row, value in zip(rows, values, strict=True) if value == group["value"]]
        assert group["num_rows_ok"] + group["num_rows_error"] == len(mine)
        assert (group["completion_tokens"] or 0) == sum(row["completion_tokens"] or 0 for row in mine)
        times = [row["latency_s"] for row in mine if row["latency_s"] is not None]
        exact = float(np.quantile(times, 0.99, method="lower")) if times else None
        assert group["latency"]["latency_p99_s"] == pytest.approx(exact, rel=0.0101)


def test_a_column_may_be_called_as_ours_are(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    rows = make_rows(make_ok(0), make_ok(1), make_error(2)).append_column("value", pa.array(["a", "b", "b"]))
    (tmp_path / "data").mkdir()
    pq.write_table(rows, tmp_path / "data" / "a.parquet", row_group_size=2)
    groups = group_rows(Storage(str(tmp_path)), "value")
    assert [(group["value"], group["num_rows_ok"], group["num_rows_error"]) for group in groups] == [
        ("a", 1, 0),
        ("b", 1, 1),
    ]


def test_a_column_that_nobody_has_is_refused_in_one_sentence(job: tuple[Path, Tree]) -> None:
    ended = call_cli("report", str(job[0]), "--by", "nobodys")
    assert ended.code == 2
    assert "--by nobodys: neither batch_stats nor data/ has such a column; name one of source_file" in ended.err


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium")
    if path is None:
        assert "CI" not in os.environ, "CI must have Debian's chromium"
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (390, "light")])
def test_a_browser_opens_the_page_without_a_request_or_a_complaint(
    job: tuple[Path, Tree], browser: Any, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    url = (job[0] / "report.html").as_uri()
    page.goto(url)
    assert (said, asked) == ([], [url])
    assert page.evaluate("[...document.querySelectorAll('section')].map(s => s.id)") == [
        *SECTIONS[:-1],
        "generations",
        "spec",
    ]
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page must not scroll sideways"
    assert page.locator("svg[aria-label]").count() == page.locator("svg").count() > 8
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(251, 250, 248)") == (scheme == "light")
    page.locator("summary").first.click()
    assert page.locator("details[open] table").first.is_visible()
    context.close()


def test_a_browser_shows_a_million_rows(large: Path, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark")
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    path = large / "shown.html"
    path.write_text(make_html(read_report(Storage(str(large)))), encoding="utf-8")
    page.goto(path.as_uri())
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert "worker-0015" in page.locator("#workers").inner_text()
    context.close()


def test_a_generation_is_never_more_than_text(browser: Any, tmp_path: Path) -> None:
    row = {"custom_id": EVIL, "source_file": EVIL, "source_row": 0, "text": EVIL, "reasoning": EVIL}
    row |= {"finish_reason": EVIL, "error_type": None, "completion_tokens": 3}
    batch = make_batch(0, EVIL[:20], 10, 20, node=EVIL.replace("\ud800", ""), engine_version="<b>",
                       error_types={"<i>": 1}, error_examples={"<i>": "<script>1</script>"})  # fmt: skip
    record = make_record(workers=[make_life(EVIL, 0, 10, 100, "lost")])
    report = make_value(generations=[row], message=EVIL, records=[record], table=make_stats_table([batch]))
    path = tmp_path / "page.html"
    path.write_text(make_html(report), encoding="utf-8")
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.goto(path.as_uri())
    assert said == []
    assert page.evaluate("document.title") != "owned"
    assert page.locator("script, img, i:not(.legend i), b:not(figcaption b, .legend b)").count() == 0
    shown = page.locator("article > pre").inner_text()
    assert shown.startswith("</pre><script>document.title='owned'")
    assert "{{ 7*7 }}" in shown
