"""Who did what when: a lane for each worker of one run, and of a thousand workers those that say most. Pure.

A worker is busy while a batch of it is open. Seconds are since the run began.
"""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.report.figures import RunRecord

MAX_LANES = 40
# Parts of a lane closer than this share of the run can't be told apart.
RESOLUTION = 1 / 400

Interval = tuple[float, float]


def make_lanes(record: RunRecord, table: pa.Table) -> dict[str, Any]:
    """`lanes`: of at most MAX_LANES workers, those with the most time not busy, in the order that they began. A lane has
    `start` (start-up), `busy` intervals, `ended_s` and `end`."""
    spans = list_spans(table, record)
    elapsed = float(record["elapsed_s"])
    lanes = [make_lane(life, spans.get(life["worker"], []), elapsed) for life in record.get("workers", [])]
    chosen = sorted(lanes, key=lambda lane: (-lane["idle_s"] - lane["startup_s"], lane["worker"]))[:MAX_LANES]
    chosen.sort(key=lambda lane: (lane["began_s"], lane["worker"]))
    return {"num_workers": len(lanes), "elapsed_s": elapsed, "lanes": chosen}


def list_spans(table: pa.Table, record: RunRecord) -> dict[str, list[Interval]]:
    """When each worker had a batch, as far as batches know."""
    columns = ["worker", "started_at", "wall_s"]
    rows = table.select(columns).filter(pc.equal(table["epoch"], record["epoch"])).drop_null()
    spans: dict[str, list[Interval]] = {}
    workers, starts, walls = (rows[name].to_pylist() for name in columns)
    for worker, started_at, wall_s in zip(workers, starts, walls, strict=True):
        start = started_at - record["began_at"]
        spans.setdefault(worker, []).append((start, start + wall_s))
    return spans


def make_lane(life: dict[str, Any], spans: Iterable[Interval], elapsed: float) -> dict[str, Any]:
    began, ended = life["began_s"], life["ended_s"]
    end = elapsed if ended is None else ended
    ready = end if life["ready_s"] is None else life["ready_s"]
    busy = merge_intervals(((max(a, ready), min(b, end)) for a, b in spans), elapsed * RESOLUTION)
    busy_s = sum(b - a for a, b in busy)
    return {
        "worker": life["worker"],
        "node": life.get("node"),
        "began_s": began,
        "ready_s": life["ready_s"],
        "ended_s": ended,
        "end": life["end"],
        "startup_s": ready - began,
        "busy_s": busy_s,
        "idle_s": max(0.0, end - ready - busy_s),
        "busy": [(round(a, 3), round(b, 3)) for a, b in busy],
    }


def merge_intervals(intervals: Iterable[Interval], gap: float) -> list[Interval]:
    """Their union; gaps up to `gap` are closed."""
    merged: list[Interval] = []
    for start, end in sorted(pair for pair in intervals if pair[1] > pair[0]):
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged
