"""The few figures at the top of the page, each (label, value, note). Pure."""

from collections.abc import Mapping
from typing import Any

from batchgen.report.figures import show, show_amount, show_share, show_tile, show_time


def make_tiles(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows, run, job, bill = report["rows"], report["run"], report["job"], report["bill"]
    wanted = rows["input"] * rows["n"]
    tiles = [
        ("Rows", show_tile(rows["output"]), f"of {wanted:,}; {rows['error']:,} errors"),
        ("Completion tokens", show_tile(job["completion_tokens"]), f"{show_tile(job['prompt_tokens'])} prompt tokens"),
        make_run_tile(run, report["state"], is_idle=has_other_times(report)),
        (
            "Answer p50, p99",
            show_time(job["latency"]["latency_p50_s"]),
            f"p99 {show_time(job['latency']['latency_p99_s'])}",
        ),
    ]
    if bill["gpu_hours"] is not None:
        cost = "no price given" if bill["cost"] is None else f"cost {show_amount(bill['cost'])}"
        tiles.append(("GPU-hours", show_amount(bill["gpu_hours"]), cost))
    else:
        tiles.append(("Worker-hours", show_amount(bill["worker_hours"]), "workers reserve no GPU"))
    return [*tiles, ("Not used", show_share(bill["wasted_share"]), "of worker time")]


def make_run_tile(run: Mapping[str, Any], state: str, *, is_idle: bool) -> tuple[str, str, str]:
    if is_idle:
        return "This run", "nothing", "was left to do"
    return (
        "Run, as last told" if state in ("running", "killed") else "This run",
        show_time(run["elapsed_s"]),
        f"{show(run['tokens_per_s'])} tokens/s",
    )


def has_other_times(report: Mapping[str, Any]) -> bool:
    """Is what is shown over time of an earlier run, because this one had nothing to do?"""
    return report["timeline"] is not None and report["timeline"]["epoch"] != report["epoch"]
