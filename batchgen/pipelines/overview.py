"""What people are told of pipelines (`batchgen pipelines list | show`), and what a date on the command line means."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any

from batchgen.errors import SpecError
from batchgen.pipelines.calendar import make_key, parse_date, parse_key
from batchgen.pipelines.history import History, Run
from batchgen.pipelines.spec import PipelineSpec

MAX_BACKFILL = 10_000
# Partitions that failed.
MAX_NAMED = 5


def make_row(spec: PipelineSpec, history: History, now: datetime) -> dict[str, Any]:
    """One pipeline in a line."""
    next_date = spec.schedule.calendar.find_next(now)
    last = max(history.runs.values(), key=lambda run: run.began_at, default=None)
    return {
        "pipeline": spec.name,
        "schedule": f"{spec.schedule.cron} {spec.schedule.timezone}",
        "is_paused": history.is_paused,
        "next": None if next_date is None else make_key(next_date),
        "active": [run.key for run in history.list_active()],
        "asked": list(history.asked),
        "succeeded": history.count("succeeded"),
        "failed": history.count("failed"),
        "last": None if last is None else {"run": last.key, "state": last.state, "message": last.last_message},
    }


def make_run_value(run: Run) -> dict[str, Any]:
    """A run as JSON. What its partitions share stands once, where there are none all of it."""
    whole: dict[str, Any] = {"state": run.state, "attempt": run.attempt, "gpu_hours": run.gpu_hours}
    whole["num_failed"] = sum(part.num_failed for part in run.parts.values())
    whole["length_priors"] = list_length_priors(run)
    whole["partitions"] = {name: asdict(part) for name, part in run.parts.items() if name}
    return {**{name: value for name, value in asdict(run).items() if name not in ("parts", "end")}, **whole}


def list_length_priors(run: Run) -> list[str]:
    """The runs whose measured lengths its jobs expect without saying so: one, unless partitions have different ones."""
    return sorted({part.length_prior for part in run.parts.values() if part.length_prior})


def describe_row(row: dict[str, Any]) -> str:
    state = "paused" if row["is_paused"] else f"next {row['next'] or 'never'}"
    last = f"; last {row['last']['run']} {row['last']['state']}" if row["last"] else ""
    active = f"; at work: {', '.join(row['active'])}" if row["active"] else ""
    asked = f"; asked for: {len(row['asked'])}" if row["asked"] else ""
    counts = f"{row['succeeded']} succeeded, {row['failed']} failed"
    return f"{row['pipeline']} ({row['schedule']}): {state}; {counts}{last}{active}{asked}"


def describe_run(run: Run) -> str:
    began = datetime.fromtimestamp(run.began_at, UTC).strftime("%Y-%m-%d %H:%M:%S")
    took = "" if run.ended_at is None else f", {run.ended_at - run.began_at:.0f} s"
    hours = f", {run.gpu_hours:.2f} GPU-hours" if run.gpu_hours else ""
    gone = ", outputs deleted" if run.is_deleted else ", outputs being deleted" if run.is_retired else ""
    priors = list_length_priors(run)
    lengths = f", lengths expected as in {' and '.join(priors)}" if priors else ""
    message = f": {run.last_message}" if run.last_message else ""
    facts = f"{took}{hours}{lengths}{_describe_partitions(run)}{gone}"
    return f"{run.key}  {run.state:9}  began {began} UTC, {run.attempt} attempts{facts}{message}"


def _describe_partitions(run: Run) -> str:
    """How many are where; by name those that failed, as far as they fit."""
    if "" in run.parts:
        return ""
    states = Counter(part.state for part in run.parts.values())
    failed = run.list_parts("failed")
    names = f" ({', '.join(failed[:MAX_NAMED])}{', ...' if len(failed) > MAX_NAMED else ''})" if failed else ""
    return f", partitions: {', '.join(f'{count} {state}' for state, count in states.items())}{names}"


def choose_date(spec: PipelineSpec, text: str | None, now: datetime) -> str:
    """The key that `--date` means; without it the newest date that is due. Raises SpecError."""
    calendar = spec.schedule.calendar
    if text is None:
        latest = calendar.find_latest(now)
        if latest is None:
            raise SpecError(f"{spec.name}: no date is due yet; give --date")
        return make_key(latest)
    keys = list_dates(spec, text, text, now)
    if len(keys) > 1:
        raise SpecError(
            f"--date {text}: the schedule has {len(keys)} dates there, {keys[0]} to {keys[-1]}; give one of them"
        )
    return keys[0]


def list_dates(spec: PipelineSpec, first: str, last: str, now: datetime) -> list[str]:
    """Keys of the schedule's dates from one to another, both included. Raises SpecError where there is none."""
    try:
        start, end = parse_date(first, spec.schedule.calendar)[0], parse_date(last, spec.schedule.calendar)[1]
    except ValueError as error:
        raise SpecError(f"{spec.name}: {error}") from error
    keys = list(_iterate(spec, start, end))
    if not keys:
        raise SpecError(
            f"{spec.name}: the schedule ({spec.schedule.cron}) has no date from {first} to {last}; ask for others"
        )
    if len(keys) > MAX_BACKFILL:
        raise SpecError(f"{spec.name}: more than {MAX_BACKFILL:,} dates from {first} to {last}; ask for fewer at once")
    if parse_key(keys[-1]) > now:
        raise SpecError(f"{spec.name}: {keys[-1]} is not due yet; ask for dates that are over")
    return keys


def _iterate(spec: PipelineSpec, start: datetime, end: datetime) -> Iterator[str]:
    earlier = datetime.fromtimestamp(start.timestamp() - 60, UTC)
    for number, date in enumerate(takewhile(lambda date: date < end, spec.schedule.calendar.iterate_after(earlier))):
        if number > MAX_BACKFILL:
            return
        if date >= start:
            yield make_key(date)
