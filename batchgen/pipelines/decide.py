"""What to do next for a pipeline. Pure: its spec, its history, the time and what was found out; the next event, or None.

Each function answers one question. All are safe to ask with an old history, because an event is only written where the log
hasn't grown since.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from batchgen.pipelines.calendar import make_key, parse_key
from batchgen.pipelines.events import AttemptFailed, Began, Ended, FirstSeen, History, Run
from batchgen.pipelines.spec import PipelineSpec


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended."""

    is_ok: bool
    message: str = ""
    can_retry: bool = True
    gpu_hours: float = 0.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """Is the input of a run there? `missing`: what is not, in words."""

    is_there: bool
    missing: str = ""


def decide_first(spec: PipelineSpec, history: History, now: float) -> FirstSeen | None:
    """From which date on the schedule holds."""
    if history.cursor:
        return None
    start = spec.schedule.start
    instant = datetime.fromtimestamp(now, UTC) if start is None else start
    # A start counts as a date of its own where it is one. A key is a whole minute, and the cursor lies before it.
    earlier = instant.timestamp() - 60 if start is not None else now - 60
    return FirstSeen(make_key(datetime.fromtimestamp(max(earlier, 0), UTC)), now)


def decide_begin(spec: PipelineSpec, history: History, now: float) -> Began | None:
    """The next date to run: a due one of the schedule, else one that was asked for."""
    if history.is_paused or not history.cursor or len(history.list_active()) >= spec.max_active_runs:
        return None
    return _find_due(spec, history, now) or _find_asked(history, now)


def _find_due(spec: PipelineSpec, history: History, now: float) -> Began | None:
    schedule, instant = spec.schedule, datetime.fromtimestamp(now, UTC)
    latest = min(instant, schedule.end.astimezone(UTC)) if schedule.end is not None else instant
    cursor = parse_key(history.cursor)
    first = next(_iterate_due(spec, history, cursor, latest), None)
    if first is None or schedule.catchup:
        return None if first is None else Began(make_key(first), "schedule", now)
    newest = schedule.calendar.find_latest(latest)
    if newest is None or newest <= first:
        return Began(make_key(first), "schedule", now)
    if history.get_state(make_key(newest)) is not None:  # it was asked for by hand meanwhile
        return None
    return Began(make_key(newest), "schedule", now, skipped_from=make_key(first))


def _iterate_due(spec: PipelineSpec, history: History, cursor: datetime, latest: datetime) -> Iterator[datetime]:
    for date in spec.schedule.calendar.iterate_after(cursor):
        if date > latest:
            return
        if history.get_state(make_key(date)) is None:
            yield date


def _find_asked(history: History, now: float) -> Began | None:
    key = next((key for key in history.asked if is_open(history, key)), None)
    return None if key is None else Began(key, "asked", now)


def is_open(history: History, key: str) -> bool:
    """May the date be begun (again)? Not where it succeeded, is at work, or its outputs go."""
    run = history.runs.get(key)
    return history.get_state(key) in (None, "failed") and not (
        run is not None and run.is_retired and not run.is_deleted
    )


def decide_start(spec: PipelineSpec, run: Run, arrival: Arrival, now: float) -> bool | Ended:
    """Submit the next attempt now? An end where the input did not come in time, or the run's time is over."""
    if is_late(spec, run, now):
        return _end_late(spec, run, now)
    if run.state == "retrying":
        return now >= run.retry_at
    if arrival.is_there:
        return True
    waited_s = now - run.began_at
    if waited_s >= spec.wait_deadline:
        message = f"the input has not arrived within {spec.wait_deadline / 3600:g} h: {arrival.missing}"
        return Ended(run.key, "failed", message, 0.0, now)
    return False


def decide_outcome(spec: PipelineSpec, run: Run, outcome: Outcome, now: float) -> AttemptFailed | Ended:
    """What follows from the end of an attempt."""
    if outcome.is_ok:
        return Ended(run.key, "succeeded", outcome.message, outcome.gpu_hours, now)
    if is_late(spec, run, now):
        return _end_late(spec, run, now, outcome)
    spent = run.gpu_hours + outcome.gpu_hours
    is_spent = spec.max_gpu_hours is not None and spent >= spec.max_gpu_hours
    if not outcome.can_retry or is_spent or run.num_failed >= spec.retries.max:
        tries = f" (attempt {run.attempt}, the last)" if outcome.can_retry and run.num_failed else ""
        budget = f"; its {spec.max_gpu_hours:g} GPU-hours are spent" if is_spent else ""
        return Ended(run.key, "failed", f"{outcome.message}{tries}{budget}", outcome.gpu_hours, now)
    return AttemptFailed(run.key, run.attempt, outcome.message, now + spec.retries.delay, outcome.gpu_hours, now)


def is_late(spec: PipelineSpec, run: Run, now: float) -> bool:
    """Is the time of an active run over?"""
    return spec.deadline is not None and now >= run.began_at + spec.deadline


def _end_late(spec: PipelineSpec, run: Run, now: float, outcome: Outcome | None = None) -> Ended:
    hours = (spec.deadline or 0.0) / 3600
    last = (outcome.message if outcome else run.message) or "no attempt has ended"
    gpu_hours = outcome.gpu_hours if outcome else 0.0
    return Ended(run.key, "failed", f"not done within its deadline of {hours:g} h; last: {last}", gpu_hours, now)


def find_previous(history: History, key: str) -> Run | None:
    """The newest successful run of an earlier date whose outputs stand."""
    earlier = [
        run for run in history.runs.values() if run.state == "succeeded" and run.key < key and not run.is_retired
    ]
    return max(earlier, key=lambda run: run.key, default=None)


def choose_retired(spec: PipelineSpec, history: History, protected: Iterable[str]) -> str | None:
    """The next run whose outputs are to go: older than those that are kept. Never an active one, never one in `protected`:
    what is published, and what an active run reads."""
    if spec.retention is None:
        return None
    succeeded = sorted(key for key, run in history.runs.items() if run.state == "succeeded")
    if len(succeeded) <= spec.retention.keep:
        return None
    oldest_kept, spared = succeeded[-spec.retention.keep], set(protected)
    candidates = [
        key
        for key, run in history.runs.items()
        if key < oldest_kept and not run.is_active and not run.is_retired and key not in spared
    ]
    return min(candidates, default=None)
