"""Counters and latency quantiles of a batch, from its result table. Pure: Arrow in, values out.

Quantiles are exact over the rows the batch itself generated: rows that came from a journal or were copied keep the
batch that generated them. Unknown is None, never 0.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.batches import BatchStats
from batchgen.lengths import make_lengths
from batchgen.names import parse_batch_id
from batchgen.records import Lease, WorkerInfo

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
LATENCIES = ("queued", "ttft", "per_token", "latency")
# Their sketches' columns in batch_stats.
SKETCH_FIELDS = {name: f"{name}_sketch" for name in LATENCIES}
# Relative error of a sketch's quantiles, and the smallest latency it tells apart.
SKETCH_ERROR = 0.01
GAMMA = (1 + SKETCH_ERROR) / (1 - SKETCH_ERROR)
MIN_LATENCY_S = 1e-6
# A footer holds one message a type; a server's may be long.
MAX_EXAMPLE_CHARS = 200
ROW_FIELDS = (
    "num_rows_ok",
    "num_rows_error",
    "num_rows_retryable",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "latency",
    "sketches",
    "lengths",
    "finish_reasons",
    "error_types",
    "error_examples",
    "num_retries",
)
# Who knows better what became of a batch.
OUTCOMES = ("committed", "reused", "shared", "superseded", "lost")
LATENCY_FIELDS = tuple(f"{name}_{quantile}_s" for name in LATENCIES for quantile in QUANTILES)


def make_quantiles(name: str, values: pa.ChunkedArray | pa.Array) -> dict[str, float | None]:
    """{name_p50_s: ...} in seconds; None for all when there is no value."""
    found = pc.quantile(values.drop_null(), q=list(QUANTILES.values())).to_pylist()
    return {f"{name}_{key}_s": value for key, value in zip(QUANTILES, found, strict=True)}


def list_latencies(rows: pa.Table) -> dict[str, pa.ChunkedArray]:
    """Latencies of result rows in seconds. per_token is the time after the first token, per token after it."""
    after_first = pc.subtract(rows["latency_s"], rows["ttft_s"])
    num_after = pc.subtract(rows["completion_tokens"], 1)
    num_after = pc.if_else(pc.greater(num_after, 0), num_after, None)
    return {
        "queued": rows["queued_s"],
        "ttft": rows["ttft_s"],
        "per_token": pc.divide(after_first, pc.cast(num_after, pa.float64())),
        "latency": rows["latency_s"],
    }


def make_latency(rows: pa.Table) -> dict[str, float | None]:
    """All latency quantiles of result rows, exact."""
    made: dict[str, float | None] = {}
    for name, values in list_latencies(rows).items():
        made |= make_quantiles(name, values)
    return made


def make_sketch(values: pa.ChunkedArray) -> str:
    """Values in seconds as 'bucket:count' pairs of logarithmic buckets (the DDSketch mapping: bucket i ends at
    GAMMA ** i), so that sketches of any sets of rows add up and a quantile is right to SKETCH_ERROR of its value. Text,
    because a driver holds one for each of 200,000 batches: a dict takes fifty times as much."""
    clipped = pc.max_element_wise(values.drop_null(), MIN_LATENCY_S)
    buckets = pc.cast(pc.ceil(pc.divide(pc.ln(clipped), math.log(GAMMA))), pa.int32())
    return " ".join(f"{entry['values']}:{entry['counts']}" for entry in buckets.value_counts().to_pylist())


def make_sketches(rows: pa.Table) -> dict[str, str]:
    return {name: make_sketch(values) for name, values in list_latencies(rows).items()}


def parse_sketches(texts: Sequence[str | None]) -> pa.ListArray:
    """Sketches as lists of (bucket, count); null where nothing was counted. In Arrow: there may be 200,000 of them."""
    column = pa.array([text or None for text in texts], pa.string())
    lists = pc.split_pattern(column, " ")
    pairs = pc.split_pattern(pc.list_flatten(lists), ":")
    parts = [pc.cast(pc.list_element(pairs, place), kind) for place, kind in ((0, pa.int32()), (1, pa.int64()))]
    values = pa.StructArray.from_arrays(parts, ["bucket", "count"])
    return pa.ListArray.from_arrays(lists.offsets, values, mask=pc.is_null(column))


def merge_sketch_lists(lists: pa.ChunkedArray | pa.Array) -> Counter[int]:
    """Counts by bucket over a column of sketches."""
    pairs = pc.list_flatten(lists)
    columns = {"bucket": pc.struct_field(pairs, "bucket"), "count": pc.struct_field(pairs, "count")}
    sums = pa.table(columns).group_by("bucket").aggregate([("count", "sum")])
    return Counter(dict(zip(sums["bucket"].to_pylist(), sums["count_sum"].to_pylist(), strict=True)))


def merge_sketches(sketches: Iterable[str]) -> Counter[int]:
    """Counts by bucket over all of them."""
    return merge_sketch_lists(parse_sketches(list(sketches)))


def bucket_bounds_s(bucket: int) -> tuple[float, float]:
    """Where a bucket begins and ends, in seconds."""
    return float(GAMMA ** (bucket - 1)), float(GAMMA**bucket)


def read_quantile(counts: Mapping[int, int], q: float) -> float | None:
    """The q-quantile in seconds, within SKETCH_ERROR of the value at that rank; None when nothing was counted."""
    rank, seen = q * (sum(counts.values()) - 1), 0
    for bucket in sorted(counts):
        seen += counts[bucket]
        if seen > rank:
            return float(2 * GAMMA**bucket / (GAMMA + 1))
    return None


def count_values(column: pa.ChunkedArray) -> dict[str, int]:
    """{value: rows}, nulls left out, most frequent first."""
    counts = [(entry["values"], entry["counts"]) for entry in column.drop_null().value_counts().to_pylist()]
    return dict(sorted(counts, key=lambda pair: (-pair[1], pair[0])))


def list_error_examples(rows: pa.Table) -> dict[str, str]:
    """{error type: the message of its first row, cut}. Messages are ours and hold no text of a row (`Failure`)."""
    errors = rows.select(["error_type", "error_message"]).filter(pc.is_valid(rows["error_type"]))
    firsts = errors.group_by("error_type", use_threads=False).aggregate([("error_message", "first")])
    return {
        row["error_type"]: row["error_message_first"][:MAX_EXAMPLE_CHARS]
        for row in firsts.to_pylist()
        if row["error_message_first"]
    }


def total(column: pa.ChunkedArray) -> int | None:
    """Sum; None where every value is unknown."""
    value = pc.sum(column).as_py()
    return None if value is None else int(value)


def count_rows(rows: pa.Table) -> dict[str, int]:
    """num_rows_ok, num_rows_error and num_rows_retryable (errors that another run would try again)."""
    num_ok = pc.sum(pc.equal(rows["status"], "ok")).as_py() or 0
    return {
        "num_rows_ok": num_ok,
        "num_rows_error": rows.num_rows - num_ok,
        "num_rows_retryable": pc.sum(rows["is_retryable"]).as_py() or 0,
    }


def describe_rows(rows: pa.Table) -> dict[str, Any]:
    """The BatchStats fields that follow from result rows alone."""
    return {
        **count_rows(rows),
        "prompt_tokens": total(rows["prompt_tokens"]),
        "completion_tokens": total(rows["completion_tokens"]),
        "cached_tokens": total(rows["cached_tokens"]),
        "latency": make_latency(rows),
        "sketches": make_sketches(rows),
        "lengths": make_lengths(rows),
        "finish_reasons": count_values(rows["finish_reason"]),
        "error_types": count_values(rows["error_type"]),
        "error_examples": list_error_examples(rows),
        "num_retries": total(pc.max_element_wise(pc.subtract(rows["num_attempts"], 1), 0)) or 0,
    }


def _describe_tellable(rows: pa.Table, *, may_quote: bool) -> dict[str, Any]:
    """`describe_rows` without the messages of an engine that may quote the prompt."""
    made = describe_rows(rows)
    return made | {"error_examples": {}} if may_quote else made


def make_batch_stats(
    lease: Lease,
    info: WorkerInfo,
    rows: pa.Table,
    *,
    started_at: float,
    wall_s: float,
    mean_inflight: float | None,
    num_from_journal: int,
    num_copied: int,
    read_s: float,
    write_s: float | None,
    may_quote: bool = True,
) -> BatchStats:
    """Stats of the batch that committed. `rows` are the rows it generated itself (result columns). `may_quote`: the
    engine's errors may quote prompts (`Capabilities.quotes_prompts`); one that nobody knows may."""
    made = _describe_tellable(rows, may_quote=may_quote)
    tokens = made["completion_tokens"]
    rate = tokens / wall_s if tokens is not None and wall_s > 0 else None
    return BatchStats(
        batch_id=lease.batch_id,
        shard=lease.shard.id,
        attempt=lease.attempt,
        epoch=lease.epoch,
        outcome="committed",
        worker=info.worker_id,
        node=info.node,
        engine_kind=info.engine_kind,
        engine_version=info.engine_version,
        num_gpus=info.num_gpus,
        window=info.window,
        started_at=started_at,
        wall_s=wall_s,
        tokens_per_s=rate,
        tokens_per_s_per_gpu=rate / info.num_gpus if rate is not None and info.num_gpus else None,
        mean_inflight=mean_inflight,
        num_rows_from_journal=num_from_journal,
        num_rows_copied=num_copied,
        read_s=read_s,
        write_s=write_s,
        **made,
    )


def make_lost_stats(
    batch_id: str,
    *,
    info: WorkerInfo | None = None,
    engine_kind: str | None = None,
    started_at: float | None = None,
    wall_s: float | None = None,
    rows: pa.Table | None = None,
    outcome: str = "lost",
    may_quote: bool = True,
) -> BatchStats:
    """Stats of a batch that did not commit, as far as known. `rows` are those of its rows that a journal saved.
    `engine_kind`: where only that is known of the worker. `outcome`: 'shared' for one that helped another batch, 'reused'
    for rows that were taken over and not generated. `may_quote`: as in `make_batch_stats`."""
    number, epoch, attempt = parse_batch_id(batch_id)
    kind = info.engine_kind if info else engine_kind
    made = _describe_tellable(rows, may_quote=may_quote) if rows is not None else dict.fromkeys(ROW_FIELDS)
    return BatchStats(
        batch_id=batch_id,
        shard=f"shard-{number:09d}",
        attempt=attempt,
        epoch=epoch,
        outcome=outcome,
        worker=info.worker_id if info else None,
        node=info.node if info else None,
        engine_kind=kind,
        engine_version=info.engine_version if info else None,
        num_gpus=info.num_gpus if info else None,
        window=info.window if info else None,
        started_at=started_at,
        wall_s=wall_s,
        **made,
    )


def merge_stats(ours: BatchStats, theirs: BatchStats) -> BatchStats:
    """What two sources know of one batch: each field from the first that knows it. A file that stands and says that it
    is this batch's beats a note that its worker was lost: the worker died after its commit. So does a helper's word."""
    if OUTCOMES.index(theirs.outcome) < OUTCOMES.index(ours.outcome):
        ours, theirs = theirs, ours
    fields = {
        field.name: getattr(theirs, field.name)
        if getattr(ours, field.name) in (None, {})
        else getattr(ours, field.name)
        for field in dataclasses.fields(BatchStats)
    }
    return BatchStats(**fields)
