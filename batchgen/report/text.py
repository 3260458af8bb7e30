"""The report's summary as (label, value) lines for a terminal. Pure."""

from collections.abc import Mapping
from typing import Any

from batchgen.report.figures import show, show_amount, show_counts, show_share, show_time
from batchgen.report.gates import tell_gate
from batchgen.stats import LATENCIES, QUANTILES


def make_text_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows, job, run = report["rows"], report["job"], report["run"]
    lines = [
        ("state", report["state"] + (f": {report['message']}" if report["message"] else "")),
        ("rows", f"{rows['output']:,} of {rows['input'] * rows['n']:,} (ok {rows['ok']:,}, error {rows['error']:,})"),
        ("tokens", f"prompt {show(job['prompt_tokens'])}, completion {show(job['completion_tokens'])}"),
    ]
    if run["elapsed_s"] is not None:  # a run that had nothing to do has no time of its own
        lines.append(("this run", f"{show_time(run['elapsed_s'])}, {show(run['tokens_per_s'])} completion tokens/s"))
    if run["window_share"] is not None:
        lines.append(("window", f"{run['window_share']:.1%} full, mean over this run's batches"))
    if job.get("rows_reused"):  # reports of earlier versions don't say
        told = f"{job['rows_reused']:,} rows, {show(job['completion_tokens_reused'])} completion tokens, not generated"
        lines.append(("reused", told))
    if checks := report.get("gate_checks"):
        names = dict.fromkeys(check["gate"] for check in checks)
        lines.append(("gates", ", ".join(f"{name} {tell_gate(name, checks, report['gates'])[0]}" for name in names)))
    if prior := report["what"].get("length_prior"):
        lines.append(("lengths expected", f"as measured by {prior}"))
    lines += _make_bill_rows(report)
    for name in LATENCIES:
        values = [show_time(job["latency"][f"{name}_{key}_s"]) for key in QUANTILES]
        lines.append((f"{name.replace('_', ' ')} {'/'.join(QUANTILES)}", ", ".join(values)))
    lines.append(("batches", ", ".join(f"{count} {name}" for name, count in job["batches"].items()) or "none"))
    lines.append(("finish reasons", show_counts(job["finish_reasons"])))
    if rows["error"]:
        lines.append(("error types", show_counts(job["error_types"])))
    lines.append(("custom_id", report["custom_id"]))
    return lines


def _make_bill_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Reports of earlier versions have no bill."""
    bill, run = report.get("bill") or {}, report["run"]
    lines = []
    if run["gpu_hours"] is not None:
        of_job = bill.get("gpu_hours")
        whole = f" ({show(of_job)} of the job's {bill['num_runs']} runs)" if bill.get("num_runs", 1) > 1 else ""
        lines.append(("GPU-hours", show(run["gpu_hours"]) + whole))
    if bill.get("cost") is not None:
        lines.append(("cost", show_amount(bill["cost"])))
    if (wasted := bill.get("wasted_share")) is not None:
        shares = bill["shares"]
        why = ", ".join(f"{name} {show_share(shares[name])}" for name in shares if name != "useful")
        lines.append(("not used", f"{show_share(wasted)} of worker time: {why}"))
    return lines
