"""What a run did, as one value, and that value as JSON, text rows and one offline HTML file.

Every figure says what it counts; unknown is None and shown as a dash. Built from shard footers and batch stats alone,
never from rows. Latencies over many batches come from their merged sketches, right to 1 %.
"""

import html
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from batchgen import __version__
from batchgen.batches import BatchStats
from batchgen.driver.fence import Put
from batchgen.manifest import CommittedShard
from batchgen.spec import JobSpec
from batchgen.stats import LATENCIES, QUANTILES, merge_sketches, read_quantile

REPORT_JSON, REPORT_HTML = "report.json", "report.html"


def make_report(
    spec: JobSpec,
    committed: Sequence[CommittedShard],
    batches: Iterable[BatchStats],
    *,
    epoch: int,
    state: str,
    message: str | None,
    num_input_rows: int,
    elapsed_s: float,
    is_unique_checked: bool | None,
    gpu_hours: float | None = None,
) -> dict[str, Any]:
    """The report. `state`: finished, stopped. `batches`: all that are known, of this and earlier runs. `gpu_hours`: of this
    run's workers, start-up included; None where they reserve none."""
    everything = list(batches)
    ours = [batch for batch in everything if batch.epoch == epoch]
    return {
        "state": state,
        "message": message,
        "made_at": time.time(),
        "version": __version__,
        "fingerprint": spec.fingerprint(),
        "epoch": epoch,
        "engine": spec.engine.kind,
        "model": spec.model.path,
        "custom_id": "unique" if is_unique_checked else "not checked",
        "rows": make_row_counts(spec, committed, num_input_rows),
        "job": make_totals(everything),
        "run": {
            **make_totals(ours),
            "elapsed_s": elapsed_s,
            "tokens_per_s": _rate(ours, elapsed_s),
            "gpu_hours": gpu_hours,
        },
    }


def make_row_counts(spec: JobSpec, committed: Sequence[CommittedShard], num_input_rows: int) -> dict[str, Any]:
    """Conservation: input rows x n = output rows = ok + error, once the job is complete."""
    num_ok = sum(shard.footer.num_rows_ok for shard in committed)
    num_error = sum(shard.footer.num_rows_error for shard in committed)
    done = num_ok + num_error
    return {
        "input": num_input_rows,
        "n": spec.sampling.n,
        "output": done,
        "ok": num_ok,
        "error": num_error,
        "retryable": sum(shard.footer.num_rows_retryable for shard in committed),
        "error_rate": num_error / done if done else None,
        "is_complete": done == num_input_rows * spec.sampling.n,
    }


def make_totals(batches: Sequence[BatchStats]) -> dict[str, Any]:
    """Sums and latencies over batches; a lost batch counts with the rows that its journal saved. Tokens are those that were
    generated: what was taken over is told beside them."""
    made = [batch for batch in batches if batch.outcome != "reused"]
    reused = [batch for batch in batches if batch.outcome == "reused"]
    return {
        "batches": dict(Counter(batch.outcome for batch in batches)),
        "workers": len({(batch.epoch, batch.worker) for batch in batches if batch.worker}),
        "prompt_tokens": _add(batch.prompt_tokens for batch in made),
        "completion_tokens": _add(batch.completion_tokens for batch in made),
        "cached_tokens": _add(batch.cached_tokens for batch in made),
        "rows_reused": sum(batch.num_rows_ok or 0 for batch in reused),
        "completion_tokens_reused": _add(batch.completion_tokens for batch in reused),
        "num_retries": _add(batch.num_retries for batch in batches),
        "window_share": _share_window(batches),
        "finish_reasons": _add_counts(batch.finish_reasons for batch in batches),
        "error_types": _add_counts(batch.error_types for batch in batches),
        "latency": make_job_latency(batches),
    }


def make_job_latency(batches: Sequence[BatchStats]) -> dict[str, float | None]:
    """{latency_p99_s: ...} over all rows of the batches; a maximum is a bucket's middle too."""
    latency: dict[str, float | None] = {}
    for name in LATENCIES:
        merged = merge_sketches((batch.sketches or {}).get(name, "") for batch in batches)
        latency |= {f"{name}_{key}_s": read_quantile(merged, q) for key, q in QUANTILES.items()}
    return latency


def _add(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _add_counts(counts: Iterable[Mapping[str, int] | None]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count or {})
    return dict(total.most_common())


def _share_window(batches: Sequence[BatchStats]) -> float | None:
    """Requests in flight over the most allowed, mean over the batches' time. Each batch sees its worker's whole window."""
    seen = [
        (batch.mean_inflight * batch.wall_s, batch.window * batch.wall_s)
        for batch in batches
        if batch.mean_inflight is not None and batch.window and batch.wall_s
    ]
    return sum(held for held, _ in seen) / sum(most for _, most in seen) if seen else None


def _rate(batches: Sequence[BatchStats], elapsed_s: float) -> float | None:
    tokens = _add(batch.completion_tokens for batch in batches if batch.outcome != "reused")
    return tokens / elapsed_s if tokens is not None and elapsed_s > 0 else None


# ---- for people ------------------------------------------------------------------------------------------------------


def make_text_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value) lines of the summary."""
    rows, job, run = report["rows"], report["job"], report["run"]
    lines = [
        ("state", report["state"] + (f": {report['message']}" if report["message"] else "")),
        ("rows", f"{rows['output']:,} of {rows['input'] * rows['n']:,} (ok {rows['ok']:,}, error {rows['error']:,})"),
        ("tokens", f"prompt {_show(job['prompt_tokens'])}, completion {_show(job['completion_tokens'])}"),
        ("this run", f"{_show(run['elapsed_s'], 's')}, {_show(run['tokens_per_s'])} completion tokens/s"),
    ]
    if job.get("rows_reused"):  # a report of an earlier version has none
        lines.append(
            ("reused", f"{job['rows_reused']:,} rows, {_show(job['completion_tokens_reused'])} completion tokens")
        )
    if run["window_share"] is not None:
        lines.append(("window", f"{run['window_share']:.1%} full, mean over this run's batches"))
    if run["gpu_hours"] is not None:
        lines.append(("GPU-hours", _show(run["gpu_hours"])))
    for name in LATENCIES:
        values = [_show(job["latency"][f"{name}_{key}_s"], "s") for key in QUANTILES]
        lines.append((f"{name.replace('_', ' ')} {'/'.join(QUANTILES)}", ", ".join(values)))
    lines.append(("batches", ", ".join(f"{count} {name}" for name, count in job["batches"].items()) or "-"))
    lines.append(("finish reasons", _show_counts(job["finish_reasons"])))
    if rows["error"]:
        lines.append(("error types", _show_counts(job["error_types"])))
    lines.append(("custom_id", report["custom_id"]))
    return lines


def _show(value: float | int | None, unit: str = "") -> str:
    if value is None:
        return "-"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def _show_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "-"


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 48rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
th { white-space: nowrap; font-weight: 500; }
pre { overflow-x: auto; font-size: .85rem; }
"""


def make_html(report: Mapping[str, Any], spec: JobSpec) -> str:
    """One self-contained page; every value escaped."""
    rows = "".join(
        f"<tr><th>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>"
        for label, value in make_text_rows(report)
    )
    shown = json.dumps(spec.model_dump(mode="json"), indent=2, ensure_ascii=False)
    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(report["made_at"]))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>batchgen report</title>'
        f"<style>{STYLE}</style></head><body><h1>batchgen report</h1><p>{made}, version {__version__}, "
        f"epoch {report['epoch']}</p><table>{rows}</table>"
        f"<details><summary>spec</summary><pre>{html.escape(shown)}</pre></details></body></html>\n"
    )


def write_report(put: Put, report: Mapping[str, Any], spec: JobSpec) -> None:
    put(REPORT_JSON, json.dumps(report, indent=1, ensure_ascii=False).encode())
    put(REPORT_HTML, make_html(report, spec).encode())
