"""Rows that kill engines, in whole jobs: the culprit ends as an error row, everybody else as a generation, and no more
engines die than it takes."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jobs_util import (
    Tree,
    check_conserved,
    check_output,
    list_output,
    make_prompts,
    make_tree,
    merge,
    read_folder,
    run,
    write_file,
)

from batchgen.engines import wrapping_engines
from batchgen.manifest import read_json
from batchgen.records import Generation, Request
from batchgen.storage import Storage

WINDOW = 16
# Long enough that a window is full when a row dies, short enough that a death costs a test nothing.
ENGINE = {
    "has_latency": True,
    "slots": WINDOW,
    "max_inflight": WINDOW,
    "decode_tokens_per_s": 400,
    "sigma": 0.3,
    "die_text": "number",
}
ONE_WORKER = {"workers": {"min": 1, "max": 1}}


def write_rows(folder: Path, num_rows: int, marked: dict[int, str]) -> list[tuple[str, int]]:
    """Prompts without "number", but for the marked ones."""
    table = make_prompts(num_rows)
    prompts = [marked.get(row, f"question {row} é") for row in range(num_rows)]
    name = write_file(folder / "part-000.parquet", table.set_column(0, "prompt", [prompts]))
    return [(name, num_rows)]


def mark(*rows: int, text: str = "number") -> dict[int, str]:
    return {row: f"{text} {row}" for row in rows}


def list_errors(rows: list[dict[str, Any]]) -> dict[int, str]:
    return {row["source_row"]: row["error_type"] for row in rows if row["status"] == "error"}


def count_lost(view: Any) -> int:
    return sum(" was lost: " in warned or "is started anew: " in warned for warned in view.warned)


def bound(num_suspects: int) -> int:
    return math.ceil(math.log2(num_suspects)) + 1


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return make_tree(
        tmp_path / "in",
        tmp_path / "out",
        tmp_path / "calls",
        engine=ENGINE,
        output={"rows_per_shard": 20},
        cluster=ONE_WORKER,
        retry={"max_error_rate": 1.0},
    )


@pytest.mark.parametrize("death", ["engine", "restart"])
@pytest.mark.parametrize("culprit", [0, 23, 59])
def test_the_culprit_alone_ends_as_an_error(tree: Tree, tmp_path: Path, death: str, culprit: int) -> None:
    files = write_rows(tmp_path / "in", 60, mark(culprit))
    report, view = run(merge(tree, {"engine": {"death": death}}))
    rows = check_output(tmp_path / "out", files)
    assert list_errors(rows) == {culprit: "quarantined"}
    assert not rows[culprit]["is_retryable"]
    assert report["exit_code"] == 0
    check_conserved(tmp_path / "out", files)
    assert count_lost(view) <= 1 + bound(WINDOW), view.warned
    assert list_output(tmp_path / "out", "_batchgen/journal") == []


@pytest.mark.parametrize("death", ["engine", "restart"])
def test_several_culprits_on_several_workers(tree: Tree, tmp_path: Path, death: str) -> None:
    culprits = (3, 4, 37, 90)
    files = write_rows(tmp_path / "in", 120, mark(*culprits))
    changed = merge(tree, {"engine": {"death": death}, "cluster": {"workers": {"min": 2, "max": 3}}})
    _, view = run(changed)
    rows = check_output(tmp_path / "out", files)
    assert list_errors(rows) == dict.fromkeys(culprits, "quarantined")
    assert count_lost(view) <= len(culprits) * (1 + bound(2 * WINDOW)), view.warned


def test_innocent_rows_get_their_attempts_back(tree: Tree, tmp_path: Path) -> None:
    files = write_rows(tmp_path / "in", 40, mark(5))
    run(merge(tree, {"retry": {"max_attempts": 1, "max_shard_attempts": 1}}))
    rows = check_output(tmp_path / "out", files)
    assert list_errors(rows) == {5: "quarantined"}
    assert {row["num_attempts"] for row in rows if row["status"] == "ok"} == {1}


def test_a_quarantined_row_is_tried_again_only_when_all_errors_are(tree: Tree, tmp_path: Path) -> None:
    files = write_rows(tmp_path / "in", 40, mark(5))
    run(tree)
    num_calls = len(list((tmp_path / "calls").glob("*")))
    well = merge(tree, {"engine": {"die_text": None}})
    run(well)
    assert list_errors(check_output(tmp_path / "out", files)) == {5: "quarantined"}
    assert len(list((tmp_path / "calls").glob("*"))) == num_calls
    run(merge(well, {"retry": {"errors": "all"}}))
    assert list_errors(check_output(tmp_path / "out", files)) == {}


def test_n_samples_of_a_row_are_one_suspect(tree: Tree, tmp_path: Path) -> None:
    files = write_rows(tmp_path / "in", 30, mark(11))
    run(merge(tree, {"sampling": {"n": 3}}))
    rows = check_output(tmp_path / "out", files, n=3)
    assert [row["source_row"] for row in rows if row["status"] == "error"] == [11] * 3


def test_what_is_suspected_survives_the_driver(tree: Tree, tmp_path: Path) -> None:
    """Stopped while suspects are tried, the next run goes on where it stopped: no engine dies for what is known."""
    files = write_rows(tmp_path / "in", 60, mark(23))
    # Two culprits less would be found at once; the run stops at the first one.
    _, first = run(merge(tree, {"retry": {"max_quarantined": 0}}))
    saved = read_json(Storage(str(tmp_path / "out")), "_batchgen/suspects.json")
    assert saved is not None
    assert [ranges for _, ranges in saved["quarantined"]] == [[[23, 24]]]
    report, second = run(tree)
    assert count_lost(second) == 0, second.warned
    assert report["exit_code"] == 0
    assert list_errors(check_output(tmp_path / "out", files)) == {23: "quarantined"}
    assert count_lost(first) <= 1 + bound(WINDOW)


def test_a_run_stops_when_it_is_the_engine_that_is_broken(tree: Tree, tmp_path: Path) -> None:
    """Every row kills it: no row is blamed for that, and nobody pays for a night of restarts."""
    write_rows(tmp_path / "in", 60, mark(*range(60)))
    report, view = run(tree)
    assert report["state"] == "stopped"
    assert report["exit_code"] == 3
    assert "in a row failed to start" in report["message"]
    # Every second trial without a token counts; a first worker that had made tokens before it died counts for nothing.
    assert count_lost(view) <= 1 + 2 * 3
    assert list_output(tmp_path / "out", "data") == []


def test_more_culprits_than_allowed_stop_the_run(tree: Tree, tmp_path: Path) -> None:
    write_rows(tmp_path / "in", 120, mark(3, 44, 83))
    report, _ = run(merge(tree, {"retry": {"max_quarantined": 1}}))
    assert report["exit_code"] == 3
    assert "retry.max_quarantined" in report["message"]


class StruckEngine:
    """An engine that somebody kills, whatever it works on: at every `every`th request of the run, `num_kills` times; only
    once it has answered, for three that die before count as broken."""

    def __init__(self, engine: Any, kills: "Kills") -> None:
        self._engine, self._kills = engine, kills
        self._has_answered = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, request: Request) -> Generation:
        if self._kills.is_due(self._has_answered):
            self._has_answered = False
            self._engine.kill("somebody killed it")
        answer: Generation = await self._engine.generate(request)
        self._has_answered = True
        return answer


@dataclass
class Kills:
    every: int
    num_left: int
    num_requests: int = 0

    def is_due(self, can_be: bool) -> bool:
        """The first request from the `every`th on at which an engine can be killed."""
        self.num_requests += 1
        is_due = can_be and self.num_left > 0 and self.num_requests >= self.every
        self.num_requests *= not is_due
        self.num_left -= is_due
        return is_due


@pytest.mark.parametrize(("culprits", "num_kills"), [((), 20), ((37,), 6)])
def test_a_storm_of_kills_quarantines_nobody_else(
    tree: Tree, tmp_path: Path, culprits: tuple[int, ...], num_kills: int
) -> None:
    """Engines that work die in a row, so often that most die while suspects are tried."""
    files, kills = write_rows(tmp_path / "in", 320, mark(*culprits)), Kills(9, num_kills)
    changed = merge(
        tree,
        {
            "cluster": {"workers": {"min": 3, "max": 3}},
            "engine": {"death": "restart"},
            # Threads decide which rows are hit: the default is tried in `test_suspects`, by seeds.
            "retry": {"max_deaths_alone": 3},
        },
    )
    with wrapping_engines(lambda engine: StruckEngine(engine, kills)):
        report, view = run(changed)
    assert kills.num_left == 0, (report["message"], view.warned)
    assert list_errors(check_output(tmp_path / "out", files)) == dict.fromkeys(culprits, "quarantined"), view.warned
    assert count_lost(view) >= num_kills
    assert report["exit_code"] == 0


def test_a_row_that_hangs_ends_as_an_error(tree: Tree, tmp_path: Path) -> None:
    """Others go on; only this one is given up when its time is over."""
    files = write_rows(tmp_path / "in", 60, mark(7, text="stuck"))
    report, view = run(
        merge(tree, {"engine": {"die_text": None, "hang_text": "stuck"}, "retry": {"request_timeout_s": 1.0}})
    )
    rows = check_output(tmp_path / "out", files)
    assert list_errors(rows) == {7: "timed_out"}
    assert rows[7]["is_retryable"]
    assert report["exit_code"] == 0
    assert count_lost(view) == 0


def test_an_engine_that_hangs_of_a_row_is_a_death(tree: Tree, tmp_path: Path) -> None:
    """The whole engine is stuck: the watchdog ends the worker, and the row is found as one that kills."""
    files = write_rows(tmp_path / "in", 12, mark(7, text="stuck"))
    stuck = {"die_text": None, "hang_text": "stuck", "slots": 1, "decode_tokens_per_s": 4000}
    report, _ = run(merge(tree, {"engine": stuck, "cluster": {"stall_timeout_s": 0.8}}))
    assert list_errors(check_output(tmp_path / "out", files)) == {7: "quarantined"}
    assert report["exit_code"] == 0


def test_a_prompt_of_ten_megabytes_is_that_rows_error(tree: Tree, tmp_path: Path) -> None:
    files = write_rows(tmp_path / "in", 20, {4: "x" * 10_000_000})
    run(tree)
    assert list_errors(check_output(tmp_path / "out", files)) == {4: "prompt_too_long"}


def test_what_an_engine_lets_through_is_blamed_on_the_row(tree: Tree, tmp_path: Path) -> None:
    """See `test_worker`: an engine with a bug for one row. Here: nothing is left of the journal, stats are whole."""
    write_rows(tmp_path / "in", 40, mark(5))
    run(tree)
    stats = read_folder(tmp_path / "out", "batch_stats").to_pylist()
    lost = [row for row in stats if row["outcome"] == "lost"]
    assert lost
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rows"]["error"] == 1
