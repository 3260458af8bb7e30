"""The report as one value: what ran, what came out, over what time, at what price. Pure.

Every figure says what it counts; unknown is None. Made of rows' counts, the table of batches and the records of runs:
stats alone, never rows. Latencies over many batches come from their merged sketches, right to 1 %.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchgen import __version__
from batchgen.batches import FileFooter
from batchgen.report.distributions import make_histograms, make_latency
from batchgen.report.figures import RunRecord, divide
from batchgen.report.gates import make_gate_checks
from batchgen.report.lanes import make_lanes
from batchgen.report.waste import LOSSES, make_waste
from batchgen.spec import JobSpec
from batchgen.stats import count_values, total

MAX_NAMED = 20


def make_report(
    spec: JobSpec,
    rows: dict[str, Any],
    table: pa.Table,
    records: Sequence[RunRecord],
    *,
    epoch: int,
    state: str,
    message: str | None,
    made_at: float,
    is_unique_checked: bool | None,
    gates: dict[str, Any] | None = None,
    generations: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """`state`: finished, stopped, running, or killed (it ended without a word). `rows`: `make_row_counts`. `table`: all
    batches that are known, of this and earlier runs (`batch_stats.STATS_SCHEMA`). `gates`: what the run said of them, None
    where it has not."""
    ours = table.filter(pc.equal(table["epoch"], epoch))
    # A run that had nothing to do leaves no record: what there was to see is the last one's that had.
    shown = next((found for found in records if found["epoch"] == epoch), records[-1] if records else None)
    runs = [make_run(found, table, is_settled=rows["is_complete"] or found["epoch"] != epoch) for found in records]
    run = next((found for found in runs if found["epoch"] == epoch), None)
    totals = make_totals(ours)
    return {
        "state": state,
        "message": message,
        "made_at": made_at,
        "version": __version__,
        "fingerprint": spec.fingerprint(),
        "epoch": epoch,
        "engine": spec.engine.kind,
        "model": spec.model.path,
        "custom_id": "unique" if is_unique_checked else "not checked",
        "rows": rows,
        "gates": gates,
        "gate_checks": make_gate_checks(spec.model_dump(mode="json")["gates"], gates),
        "job": make_totals(table),
        "run": {
            **totals,
            "elapsed_s": run["elapsed_s"] if run else None,
            "tokens_per_s": find_rate(totals["completion_tokens"], run) if run else None,
            "gpu_hours": run["gpu_hours"] if run else None,
        },
        "runs": runs,
        "bill": make_bill(runs),
        "what": make_what(table, shown),
        "errors": make_errors(table),
        "histograms": make_histograms(table),
        "timeline": make_timeline(shown) if shown else None,
        "lanes": make_lanes(shown, table) if shown else None,
        "tail": make_tail(shown, table) if shown else None,
        "generations": list(generations),
        "spec": spec.model_dump(mode="json"),
    }


def make_row_counts(spec: JobSpec, footers: Sequence[FileFooter], num_input_rows: int) -> dict[str, Any]:
    """Conservation: input rows x n = output rows = ok + error, once the job is complete."""
    num_ok = sum(footer.num_rows_ok for footer in footers)
    num_error = sum(footer.num_rows_error for footer in footers)
    done = num_ok + num_error
    return {
        "input": num_input_rows,
        "n": spec.sampling.n,
        "output": done,
        "ok": num_ok,
        "error": num_error,
        "retryable": sum(footer.num_rows_retryable for footer in footers),
        "error_rate": num_error / done if done else None,
        "is_complete": done == num_input_rows * spec.sampling.n,
    }


# ---- batches ---------------------------------------------------------------------------------------------------------


def make_totals(table: pa.Table) -> dict[str, Any]:
    """Sums and latencies over batches; a lost batch counts with the rows that its journal saved. Tokens are those that were
    generated; what was taken over is told beside them."""
    is_reused = pc.equal(table["outcome"], "reused")
    counts = table.select(["num_rows_ok", "prompt_tokens", "completion_tokens", "cached_tokens"])
    made, reused = counts.filter(pc.invert(is_reused)), counts.filter(is_reused)
    workers = table.select(["epoch", "worker"]).drop_null().group_by(["epoch", "worker"]).aggregate([])
    return {
        "batches": count_values(table["outcome"]),
        "workers": workers.num_rows,
        "prompt_tokens": total(made["prompt_tokens"]),
        "completion_tokens": total(made["completion_tokens"]),
        "cached_tokens": total(made["cached_tokens"]),
        "rows_reused": total(reused["num_rows_ok"]) or 0,
        "completion_tokens_reused": total(reused["completion_tokens"]),
        "num_retries": total(table["num_retries"]),
        "window_share": share_window(table),
        "finish_reasons": add_counts(table["finish_reasons"]),
        "error_types": add_counts(table["error_types"]),
        "latency": make_latency(table),
    }


def add_counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Of a column of (value, count) lists: most frequent first."""
    pairs = pc.list_flatten(column)
    pairs = pa.table({name: pc.struct_field(pairs, name) for name in ("value", "count")})
    sums = pairs.group_by("value").aggregate([("count", "sum")])
    counts = Counter(dict(zip(sums["value"].to_pylist(), sums["count_sum"].to_pylist(), strict=True)))
    return dict(counts.most_common())


def share_window(table: pa.Table) -> float | None:
    """Requests in flight over the most allowed, mean over the batches' time. Each batch sees its worker's whole window."""
    seen = table.select(["mean_inflight", "window", "wall_s"]).drop_null()
    held = pc.sum(pc.multiply(seen["mean_inflight"], seen["wall_s"])).as_py()
    most = pc.sum(pc.multiply(pc.cast(seen["window"], pa.float64()), seen["wall_s"])).as_py()
    return divide(held, most)


def make_errors(table: pa.Table) -> list[dict[str, Any]]:
    """Error types by number of rows, each with a message of ours."""
    pairs = pc.list_flatten(table["error_examples"])
    values, messages = (pc.struct_field(pairs, name).to_pylist() for name in ("value", "message"))
    examples = dict(zip(reversed(values), reversed(messages), strict=True))
    counts = add_counts(table["error_types"])
    return [{"error_type": name, "count": count, "example": examples.get(name)} for name, count in counts.items()]


def make_what(table: pa.Table, record: RunRecord | None) -> dict[str, Any]:
    """Versions and places. `nodes` names some of them; `length_prior` is the output whose lengths the run expected."""
    nodes = count_values(table["node"])
    return {
        "versions": dict(record.get("versions", {})) if record else {},
        "cluster": dict(record.get("cluster", {})) if record else {},
        "length_prior": record.get("length_prior") if record else None,
        "engine_versions": sorted(count_values(table["engine_version"])),
        "num_nodes": len(nodes),
        "nodes": sorted(nodes)[:MAX_NAMED],
    }


# ---- runs ------------------------------------------------------------------------------------------------------------


def make_run(record: RunRecord, table: pa.Table, *, is_settled: bool) -> dict[str, Any]:
    """One run's line: its time, what it did and what it cost. Hours are None where workers reserve no GPU."""
    is_kept = pc.invert(pc.is_in(table["outcome"], pa.array(["superseded", "reused"])))
    kept = table.select(["completion_tokens"]).filter(pc.and_(pc.equal(table["epoch"], record["epoch"]), is_kept))
    gpus = record.get("cluster", {}).get("gpus_per_worker") or None
    waste = make_waste(record, total(kept["completion_tokens"]), is_settled=is_settled)
    gpu_hours = record["worker_s"] * gpus / 3600 if gpus else None
    price = record.get("gpu_hour_cost")
    return {
        "epoch": record["epoch"],
        "state": record["state"],
        "message": record.get("message"),
        "began_at": record["began_at"],
        "elapsed_s": record["elapsed_s"],
        "rows": record["total"]["rows"],
        "tokens": record.get("num_tokens"),
        "worker_hours": record["worker_s"] / 3600,
        "gpu_hours": gpu_hours,
        "gpu_hour_cost": price,
        "cost": None if gpu_hours is None or price is None else gpu_hours * price,
        "waste_worker_s": waste,
    }


def find_rate(num_tokens: int | None, run: dict[str, Any]) -> float | None:
    """`num_tokens`: of the run's batches. While it goes on some of these are newer than what it last told of itself."""
    return divide(run["tokens"] if run["state"] == "running" else num_tokens, run["elapsed_s"])


def make_bill(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over all runs that left a record: hours, cost, and the share of worker time by what it went to."""
    worker_s = sum(run["waste_worker_s"]["total"] for run in runs)
    shares = {name: _share(runs, name, worker_s) for name in ("useful", *LOSSES)}
    known = [share for name, share in shares.items() if name != "useful" and share is not None]
    return {
        "num_runs": len(runs),
        "worker_hours": _total(run["worker_hours"] for run in runs),
        "gpu_hours": _total(run["gpu_hours"] for run in runs),
        "cost": _total(run["cost"] for run in runs),
        "shares": shares,
        "wasted_share": sum(known) if known else None,
    }


def _total(values: Iterable[float | None]) -> float | None:
    """None where any is unknown: a sum of some of the runs is not the job's."""
    found = list(values)
    return None if None in found or not found else sum(value for value in found if value is not None)


def _share(runs: Sequence[dict[str, Any]], name: str, worker_s: float) -> float | None:
    parts = [run["waste_worker_s"][name] for run in runs]
    known = [part for part in parts if part is not None]
    return divide(sum(known), worker_s) if known else None


def make_timeline(record: RunRecord) -> dict[str, Any]:
    """Means of each bin. A turn that took the driver long is in the bin where it ends: its mean is that of the bins before,
    too, which saw no turn."""
    bins = record["bins"]

    def per_second(name: str) -> list[float | None]:
        means: list[float | None] = []
        for value, seconds in zip(reversed(bins[name]), reversed(bins["seconds"]), strict=True):
            means.append(divide(value, seconds) if seconds or not means else means[-1])
        return means[::-1]

    return {
        "epoch": record["epoch"],
        "bin_s": record["bin_s"],
        "elapsed_s": record["elapsed_s"],
        "tail_began_s": record["tail"]["began_s"],
        "tokens_per_s": per_second("tokens"),
        "rows_per_s": per_second("rows"),
        "errors": bins["errors"],
        "inflight": per_second("inflight_s"),
        "window": per_second("window_s"),
        "starting": per_second("starting_s"),
        "ready": per_second("ready_s"),
        "busy": per_second("busy_s"),
    }


def make_tail(record: RunRecord, table: pa.Table) -> dict[str, Any]:
    """The time since no shard waited: how long, how full the windows were, what was moved to idle workers."""
    is_shared = pc.and_(pc.equal(table["epoch"], record["epoch"]), pc.equal(table["outcome"], "shared"))
    tail, shared = record["tail"], table.filter(is_shared)
    return {
        "began_s": tail["began_s"],
        "seconds": tail["seconds"] if tail["began_s"] is not None else None,
        "share_of_run": divide(tail["seconds"], record["elapsed_s"]) if tail["began_s"] is not None else None,
        "window_share": divide(tail["inflight_s"], tail["window_s"]),
        "shares": shared.num_rows,
        "moved_rows": total(shared["num_rows_ok"]) if shared.num_rows else 0,
    }
