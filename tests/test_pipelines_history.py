"""What a pipeline's events add up to: ends long ago, partitions, their attempts and their GPU-hours."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.pipelines.calendar import make_key
from batchgen.pipelines.decide import (
    Arrival,
    Outcome,
    choose_previous,
    decide_outcome,
    decide_start,
    describe_failures,
    lend_gpu_hours,
)
from batchgen.pipelines.events import AttemptFailed, Began, Deleted, Ended, PartitionEnded, Retired, Submitted
from batchgen.pipelines.history import History, dump_history, parse_history
from batchgen.pipelines.partitions import make_partition_name
from batchgen.pipelines.past import End, Past
from batchgen.pipelines.spec import PipelineSpec

START = datetime(2026, 1, 1, tzinfo=UTC)
KEY = "2026-11-28T0100Z"


def make_spec(**changes: Any) -> PipelineSpec:
    fields = {
        "name": "nightly",
        "state": "memory://state",
        "schedule": {"cron": "0 2 * * *"},
        "stages": [{"name": "generate", "job": {"output": {"path": "memory://out/{{ logical_time }}/{{ lang }}"}}}],
        "partitions": {"lang": ["en", "de", "fr"]},
    }
    return PipelineSpec.model_validate({**fields, **changes})


def end(history: History, key: str, state: End, attempt: int = 1) -> None:
    history.apply(Began(key, "asked", 0.0))
    history.apply(Submitted(key, attempt, "order", "ray", 0.0))
    history.apply(PartitionEnded(key, "", state, "", 0.0, 0.0))
    history.apply(Ended(key, state, "", 0.0))


def begin(history: History, *partitions: str) -> None:
    history.apply(Began(KEY, "asked", 0.0, None, partitions))


@given(st.lists(st.tuples(st.integers(0, 200_000), st.sampled_from(["succeeded", "failed", "forgotten"])), max_size=60))
def test_the_past_remembers_how_each_date_ended(steps: list[tuple[int, Any]]) -> None:
    past, known = Past(), dict[str, End]()
    for minute, what in steps:
        key = make_key(START + timedelta(minutes=minute))
        if what == "forgotten":
            past.discard(key)
            known.pop(key, None)
        else:
            past.add(key, what, 1)
            known[key] = what
    assert {key: past.get_end(key) for key in known} == known
    assert past.get_end("2031-01-01T0000Z") is None
    for state in ("succeeded", "failed"):
        assert past.count(state) == list(known.values()).count(state)


def test_three_years_of_hours_take_little_room() -> None:
    """Their keys alone would take half a megabyte, in every copy of the log."""
    past = Past()
    for hour in range(3 * 365 * 24):
        past.add(make_key(START + timedelta(hours=hour)), "failed" if hour % 97 == 0 else "succeeded", 1)
    size = len(json.dumps([(month.succeeded, month.failed) for month in past.months.values()]))
    assert size < 10_000
    assert (past.count("failed"), past.count("succeeded")) == (271, 3 * 365 * 24 - 271)


def test_a_date_that_failed_long_ago_goes_on_counting_its_attempts() -> None:
    """Its old numbers stand in submission ids and in paths, with how they ended."""
    history = History()
    end(history, KEY, "failed", attempt=3)
    for day in range(1100):
        end(history, make_key(START + timedelta(days=day)), "succeeded")
    assert KEY not in history.runs
    history = parse_history(dump_history(history))
    assert history.get_state(KEY) == "failed"
    assert (history.count("failed"), history.count("succeeded")) == (1, 1100)
    history.apply(Began(KEY, "asked", 0.0))
    assert history.runs[KEY].parts[""].attempt == 3
    assert history.count("failed") == 0


def test_what_is_asked_for_again_is_only_what_failed() -> None:
    history = History()
    begin(history, "en", "de")
    for name, attempt, state in (("en", 1, "succeeded"), ("de", 1, "failed"), ("de", 2, "failed")):
        history.apply(Submitted(KEY, attempt, name, "ray", 0.0, partition=name))
        history.apply(PartitionEnded(KEY, name, state, "", 5.0, 0.0))
    history.apply(Ended(KEY, "failed", "", 0.0))
    again = parse_history(dump_history(history))
    begin(again, "en", "de", "fr")
    parts = again.runs[KEY].parts
    assert [(part.state, part.attempt) for part in parts.values()] == [("succeeded", 1), ("waiting", 2), ("waiting", 2)]
    assert again.runs[KEY].gpu_hours == 0.0, "a run's own"
    history.apply(Retired(KEY, 0.0))
    history.apply(Deleted(KEY, 0.0))
    begin(history, "en", "de")
    assert [part.state for part in history.runs[KEY].parts.values()] == ["waiting", "waiting"], "their outputs are gone"


def test_all_attempts_at_a_date_read_the_same_run_before_it() -> None:
    """Or none: jobs that a retry renders otherwise would not fit the folders that they go on in."""
    older, old, new = (f"2026-11-{day}T0100Z" for day in (25, 26, 27))

    def submit(history: History, attempt: int) -> str:
        previous = choose_previous(history, history.runs[KEY], "")
        key = previous.key if previous is not None else ""
        history.apply(Submitted(KEY, attempt, f"order-{attempt}", "ray", 0.0, previous=key, length_prior=key))
        return key

    def fail(history: History, is_last: bool) -> None:
        if is_last:
            history.apply(PartitionEnded(KEY, "", "failed", "", 0.0, 0.0))
            history.apply(Ended(KEY, "failed", "", 0.0))
        else:
            history.apply(AttemptFailed(KEY, 1, "", 0.0, 0.0, 0.0))

    def ask_again(history: History) -> History:
        begin(history, "")
        return parse_history(dump_history(history))

    without, with_one = History(), History()
    end(with_one, older, "succeeded")
    end(with_one, old, "succeeded")
    for history, key in ((without, ""), (with_one, old)):
        begin(history, "")
        assert submit(history, 1) == key
        fail(history, is_last=False)
        end(history, new, "succeeded")
        assert submit(history, 2) == key, "though a newer one is there"
        fail(history, is_last=True)
        assert submit(ask_again(history), 3) == key
    with_one.apply(Retired(old, 0.0))
    assert submit(ask_again(with_one), 3) == new, "what it read is gone"


def test_partitions_at_work_never_use_more_than_the_runs_gpu_hours_together() -> None:
    spec, history = make_spec(max_gpu_hours=9.0, max_active_partitions=2, retries={"max": 5}), History()
    begin(history, "en", "de", "fr")

    def start(name: str, attempt: int) -> float:
        run = history.runs[KEY]
        assert decide_start(spec, run, name, Arrival(True), 0.0) is True
        lent = lend_gpu_hours(spec, run)
        assert lent is not None
        history.apply(Submitted(KEY, attempt, "", "ray", 0.0, partition=name, max_gpu_hours=lent))
        return lent

    def finish(name: str, outcome: Outcome) -> Any:
        event = decide_outcome(spec, history.runs[KEY], name, outcome, 0.0)
        history.apply(event)
        return event

    assert (start("en", 1), start("de", 1)) == (3.0, 3.0)
    assert decide_start(spec, history.runs[KEY], "fr", Arrival(True), 0.0) is False, "two are at work"
    finish("en", Outcome(True, gpu_hours=1.0))
    assert start("fr", 1) == 5.0, "what one leaves is the next one's"
    finish("de", Outcome(False, "spent", gpu_hours=3.0))
    assert history.runs[KEY].parts["de"].state == "retrying"
    assert decide_start(spec, history.runs[KEY], "de", Arrival(True), 1e9) is False, "all is lent"
    finish("fr", Outcome(True, gpu_hours=5.0))
    decision = decide_start(spec, history.runs[KEY], "de", Arrival(True), 1e9)
    assert isinstance(decision, PartitionEnded)
    assert "9 GPU-hours are spent" in decision.message
    history.apply(decision)
    assert describe_failures(history.runs[KEY]).startswith("1 of 3 partitions failed; de: the run's 9 GPU-hours")


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ((), ""),
        (("en",), "en"),
        (("en", "large_1-x"), "en.large_1-x"),
    ],
)
def test_plain_values_name_their_partition(values: tuple[str, ...], name: str) -> None:
    assert make_partition_name(values) == name


VALUES = st.text("ab.-/é ", max_size=3)


@given(st.lists(st.tuples(VALUES, VALUES), unique=True, min_size=2, max_size=30))
def test_no_two_partitions_have_one_name(values: list[tuple[str, str]]) -> None:
    names = {make_partition_name(pair) for pair in values}
    assert len(names) == len(values)
    assert all(name and not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789.-") for name in names)
