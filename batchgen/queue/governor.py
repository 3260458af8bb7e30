"""Holds a run to its deadline and its GPU-hours: how many workers it needs, whether one more can be paid, when to stop.
Pure: measured facts in, a verdict out.

A stop is clean: what is in flight gets `cluster.drain_s`, all finished rows are journaled, committed shards are a valid
dataset, and the same command goes on later. So the run stops that much earlier than a limit, not at it. Rates are those
measured in this run, rows per second of one worker that is up; before any row was finished nothing is foretold.
"""

import math
import re
from dataclasses import dataclass
from datetime import MAXYEAR, UTC, datetime, timedelta

from batchgen.spec import ClusterSpec

# A worker needs this long after its drain to journal and to be ended.
MARGIN_S = 5.0
# Rates waver: to meet a deadline, workers are asked for as if this part of the time were left.
TIME_SHARE = 0.8
DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


@dataclass(frozen=True, slots=True)
class RunFacts:
    """`rows_per_s` of one ready worker and `startup_s` are None while unknown. `gpu_s` is used so far, start-up included.
    `now`: Unix seconds."""

    now: float
    num_rows_left: int
    num_rows: int
    num_ready: int
    num_starting: int
    gpu_s: float
    rows_per_s: float | None = None
    startup_s: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """`stop`: end the run now, and why. `min_workers`: so many are needed; `max_workers`: so many can be paid for.
    `warning`: the limit will not hold all rows."""

    min_workers: int
    max_workers: int
    stop: str | None = None
    warning: str | None = None


def govern(facts: RunFacts, cluster: ClusterSpec) -> Verdict:
    """What the limits of the spec ask for now."""
    stop = _find_stop(facts, cluster)
    needed = max(cluster.workers.min, _count_needed(facts, cluster))
    paid = _count_paid(facts, cluster)
    return Verdict(min(needed, paid), paid, stop, None if stop else _find_warning(facts, cluster, paid))


def _time_left_s(facts: RunFacts, cluster: ClusterSpec) -> float | None:
    """Until work must end for the drain to end at the deadline."""
    if cluster.deadline is None:
        return None
    return cluster.deadline.timestamp() - facts.now - cluster.drain_s - MARGIN_S


def _gpu_s_left(facts: RunFacts, cluster: ClusterSpec) -> float | None:
    """What may be used before the drain of all that are up must begin."""
    if cluster.max_gpu_hours is None:
        return None
    num_up = facts.num_ready + facts.num_starting
    return cluster.max_gpu_hours * 3600 - facts.gpu_s - num_up * cluster.gpus_per_worker * (cluster.drain_s + MARGIN_S)


def _find_stop(facts: RunFacts, cluster: ClusterSpec) -> str | None:
    time_left_s, gpu_s_left = _time_left_s(facts, cluster), _gpu_s_left(facts, cluster)
    if time_left_s is not None and time_left_s <= 0:
        assert cluster.deadline is not None
        return f"the deadline {cluster.deadline.isoformat()} is reached; {describe_missing(facts)}"
    if gpu_s_left is not None and gpu_s_left <= 0:
        return f"{facts.gpu_s / 3600:.2f} of {cluster.max_gpu_hours:g} GPU-hours are used; {describe_missing(facts)}"
    return None


def describe_missing(facts: RunFacts) -> str:
    """What a stopped run leaves undone, and what it would take."""
    text = f"{facts.num_rows_left:,} of {facts.num_rows:,} rows are missing"
    if facts.rows_per_s:
        text += f", about {format_hours(facts.num_rows_left / facts.rows_per_s)} of one worker"
    return f"{text}; start it again to go on"


def _count_needed(facts: RunFacts, cluster: ClusterSpec) -> int:
    """Workers that end what is left before the deadline, those to be started up included."""
    time_left_s = _time_left_s(facts, cluster)
    if time_left_s is None or facts.rows_per_s is None:
        return 0
    working_s = (time_left_s - (facts.startup_s or 0.0)) * TIME_SHARE
    if working_s <= 0:
        return 0  # a new one would come too late
    return min(cluster.workers.max, math.ceil(facts.num_rows_left / facts.rows_per_s / working_s))


def _count_paid(facts: RunFacts, cluster: ClusterSpec) -> int:
    """Workers that the GPU-hours pay for: one more costs its start-up, and then only shares the work."""
    num_up, left = facts.num_ready + facts.num_starting, _gpu_s_left(facts, cluster)
    if left is None or facts.rows_per_s is None or facts.startup_s is None or facts.startup_s <= 0:
        return cluster.workers.max
    work_s = cluster.gpus_per_worker * facts.num_rows_left / facts.rows_per_s
    extra = max(0.0, left - work_s) / (cluster.gpus_per_worker * facts.startup_s)
    return max(1, min(cluster.workers.max, num_up + int(min(extra, cluster.workers.max))))


def _find_warning(facts: RunFacts, cluster: ClusterSpec, paid: int) -> str | None:
    if facts.rows_per_s is None or facts.num_rows_left == 0:
        return None
    time_left_s, gpu_s_left = _time_left_s(facts, cluster), _gpu_s_left(facts, cluster)
    rows = facts.num_rows_left
    if time_left_s is not None:
        later_s = max(0.0, time_left_s - (facts.startup_s or 0.0))
        num_more = max(0, paid - facts.num_ready)
        rows = min(rows, int(facts.rows_per_s * (facts.num_ready * time_left_s + num_more * later_s)))
    if gpu_s_left is not None:
        rows = min(rows, int(facts.rows_per_s * gpu_s_left / cluster.gpus_per_worker))
    if rows >= facts.num_rows_left:
        return None
    missing = facts.num_rows_left - rows
    return (
        f"at the rate measured so far, about {missing:,} of {facts.num_rows:,} rows will be missing at the run's limits"
    )


def format_hours(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def parse_deadline(text: str, now: datetime) -> datetime:
    """A time with its UTC offset ('2026-11-28T06:00Z'), or a time from now ('8h', '1d12h', '90m'). Raises ValueError."""
    match = DURATION.fullmatch(text.strip())
    if match is not None and any(match.groups()):
        days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
        try:
            return now + timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        except OverflowError:
            raise ValueError(f"that is beyond the year {MAXYEAR}; leave it out for a run without one") from None
    try:
        deadline = datetime.fromisoformat(text.strip())
    except ValueError:
        deadline = None
    if deadline is None or deadline.tzinfo is None:
        raise ValueError("write a time with its UTC offset, such as 2026-11-28T06:00Z, or a time from now, such as 8h")
    return deadline.astimezone(UTC)
