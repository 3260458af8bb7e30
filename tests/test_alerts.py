"""The alert rules under Prometheus' own checker: each fires and keeps silent when it should, minute by minute."""

import copy
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_server import RULES, find_program

from batchgen.serve.exposition import make_exposition
from batchgen.serve.host import HostReport

FILE: dict[str, Any] = yaml.safe_load(RULES.read_text())
RULE = {rule["alert"]: rule for rule in FILE["groups"][0]["rules"]}
RUN, NEXT = "3f2a91c0-e1", "3f2a91c0-e2"


@dataclass(frozen=True, slots=True)
class Case:
    """What is scraped each minute (`0+5x3` is 0 5 10 15, `_` nothing, `stale` the end of a series), and at which minutes
    the alert fires for RUN and at which it doesn't."""

    name: str
    alert: str
    series: dict[str, str]
    fires: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()


def of(name: str, labels: str = "", run: str = RUN) -> str:
    own = f'SessionName="s",NodeAddress="n",run="{run}"'  # as Ray adds them
    return f"ray_batchgen_{name}{{{own}{labels}}}"


A, B = ',worker="a"', ',worker="b"'
OK, BAD, ENDED = ',finished_reason="stop"', ',error_type="timed_out"', ',state="finished"'
RUNNING, WINDOW, WAITING = "num_requests_running", "max_requests_running", "num_requests_waiting"
TOKENS, SUCCESS, FAILURE = "generation_tokens_total", "request_success_total", "request_failure_total"
LOST, LOOKED, RUNS_ENDED = "workers_lost", "looked_at_seconds", "runs_ended_total"

CASES = [
    Case(
        "all engines hang from the tenth minute",
        "BatchgenStalled",
        {of(TOKENS, A): "0+600x10 6000x60", of(TOKENS, B): "0+600x10 6000x60", of(RUNNING, A): "64x70"},
        fires=(31, 60),
        silent=(5, 15, 25),
    ),
    Case(
        "one engine of two works",
        "BatchgenStalled",
        {of(TOKENS, A): "0+600x70", of(TOKENS, B): "0+600x10 6000x60", of(RUNNING, B): "64x70"},
        silent=(31, 60),
    ),
    Case(
        "nothing is in flight",
        "BatchgenStalled",
        {of(TOKENS, A): "0+600x10 6000x60", of(RUNNING, A): "64x10 0x60"},
        silent=(31, 60),
    ),
    Case(
        "the run has ended: its gauges are gone, its counters stay",
        "BatchgenStalled",
        {of(TOKENS, A): "0+600x10 6000x60", of(RUNNING, A): "64x10 stale"},
        silent=(31, 60),
    ),
    Case(
        "two of a hundred rows fail",
        "BatchgenErrorRate",
        {of(SUCCESS, A + OK): "0+98x60", of(FAILURE, A + BAD): "0+2x60"},
        fires=(40,),
        silent=(10,),
    ),
    Case(
        "every row fails, so that no success was ever counted",
        "BatchgenErrorRate",
        {of(FAILURE, A + BAD): "0+2x60"},
        fires=(40,),
    ),
    Case(
        "one of two hundred rows fails",
        "BatchgenErrorRate",
        {of(SUCCESS, A + OK): "0+199x60", of(FAILURE, A + BAD): "0+1x60"},
        silent=(20, 40),
    ),
    Case("no row fails", "BatchgenErrorRate", {of(SUCCESS, A + OK): "0+100x60"}, silent=(20, 40)),
    Case(
        "a burst of errors that is over",
        "BatchgenErrorRate",
        {of(SUCCESS, A + OK): "0+100x60", of(FAILURE, A + BAD): "0x10 0+20x4 80x50"},
        silent=(20, 45),
    ),
    Case(
        "half of the window is empty while rows wait",
        "BatchgenStarved",
        {of(RUNNING, A): "32x60", of(WINDOW, A): "64x60", of(WAITING, A): "1000x60"},
        fires=(20, 50),
        silent=(10,),
    ),
    Case(
        "half of the window is empty, and nothing waits: the tail",
        "BatchgenStarved",
        {of(RUNNING, A): "32x60", of(WINDOW, A): "64x60", of(WAITING, A): "0x60"},
        silent=(20, 50),
    ),
    Case(
        "the window is full",
        "BatchgenStarved",
        {of(RUNNING, A): "60x60", of(WINDOW, A): "64x60", of(WAITING, A): "1000x60"},
        silent=(20, 50),
    ),
    Case(
        "four workers are lost within a run's first hour",
        "BatchgenWorkersLost",
        {of(LOST): "0x5 1x5 2x5 3x5 4x90"},
        fires=(25, 60),
        silent=(23, 90),
    ),
    Case(
        "one worker an hour is lost",
        "BatchgenWorkersLost",
        {of(LOST): "0x60 1x60 2x60 3x60 4x60"},
        silent=(100, 200, 280),
    ),
    Case(
        "the driver is killed", "BatchgenDriverGone", {of(LOOKED): "0+60x20 stale"}, fires=(31, 75), silent=(20, 29, 85)
    ),
    Case("the driver works", "BatchgenDriverGone", {of(LOOKED): "0+60x100"}, silent=(20, 90)),
    Case(
        "the run has ended",
        "BatchgenDriverGone",
        {of(LOOKED): "0+60x20 stale", of(RUNS_ENDED, ENDED): "_x20 1x80"},
        silent=(31, 75),
    ),
    Case(
        "the run has ended, and its cluster went a minute later",
        "BatchgenDriverGone",
        {of(LOOKED): "0+60x20 stale", of(RUNS_ENDED, ENDED): "_x20 1 1 stale"},
        silent=(31, 75),
    ),
    Case(
        "it was killed and submitted again",
        "BatchgenDriverGone",
        {
            of(LOOKED): "0+60x20 stale",
            of(RUNS_ENDED, ',state="followed"'): "_x40 1x80",
            of(LOOKED, run=NEXT): "_x40 0+60x80",
        },
        fires=(35,),
        silent=(45, 75),
    ),
    Case(
        "it was killed, and an earlier run of the job had ended",
        "BatchgenDriverGone",
        {of(LOOKED): "0+60x20 stale", of(RUNS_ENDED, ENDED, run="3f2a91c0-e0"): "1x100"},
        fires=(31,),
    ),
    Case(
        "five minutes of it could not be scraped",
        "BatchgenDriverGone",
        {of(LOOKED): "0+60x20 stale _x4 0+60x60"},
        silent=(22, 24, 40),
    ),
]


def expect(case: Case, minute: int, *, is_firing: bool) -> dict[str, Any]:
    rule = RULE[case.alert]
    told = {name: text.replace("{{ $labels.run }}", RUN) for name, text in rule["annotations"].items()}
    alerts = [{"exp_labels": {"run": RUN, **rule["labels"]}, "exp_annotations": told}] if is_firing else []
    return {"alertname": case.alert, "eval_time": f"{minute}m", "exp_alerts": alerts}


def check(folder: Path, cases: list[Case], rules: Path = RULES) -> subprocess.CompletedProcess[str]:
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
            "alert_rule_test": [
                *(expect(case, minute, is_firing=True) for minute in case.fires),
                *(expect(case, minute, is_firing=False) for minute in case.silent),
            ],
        }
        for case in cases
    ]
    whole = {"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": tests}
    (folder / "tests.yaml").write_text(yaml.safe_dump(whole))
    command = [find_program("promtool"), "test", "rules", str(folder / "tests.yaml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_prometheus_accepts_the_rules() -> None:
    done = subprocess.run([find_program("promtool"), "check", "rules", str(RULES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(RULE)} rules found" in done.stdout


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_fires_and_keeps_silent(case: Case, tmp_path: Path) -> None:
    done = check(tmp_path, [case])
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_is_seen_to_fire_and_to_keep_silent() -> None:
    assert {case.alert for case in CASES if case.fires} == RULE.keys()
    assert {case.alert for case in CASES if not case.fires} == RULE.keys()


# alert -> a wrong rule in its place: (what is replaced, by what)
WRONG = [
    ("BatchgenStalled", "expr", "== 0", "< 0"),
    ("BatchgenStalled", "expr", " and sum by (run) (ray_batchgen_num_requests_running) > 0", ""),
    ("BatchgenStalled", "for", "10m", "0m"),
    ("BatchgenErrorRate", "expr", "0.01", "0.03"),
    ("BatchgenErrorRate", "expr", "0.01", "0.001"),
    ("BatchgenErrorRate", "expr", " or 0 * sum by (run) (rate(ray_batchgen_request_failure_total[15m]))", ""),
    ("BatchgenStarved", "expr", "< 0.8", "< 0.4"),
    ("BatchgenStarved", "expr", " and sum by (run) (ray_batchgen_num_requests_waiting) > 0", ""),
    ("BatchgenWorkersLost", "expr", "> 3", "> 4"),
    ("BatchgenWorkersLost", "expr", "[1h]", "[5h]"),
    ("BatchgenDriverGone", "expr", " unless max by (run) (ray_batchgen_looked_at_seconds)", ""),
    (
        "BatchgenDriverGone",
        "expr",
        "last_over_time(ray_batchgen_runs_ended_total[1h])",
        "ray_batchgen_runs_ended_total",
    ),
    (
        "BatchgenDriverGone",
        "expr",
        "last_over_time(ray_batchgen_looked_at_seconds[1h])",
        "ray_batchgen_looked_at_seconds",
    ),
    ("BatchgenDriverGone", "for", "10m", "0m"),
]


@pytest.mark.parametrize(("alert", "part", "old", "new"), WRONG)
def test_a_wrong_rule_would_be_seen(alert: str, part: str, old: str, new: str, tmp_path: Path) -> None:
    changed = copy.deepcopy(FILE)
    (rule,) = (rule for rule in changed["groups"][0]["rules"] if rule["alert"] == alert)
    assert old in rule[part]
    rule[part] = rule[part].replace(old, new)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(changed))
    done = check(tmp_path, [case for case in CASES if case.alert == alert], tmp_path / "rules.yaml")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout + done.stderr


def test_prometheus_reads_what_the_endpoint_says() -> None:
    report = HostReport(num_workers=1, num_bulk=2, num_urgent=3, total_tokens=4, num_answered=5, death=None)
    text = make_exposition({"org/model:1.2@main": {"batchgen-x-0": report, "batchgen-x-1": report}, "none": {}})
    command = [find_program("promtool"), "check", "metrics"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
