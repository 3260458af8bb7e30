"""What a run tells Prometheus: the metrics' names, kinds and labels, and their values. Pure: who exports them is another's
affair (`ray_metrics`).

Names are vLLM's where vLLM has one, with our prefix (`vllm:num_requests_running` -> `batchgen_num_requests_running`), so
that boards and habits carry over; Ray puts `ray_` before all of them. `docs/metrics.md` has the table. Counters count every
request. Histograms take at most `MAX_OBSERVED` requests a worker and look, drawn evenly from all that ended since: their
quantiles are right, their counts are no number of requests.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.queue.events import Heartbeat
from batchgen.queue.pulse import STATES, Snapshot

Kind = Literal["counter", "gauge", "histogram"]
MAX_OBSERVED = 40
# Record batches, 256 rows at most each: they are all columns of their rows, and stay in memory until they are counted.
MAX_UNCOUNTED = 64
COUNTED = ("num_attempts", "error_type", "finish_reason", "prompt_tokens", "cached_tokens", "reused_from")
OBSERVED = ["latency_s", "ttft_s", "queued_s", "completion_tokens"]
# Seconds; a request may take from milliseconds to hours.
LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """`labels`: beside `run`, which every metric has. `buckets`: of a histogram."""

    kind: Kind
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Point:
    """Add to a counter, set a gauge, observe in a histogram. A label `run` here is another run than that which tells it."""

    name: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


METRICS: dict[str, Metric] = {
    # of each worker
    "batchgen_num_requests_running": Metric("gauge", "Requests sent to the engine and not answered.", ("worker",)),
    "batchgen_num_requests_waiting": Metric("gauge", "Requests of leased shards that were not sent yet.", ("worker",)),
    "batchgen_max_requests_running": Metric("gauge", "Most requests in flight that the worker allows.", ("worker",)),
    "batchgen_prompt_tokens_total": Metric("counter", "Prompt tokens of answered requests.", ("worker",)),
    "batchgen_generation_tokens_total": Metric("counter", "Completion tokens, as they are made.", ("worker",)),
    "batchgen_prefix_cache_hit_rate": Metric("gauge", "Prompt tokens not computed again, of all since.", ("worker",)),
    "batchgen_request_success_total": Metric("counter", "Answered requests.", ("worker", "finished_reason")),
    "batchgen_request_failure_total": Metric(
        "counter", "Requests that ended as an error row.", ("worker", "error_type")
    ),
    "batchgen_request_retries_total": Metric("counter", "Requests sent again.", ("worker",)),
    "batchgen_e2e_request_latency_seconds": Metric(
        "histogram", "From sending a request to its end.", ("worker",), LATENCY_BUCKETS
    ),
    "batchgen_time_to_first_token_seconds": Metric(
        "histogram", "From sending a request to its first token.", ("worker",), LATENCY_BUCKETS
    ),
    "batchgen_request_queue_time_seconds": Metric(
        "histogram", "From ready to be sent until the engine began.", ("worker",), LATENCY_BUCKETS
    ),
    "batchgen_request_time_per_output_token_seconds": Metric(
        "histogram", "After the first token, per token.", ("worker",), TOKEN_BUCKETS
    ),
    # of the run
    "batchgen_rows": Metric("gauge", "Input rows of the run."),
    "batchgen_rows_done": Metric("gauge", "Input rows that are done, those of earlier runs included."),
    "batchgen_rows_error": Metric("gauge", "Output rows of this run that are errors."),
    "batchgen_shards": Metric("gauge", "Shards of the run."),
    "batchgen_shards_done": Metric("gauge", "Shards that the run has committed."),
    "batchgen_workers": Metric("gauge", "Workers by state.", ("state",)),
    "batchgen_workers_lost": Metric("gauge", "Workers that this run has lost."),
    "batchgen_gpu_hours": Metric("gauge", "GPU-hours of this run, start-up included."),
    "batchgen_eta_seconds": Metric("gauge", "Time left: low, middle, high (nine in ten).", ("bound",)),
    "batchgen_looked_at_seconds": Metric("gauge", "When the driver last looked, Unix seconds."),
    # A counter, for Ray keeps these when their process has gone: a driver that never told its end has died.
    "batchgen_runs_ended_total": Metric("counter", "1 once the run has ended, or one after it has begun.", ("state",)),
}
FOLLOWED = "followed"


def measure_run(seen: Snapshot, now: float) -> list[Point]:
    """What the driver knows. Unknown is left out."""
    eta = {"low": seen.eta_low_s, "middle": seen.eta_s, "high": seen.eta_high_s}
    points = [
        Point("batchgen_rows", seen.num_rows),
        Point("batchgen_rows_done", seen.num_rows_done),
        Point("batchgen_rows_error", seen.num_rows_error),
        Point("batchgen_shards", seen.num_shards),
        Point("batchgen_shards_done", seen.num_shards_done),
        Point("batchgen_workers_lost", seen.num_lost),
        Point("batchgen_looked_at_seconds", now),
        *(Point("batchgen_workers", seen.worker_states.get(state, 0), (("state", state),)) for state in STATES),
        *(Point("batchgen_eta_seconds", at, (("bound", name),)) for name, at in eta.items() if at is not None),
    ]
    return points if seen.gpu_hours is None else [*points, Point("batchgen_gpu_hours", seen.gpu_hours)]


def measure_begin(run_before: str | None) -> list[Point]:
    """What a driver says first: the run before its own is over, whatever became of it."""
    if run_before is None:
        return []
    return [Point("batchgen_runs_ended_total", 1, (("run", run_before), ("state", FOLLOWED)))]


def measure_end(state: str) -> list[Point]:
    """What a driver says last: how the run ended."""
    return [Point("batchgen_runs_ended_total", 1, (("state", state),))]


@dataclass(slots=True)
class Meter:
    """Counts what ends in one worker between two looks. `is_wanted`: somebody looks; else nothing is kept. Rows are kept as
    they come and counted together, column by column: one by one they took 1 us each, 2 % of a run with fast rows."""

    is_wanted: bool = False
    _uncounted: list[pa.RecordBatch] = field(default_factory=list)
    _reasons: Counter[str] = field(default_factory=Counter)
    _errors: Counter[str] = field(default_factory=Counter)
    _sums: Counter[str] = field(default_factory=Counter)
    _drawn: list[tuple[Point, ...]] = field(default_factory=list)
    _num_seen: int = 0
    _stride: int = 1
    _total_tokens: int = 0
    _num_cached: int = 0
    _num_looked_up: int = 0

    def note(self, rows: pa.RecordBatch) -> None:
        """Rows that ended (`write.make_result_schema`), by the hundred."""
        if not self.is_wanted:
            return
        self._uncounted.append(rows)
        if len(self._uncounted) >= MAX_UNCOUNTED:
            self._count()

    def _count(self) -> None:
        rows = pa.Table.from_batches(self._uncounted)
        rows = rows.select([name for name in (*COUNTED, *OBSERVED) if name in rows.column_names])
        self._uncounted = []
        if "reused_from" in rows.column_names and rows["reused_from"].null_count < len(rows):
            rows = rows.filter(rows["reused_from"].is_null())  # copies of other requests' answers: nothing was sent
        sent = _count_values(rows["num_attempts"])
        self._sums["batchgen_request_retries_total"] += sum((n - 1) * count for n, count in sent.items() if n)
        if rows["error_type"].null_count < len(rows):
            self._errors.update(_count_values(rows["error_type"]))
            rows = rows.filter(rows["error_type"].is_null())
        self._reasons.update(_count_values(rows["finish_reason"]))
        prompt, cached = rows["prompt_tokens"], rows["cached_tokens"]
        self._sums["batchgen_prompt_tokens_total"] += _sum(prompt)
        self._num_cached += _sum(cached)
        self._num_looked_up += _sum(prompt.filter(cached.is_valid()))
        self._draw(rows)

    def _draw(self, rows: pa.Table) -> None:
        """Every so manieth of all since the last look, from the first on."""
        while self._num_seen + len(rows) > MAX_OBSERVED * self._stride:
            self._drawn, self._stride = self._drawn[::2], 2 * self._stride
        places = range(-self._num_seen % self._stride, len(rows), self._stride)
        self._drawn += map(_observe, rows.select(OBSERVED).take(pa.array(places, pa.int64())).to_pylist())
        self._num_seen += len(rows)

    def take(self, beat: Heartbeat, window: int) -> list[Point]:
        """What ended since the last call, and what the worker says of itself now."""
        if self._uncounted:
            self._count()
        made, self._total_tokens = max(0, beat.total_tokens - self._total_tokens), beat.total_tokens
        points = [
            Point("batchgen_num_requests_running", beat.num_inflight),
            Point("batchgen_num_requests_waiting", sum(shard.num_unsent for shard in beat.shards)),
            Point("batchgen_max_requests_running", window),
            Point("batchgen_generation_tokens_total", made),
            *(Point(name, count) for name, count in self._sums.items()),
            *(_count("batchgen_request_success_total", "finished_reason", self._reasons)),
            *(_count("batchgen_request_failure_total", "error_type", self._errors)),
            *(point for points in self._drawn for point in points),
        ]
        if self._num_looked_up:
            points.append(Point("batchgen_prefix_cache_hit_rate", self._num_cached / self._num_looked_up))
        self._reasons, self._errors, self._sums = Counter(), Counter(), Counter()
        self._num_cached = self._num_looked_up = 0
        self._drawn, self._num_seen, self._stride = [], 0, 1
        return points


def _count(name: str, label: str, counts: Counter[str]) -> Iterable[Point]:
    return (Point(name, count, ((label, value),)) for value, count in counts.items())


def _sum(column: pa.ChunkedArray) -> int:
    """0 where nothing is known."""
    return int(pc.sum(column).as_py() or 0)


def _count_values(column: pa.ChunkedArray) -> dict[Any, int]:
    return {pair["values"]: pair["counts"] for pair in column.drop_null().value_counts().to_pylist()}


def _observe(row: Mapping[str, Any]) -> tuple[Point, ...]:
    values = {
        "batchgen_e2e_request_latency_seconds": row["latency_s"],
        "batchgen_time_to_first_token_seconds": row["ttft_s"],
        "batchgen_request_queue_time_seconds": row["queued_s"],
    }
    num_after = (row["completion_tokens"] or 0) - 1
    if row["latency_s"] is not None and row["ttft_s"] is not None and num_after > 0:
        values["batchgen_request_time_per_output_token_seconds"] = (row["latency_s"] - row["ttft_s"]) / num_after
    return tuple(Point(name, value) for name, value in values.items() if value is not None)
