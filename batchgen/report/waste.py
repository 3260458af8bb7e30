"""Where a run's worker time went: each worker-second is useful, or lost to one of four reasons; they add up to all. Pure.

- start-up: from where a worker's GPUs are counted until it is up (never up: all of it);
- starvation: while shards waited, the share of the in-flight window that was empty. An engine with fewer slots than its
  window loses less than that: this is the most it can be;
- tail: the same since no shard waited any more;
- retries: of what is left, the share of generated tokens that are in no row of the output.

Retries are unknown while a journal may hold what seems lost: until the run, or one that goes on with it, has finished.
"""

from typing import Any

from batchgen.report.figures import RunRecord, divide

LOSSES = ("startup", "starvation", "tail", "retries")


def make_waste(record: RunRecord, kept_tokens: int | None, *, is_settled: bool) -> dict[str, float | None]:
    """Worker-seconds by reason, `useful` and `total`. `kept_tokens`: completion tokens of the run's batches that are in
    output rows. `is_settled`: every row of it that a journal had is in the output."""
    total = float(record["worker_s"])
    # Each at most what is left: a record of a run's first second is made of few looks, which see more than there was.
    startup = min(total, float(record["startup_s"]))
    tail = min(total - startup, _find_empty(record["tail"]))
    starvation = min(total - startup - tail, _find_empty(_subtract(record["total"], record["tail"])))
    working = total - startup - tail - starvation
    lost = find_lost_share(record, kept_tokens) if is_settled else None
    retries = None if lost is None else working * lost
    return {
        "startup": startup,
        "starvation": starvation,
        "tail": tail,
        "retries": retries,
        "useful": working - (retries or 0.0),
        "total": total,
    }


def find_lost_share(record: RunRecord, kept_tokens: int | None) -> float | None:
    """Of the tokens that engines made. Heartbeats lag a little: what was kept beyond them is no loss."""
    made = record.get("num_tokens")
    return max(0.0, 1 - kept_tokens / made) if made and kept_tokens is not None else None


def _subtract(whole: dict[str, Any], part: dict[str, Any]) -> dict[str, float]:
    return {name: max(0.0, whole[name] - part[name]) for name in ("ready_s", "inflight_s", "window_s")}


def _find_empty(span: dict[str, Any]) -> float:
    """Worker-seconds of the window's empty part."""
    full = divide(span["inflight_s"], span["window_s"])
    return 0.0 if full is None else float(span["ready_s"]) * max(0.0, 1 - full)
