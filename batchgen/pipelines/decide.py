"""What to do next for a pipeline. Pure: its spec, its history, the time and what was found out; the next event, or None.

Each function answers one question. All are safe to ask with an old history, because an event is only written where the log
hasn't grown since.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from batchgen.pipelines.calendar import make_key, parse_key
from batchgen.pipelines.events import AttemptFailed, Began, Ended, FirstSeen, PartitionEnded
from batchgen.pipelines.history import History, Run
from batchgen.pipelines.partitions import list_partitions
from batchgen.pipelines.spec import PipelineSpec


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended. `outputs`: what the pointer says of each of its jobs."""

    is_ok: bool
    message: str = ""
    can_retry: bool = True
    gpu_hours: float = 0.0
    outputs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Arrival:
    """Is the input of a partition there? `missing`: what is not, in words."""

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
    return _find_due(spec, history, now) or _find_asked(spec, history, now)


def _find_due(spec: PipelineSpec, history: History, now: float) -> Began | None:
    schedule, instant = spec.schedule, datetime.fromtimestamp(now, UTC)
    latest = min(instant, schedule.end.astimezone(UTC)) if schedule.end is not None else instant
    cursor = parse_key(history.cursor)
    first = next(_iterate_due(spec, history, cursor, latest), None)
    if first is None or schedule.catchup:
        return None if first is None else make_began(spec, make_key(first), "schedule", now)
    newest = schedule.calendar.find_latest(latest)
    if newest is None or newest <= first:
        return make_began(spec, make_key(first), "schedule", now)
    if history.get_state(make_key(newest)) is not None:  # it was asked for by hand meanwhile
        return None
    return make_began(spec, make_key(newest), "schedule", now, skipped_from=make_key(first))


def make_began(
    spec: PipelineSpec, key: str, cause: Literal["schedule", "asked"], now: float, skipped_from: str | None = None
) -> Began:
    return Began(key, cause, now, skipped_from, tuple(list_partitions(spec)))


def _iterate_due(spec: PipelineSpec, history: History, cursor: datetime, latest: datetime) -> Iterator[datetime]:
    for date in spec.schedule.calendar.iterate_after(cursor):
        if date > latest:
            return
        if history.get_state(make_key(date)) is None:
            yield date


def _find_asked(spec: PipelineSpec, history: History, now: float) -> Began | None:
    key = next((key for key in history.asked if is_open(history, key)), None)
    return None if key is None else make_began(spec, key, "asked", now)


def is_open(history: History, key: str) -> bool:
    """May the date be begun (again)? Not where it succeeded, is at work, or its outputs go."""
    run = history.runs.get(key)
    return history.get_state(key) in (None, "failed") and not (
        run is not None and run.is_retired and not run.is_deleted
    )


def decide_start(spec: PipelineSpec, run: Run, name: str, arrival: Arrival, now: float) -> bool | PartitionEnded:
    """Submit the next attempt at a partition now? Its end where the input did not come in time, or the run's time or its
    GPU-hours are over."""
    part = run.parts[name]
    if is_late(spec, run, now):
        return _end_late(spec, run, name, now)
    if part.state == "retrying" and now < part.retry_at:
        return False
    if not arrival.is_there:
        if now - run.began_at < spec.wait_deadline:
            return False
        message = f"the input has not arrived within {spec.wait_deadline / 3600:g} h: {arrival.missing}"
        return PartitionEnded(run.key, name, "failed", message, 0.0, now)
    lent = lend_gpu_hours(spec, run)
    if not has_room(spec, run) or lent is None or lent > 0:
        return has_room(spec, run)
    if run.list_parts("running"):
        return False  # what was lent to those may be left over
    message = f"the run's {spec.max_gpu_hours:g} GPU-hours are spent; last: {part.message or 'no attempt'}"
    return PartitionEnded(run.key, name, "failed", message, 0.0, now)


def decide_gone(run: Run, name: str, now: float) -> PartitionEnded:
    """The end of a partition that was begun, is not at work, and is not in the file any more."""
    message = f"the pipeline's file has no partition '{name}' any more; ask for the date again without it"
    return PartitionEnded(run.key, name, "failed", message, 0.0, now)


def has_room(spec: PipelineSpec, run: Run) -> bool:
    return len(run.list_parts("running")) < spec.max_active_partitions


def lend_gpu_hours(spec: PipelineSpec, run: Run) -> float | None:
    """What the next attempt may use of the run's GPU-hours: of what is neither used nor lent, an equal share for each
    partition that waits. So those at work together never use more than there is. None without a limit."""
    if spec.max_gpu_hours is None:
        return None
    lent = sum(run.parts[name].max_gpu_hours or 0.0 for name in run.list_parts("running"))
    left = len(run.list_parts("waiting")) + len(run.list_parts("retrying"))
    return (spec.max_gpu_hours - run.gpu_hours - lent) / max(left, 1)


def decide_outcome(
    spec: PipelineSpec, run: Run, name: str, outcome: Outcome, now: float
) -> AttemptFailed | PartitionEnded:
    """What follows from the end of an attempt."""
    part, hours = run.parts[name], outcome.gpu_hours
    if outcome.is_ok:
        return PartitionEnded(run.key, name, "succeeded", outcome.message, hours, now)
    if is_late(spec, run, now):
        return _end_late(spec, run, name, now, outcome)
    is_spent = spec.max_gpu_hours is not None and run.gpu_hours + hours >= spec.max_gpu_hours
    if not outcome.can_retry or is_spent or part.num_failed >= spec.retries.max:
        tries = f" (attempt {part.attempt}, the last)" if outcome.can_retry and part.num_failed else ""
        budget = f"; the run's {spec.max_gpu_hours:g} GPU-hours are spent" if is_spent else ""
        return PartitionEnded(run.key, name, "failed", f"{outcome.message}{tries}{budget}", hours, now)
    return AttemptFailed(run.key, part.attempt, outcome.message, now + spec.retries.delay, hours, now, name)


def is_late(spec: PipelineSpec, run: Run, now: float) -> bool:
    """Is the time of an active run over?"""
    return spec.deadline is not None and now >= run.began_at + spec.deadline


def _end_late(spec: PipelineSpec, run: Run, name: str, now: float, outcome: Outcome | None = None) -> PartitionEnded:
    hours = (spec.deadline or 0.0) / 3600
    last = (outcome.message if outcome else run.parts[name].message) or "no attempt has ended"
    message = f"not done within its deadline of {hours:g} h; last: {last}"
    return PartitionEnded(run.key, name, "failed", message, outcome.gpu_hours if outcome else 0.0, now)


def describe_failures(run: Run) -> str:
    """Why a run whose partitions have all ended did not succeed; '' where it did."""
    failed = run.list_parts("failed")
    if not failed:
        return ""
    first = run.parts[failed[0]]
    if not failed[0]:
        return first.message
    return f"{len(failed)} of {len(run.parts)} partitions failed; {failed[0]}: {first.message}"


def make_ended(spec: PipelineSpec, run: Run, state: Literal["succeeded", "failed"], message: str, now: float) -> Ended:
    hooks = tuple(dict.fromkeys(hook.id for hook in spec.list_hooks(state == "succeeded")))
    return Ended(run.key, state, message, now, hooks)


def find_previous(history: History, key: str) -> Run | None:
    """The newest successful run of an earlier date whose outputs stand."""
    earlier = [run for run in history.runs.values() if run.end == "succeeded" and run.key < key and not run.is_retired]
    return max(earlier, key=lambda run: run.key, default=None)


def choose_previous(history: History, run: Run, name: str) -> Run | None:
    """Whose outputs an attempt at a partition may read. As long as those stand, the run that its first attempt read, or
    none: whatever succeeded since, all attempts render the same jobs."""
    part = run.parts[name]
    known = history.runs.get(part.previous)
    if part.order and (not part.previous or (known is not None and not known.is_retired)):
        return known
    return find_previous(history, run.key)


def choose_retired(spec: PipelineSpec, history: History, protected: Iterable[str]) -> str | None:
    """The next run whose outputs are to go: older than those that are kept. Never an active one, never one in `protected`:
    what is published, and what an active run reads."""
    if spec.retention is None:
        return None
    succeeded = sorted(key for key, run in history.runs.items() if run.end == "succeeded")
    if len(succeeded) <= spec.retention.keep:
        return None
    oldest_kept, spared = succeeded[-spec.retention.keep], set(protected)
    candidates = [
        key
        for key, run in history.runs.items()
        if key < oldest_kept and not run.is_active and not run.is_retired and key not in spared
    ]
    return min(candidates, default=None)
