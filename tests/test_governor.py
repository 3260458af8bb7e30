"""A run keeps its deadline and its GPU-hours: enough workers, never more than can be paid, and a clean stop in time."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs_util import check_output, count_calls, make_tree, merge, read_folder, run, write_prompts, write_spec
from typer.testing import CliRunner

from batchgen import cli
from batchgen.queue.governor import MARGIN_S, RunFacts, format_hours, govern, parse_deadline
from batchgen.queue.roster import Roster
from batchgen.spec import ClusterSpec, WorkersSpec

NOW = 1_800_000_000.0
DRAIN_S = 20.0
EDGE_S = DRAIN_S + MARGIN_S


def make_cluster(in_s: float | None = None, gpu_hours: float | None = None, **workers: int) -> ClusterSpec:
    at = None if in_s is None else datetime.fromtimestamp(NOW + in_s, UTC)
    counts = WorkersSpec(**{"min": 1, "max": 10, **workers})
    return ClusterSpec(deadline=at, max_gpu_hours=gpu_hours, gpus_per_worker=8, drain_s=DRAIN_S, workers=counts)


def make_facts(**changes: Any) -> RunFacts:
    plain = RunFacts(NOW, 3600, 10_000, 1, 0, gpu_s=0.0, rows_per_s=1.0, startup_s=60.0)
    return dataclasses.replace(plain, **changes)


def test_without_limits_nothing_is_asked_for() -> None:
    verdict = govern(make_facts(), make_cluster())
    assert (verdict.min_workers, verdict.max_workers, verdict.stop, verdict.warning) == (1, 10, None, None)


@pytest.mark.parametrize(
    ("in_s", "min_workers"),
    [(86_400.0, 1), (3600 / 0.8 + 60 + EDGE_S, 1), (1800 + EDGE_S, 3), (600 + EDGE_S, 9), (300 + EDGE_S, 10)],
)
def test_a_nearer_deadline_asks_for_more_workers(in_s: float, min_workers: int) -> None:
    verdict = govern(make_facts(), make_cluster(in_s))
    assert (verdict.min_workers, verdict.stop) == (min_workers, None)


def test_nothing_is_foretold_before_anything_was_measured() -> None:
    verdict = govern(make_facts(rows_per_s=None, startup_s=None), make_cluster(60.0, gpu_hours=0.1))
    assert (verdict.min_workers, verdict.warning) == (1, None)


def test_the_run_stops_early_enough_to_drain() -> None:
    assert govern(make_facts(), make_cluster(EDGE_S + 1)).stop is None
    stop = govern(make_facts(), make_cluster(EDGE_S)).stop
    assert stop is not None
    assert "the deadline 2027-01-15T" in stop
    assert "3,600 of 10,000 rows are missing, about 1 h 00 min of one worker; start it again to go on" in stop


def test_gpu_hours_stop_the_run_before_they_are_used_up() -> None:
    cluster = make_cluster(gpu_hours=1.0)
    edge = 3600 - 8 * EDGE_S  # one worker of 8 GPUs, while it drains
    assert govern(make_facts(gpu_s=edge - 1), cluster).stop is None
    stop = govern(make_facts(gpu_s=edge), cluster).stop
    assert stop is not None
    assert stop.startswith("0.94 of 1 GPU-hours are used; 3,600 of 10,000 rows are missing")


@pytest.mark.parametrize(("gpu_hours", "most"), [(100.0, 10), (8.2, 2), (8.1, 1), (1.0, 1)])
def test_a_worker_is_started_only_where_its_start_up_can_be_paid(gpu_hours: float, most: int) -> None:
    """3,600 rows at one a second are 8 GPU-hours, a start-up 0.13, the drain of one worker 0.06."""
    assert govern(make_facts(), make_cluster(gpu_hours=gpu_hours)).max_workers == most


def test_what_will_be_missing_is_said_in_time() -> None:
    verdict = govern(make_facts(), make_cluster(600 + EDGE_S, max=2))
    assert verdict.warning is not None
    assert "about 2,460 of 10,000 rows will be missing" in verdict.warning  # 600 s of one, 540 s of a second worker
    assert govern(make_facts(), make_cluster(86_400.0)).warning is None
    warning = govern(make_facts(), make_cluster(gpu_hours=4 + 8 * EDGE_S / 3600)).warning
    assert warning is not None
    assert "about 1,800 of" in warning


facts = st.builds(
    RunFacts, st.just(NOW), st.integers(0, 10**6), st.just(10**6), st.integers(0, 20), st.integers(0, 5),
    st.floats(0, 1e6), st.none() | st.floats(1e-3, 1e3), st.none() | st.floats(0, 1e4),
)  # fmt: skip
clusters = st.builds(
    lambda in_s, hours, least, more: make_cluster(in_s, hours, min=least, max=least + more),
    st.none() | st.floats(-1e5, 1e6), st.none() | st.floats(0.01, 1e4), st.integers(1, 5), st.integers(0, 20),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(facts, clusters)
def test_a_verdict_keeps_to_the_spec(known: RunFacts, cluster: ClusterSpec) -> None:
    verdict = govern(known, cluster)
    assert 0 < verdict.min_workers <= verdict.max_workers <= cluster.workers.max
    if cluster.deadline is None and cluster.max_gpu_hours is None:
        assert (verdict.stop, verdict.warning, verdict.max_workers) == (None, None, cluster.workers.max)
    assert verdict.stop is None or verdict.warning is None


def test_gpu_time_counts_start_up_and_ends_with_the_worker() -> None:
    from makers import make_worker_info

    roster = Roster(8.0)
    worker_id = roster.make_worker_id(0.0)
    assert roster.count_gpu_s(50.0) == 400.0, "asked for: nobody knows better yet"
    assert roster.greet(dataclasses.replace(make_worker_info(worker_id), startup_s=30.0), 100.0)
    assert roster.count_gpu_s(110.0) == 8 * 40.0, "it waited for a machine first, and then started for 30 s"
    roster.remove(worker_id, 130.0)
    assert roster.count_gpu_s(999.0) == 8 * 60.0
    roster.count_start_failure(roster.make_worker_id(200.0), 210.0, "no")
    assert roster.count_gpu_s(999.0) == 8 * 70.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8h", "2026-11-28T04:00:00+00:00"),
        ("1d12h", "2026-11-29T08:00:00+00:00"),
        ("1.5h", "2026-11-27T21:30:00+00:00"),
        ("90m", "2026-11-27T21:30:00+00:00"),
        ("2026-11-28T06:00Z", "2026-11-28T06:00:00+00:00"),
        ("2026-11-28T06:00+02:00", "2026-11-28T04:00:00+00:00"),
    ],
)
def test_deadlines_are_times_or_times_from_now(text: str, expected: str) -> None:
    assert parse_deadline(text, datetime(2026, 11, 27, 20, 0, tzinfo=UTC)).isoformat() == expected


@pytest.mark.parametrize("text", ["9999999d", "99999999999999d", "9" * 400 + "h"])
def test_a_deadline_that_no_calendar_has_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="leave it out"):
        parse_deadline(text, datetime(2026, 11, 27, tzinfo=UTC))


@pytest.mark.parametrize("text", ["", "tomorrow", "06:00", "2026-11-28T06:00", "8", "h"])
def test_what_is_no_deadline_is_refused_with_the_mend(text: str) -> None:
    with pytest.raises(ValueError, match="UTC offset"):
        parse_deadline(text, datetime(2026, 11, 27, tzinfo=UTC))


def test_hours_are_shown_for_people() -> None:
    assert [format_hours(s) for s in (1, 3599, 3600, 45_000)] == ["1 min", "1 h 00 min", "1 h 00 min", "12 h 30 min"]


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_that_meets_its_limit_is_a_valid_part_and_goes_on(tmp_path: Path) -> None:
    files = write_prompts(tmp_path / "in", (200,))
    tree = make_tree(
        tmp_path / "in", tmp_path / "out", tmp_path / "calls",
        engine={"has_latency": True, "slots": 4, "max_inflight": 4, "decode_tokens_per_s": 100},
        cluster={"gpus_per_worker": 8, "max_gpu_hours": 8 * (5 + 2.0) * 2 / 3600, "drain_s": 0.3},
    )  # fmt: skip
    report, _ = run(tree)
    assert report["exit_code"] == 3
    assert "GPU-hours are used" in report["message"]
    assert "of 200 rows are missing" in report["message"]
    assert 0 < report["run"]["gpu_hours"] <= tree["cluster"]["max_gpu_hours"]
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    part = read_folder(tmp_path / "out")
    assert 0 < part.num_rows < 200
    num_calls = count_calls(tmp_path / "calls")
    again, _ = run(merge(tree, {"cluster": {"max_gpu_hours": 100}, "engine": {"has_latency": False}}))
    assert again["exit_code"] == 0
    check_output(tmp_path / "out", files)
    # Rows in flight when the drain ended are made again.
    assert count_calls(tmp_path / "calls") - num_calls <= 200 - num_calls + 8


def test_a_deadline_on_the_command_line(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in", (50,))
    spec = write_spec(tmp_path, make_tree(tmp_path / "in", tmp_path / "out"))
    stopped = CliRunner().invoke(cli.app, ["run", spec, "--deadline", "1s"])
    assert stopped.exit_code == 3
    assert "the deadline" in stopped.stderr
    wrong = CliRunner().invoke(cli.app, ["run", spec, "--deadline", "soon"])
    assert wrong.exit_code == 2
    assert "--deadline soon: write a time with its UTC offset" in wrong.stderr
    refused = CliRunner().invoke(cli.app, ["run", spec, "--max-gpu-hours", "3"])
    assert refused.exit_code == 2
    assert "gpus_per_worker is 0" in refused.stderr
    assert CliRunner().invoke(cli.app, ["run", spec, "--deadline", "1h"]).exit_code == 0
