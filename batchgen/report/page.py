"""The report value as one self-contained page: no network, no script, light and dark, a phone's width and a desktop's.

Everything but our own shapes goes through the template's escaping, and a policy in the page forbids scripts and requests,
so that a generation can't be more than text.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from batchgen.report.charts import (
    draw_histogram,
    draw_lanes,
    draw_series,
    draw_shares,
    draw_workers,
    make_unknown,
    show_tokens,
)
from batchgen.report.figures import (
    UNKNOWN,
    divide,
    show,
    show_amount,
    show_counts,
    show_moment,
    show_share,
    show_time,
)
from batchgen.report.gates import show_check, tell_gate
from batchgen.report.svg import clean, escape, make_table
from batchgen.report.tiles import has_other_times, make_tiles
from batchgen.stats import LATENCIES, QUANTILES

LATENCY_NOTES = {
    "queued": "ready until the engine began",
    "ttft": "sent until the first token",
    "per_token": "after the first token",
    "latency": "sent until the end",
}
LATENCY_TITLES = {"queued": "Queued", "ttft": "First token", "per_token": "Per token", "latency": "Whole answer"}
WASTE = {
    "useful": "useful",
    "startup": "start-up",
    "starvation": "starvation",
    "tail": "tail",
    "retries": "retries",
}
GATE_KINDS = {"passed": "passed", "failed": "failed", "not looked at": "unseen"}
Section = dict[str, Any]


def make_html(report: Mapping[str, Any]) -> str:
    template, css = load_template()
    sections = [make_rows(report), *make_gates(report), make_time(report), make_workers(report), make_bill(report),
                make_latency(report), make_lengths(report), make_errors(report), make_what(report)]  # fmt: skip
    html: str = template.render(
        css=css,
        title=find_name(report),
        verdict=find_verdict(report),
        message=clean(report["message"] or ""),
        subtitle=clean(
            f"{report['engine']}, {report['model']}; run {report['epoch']}, {show_moment(report['made_at'])}"
        ),
        tiles=make_tiles(report),
        sections=sections,
        generations=[make_generation(row) for row in report["generations"]],
        fingerprint=report["fingerprint"],
        spec=clean(json.dumps(report["spec"], indent=2, ensure_ascii=False)),
        footer=f"batchgen {report['version']}. Made of batch stats and run records, {show_moment(report['made_at'])}. "
        "Every figure of this page is in report.json.",
    )
    return html


def find_verdict(report: Mapping[str, Any]) -> tuple[str, str]:
    """(its kind, in words). A run that got to its end with too many errors is no success."""
    if report["state"] == "finished" and report.get("exit_code"):
        return "gate_failed", "too many errors"
    return report["state"], report["state"].replace("_", " ")


@cache
def load_template() -> tuple[Any, str]:
    """The template and the style, as they ship."""
    from jinja2 import Environment

    folder = files("batchgen.report")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    page = (folder / "page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(page), (folder / "page.css").read_text(encoding="utf-8")


def find_name(report: Mapping[str, Any]) -> str:
    """The last part of the output path that says something."""
    parts = [part for part in str(report["spec"]["output"]["path"]).rstrip("/").split("/") if part]
    return clean(" / ".join(parts[-2:]) or "report")


def make_section(name: str, title: str, *groups: tuple[str, Sequence[str]], note: str = "", rows: Any = ()) -> Section:
    shown = [{"kind": kind, "charts": charts} for kind, charts in groups]
    return {"name": name, "title": title, "note": note, "groups": shown, "rows": list(rows)}


def make_rows(report: Mapping[str, Any]) -> Section:
    rows = report["rows"]
    wanted = rows["input"] * rows["n"]
    missing = max(0, wanted - rows["output"])
    parts = [
        ("ok", "generations", divide(rows["ok"], wanted), f"{rows['ok']:,}"),
        ("error", "errors", divide(rows["error"], wanted), f"{rows['error']:,} ({rows['retryable']:,} retryable)"),
        ("missing", "not there yet", divide(missing, wanted), f"{missing:,}"),
    ]
    each = f"{rows['input']:,} input rows x {rows['n']} = {wanted:,} output rows"
    verdict = "all there" if rows["is_complete"] else f"{missing:,} missing"
    chart = draw_shares(each, verdict, parts)
    facts = [
        ("Finish reasons", show_counts(report["job"]["finish_reasons"])),
        ("Batches", show_counts(report["job"]["batches"])),
        ("Sent again", f"{show(report['job']['num_retries'])} requests"),
        ("custom_id", report["custom_id"]),
    ]
    return make_section("rows", "Every row", ("", [chart]), rows=facts)


def make_gates(report: Mapping[str, Any]) -> list[Section]:
    """None for a job without gates."""
    checks, told = report["gate_checks"], report["gates"]
    names = list(dict.fromkeys(check["gate"] for check in checks))
    cards = []
    for name in names:
        verdict, looked = tell_gate(name, checks, told)
        head = f"<h3>{escape(name)}: {escape(verdict)}<span>{escape(looked)}</span></h3>"
        rows = [show_check(check) for check in checks if check["gate"] == name]
        cards.append(
            f'<div class="card gate {GATE_KINDS[verdict]}">{head}{make_table(["", "found", "limit", ""], rows)}</div>'
        )
    note = "The canary looks at the first rows of the job, the final gate at all of them; shares are of the rows looked at."
    return [make_section("gates", "Gates", ("pair", cards), note=note)] if cards else []


def make_time(report: Mapping[str, Any]) -> Section:
    timeline = report["timeline"]
    if timeline is None:
        why = "this run had nothing to do" if report["rows"]["is_complete"] else "the run left no record"
        return make_section("time", "Over time", ("", [make_unknown("Throughput", why)]))
    charts = [
        draw_series(
            timeline,
            "Tokens per second",
            "completion tokens, as workers tell them",
            "tokens_per_s",
            "tokens/s",
            "tokens",
        ),
        draw_series(timeline, "Rows per second", "finished rows", "rows_per_s", "rows/s", "rows"),
        draw_series(
            timeline, "In flight", "requests sent and not answered", "inflight", "in flight", "tokens", limit="window"
        ),
        draw_workers(timeline),
    ]
    note = f"Of run {timeline['epoch']}: this one had nothing to do." if has_other_times(report) else ""
    return make_section("time", "Over time", ("pair", charts), rows=make_tail_rows(report["tail"]), note=note)


def make_tail_rows(tail: Mapping[str, Any]) -> list[tuple[str, str]]:
    if tail["began_s"] is None:
        return [("Tail", "shards waited until the end of what is known")]
    moved = f"{show(tail['moved_rows'])} rows moved to idle workers in {show(tail['shares'])} shares"
    share = f"{show_time(tail['seconds'])}, {show_share(tail['share_of_run'])} of the run"
    return [("Tail", f"{share}, the window {show_share(tail['window_share'])} full; {moved}")]


def make_workers(report: Mapping[str, Any]) -> Section:
    lanes = report["lanes"]
    chart = draw_lanes(lanes) if lanes else make_unknown("Workers one by one", "the run left no record")
    return make_section("workers", "Workers", ("", [chart]))


def make_bill(report: Mapping[str, Any]) -> Section:
    bill, runs = report["bill"], report["runs"]
    has_gpus = bill["gpu_hours"] is not None
    hours = bill["gpu_hours"] if has_gpus else bill["worker_hours"]
    unit = "GPU-hours" if has_gpus else "worker-hours"
    parts = []
    for name, label in WASTE.items():
        share = bill["shares"][name]
        known = None if share is None or hours is None else share * hours * 3600
        parts.append((name, label, share, UNKNOWN if share is None else f"{show_share(share)}, {show_time(known)}"))
    price = next((run["gpu_hour_cost"] for run in reversed(runs) if run["gpu_hour_cost"] is not None), None)
    told = (
        f"cost {show_amount(bill['cost'])} at {show(price)} a GPU-hour"
        if bill["cost"] is not None
        else "no price given"
    )
    charts = (
        [draw_shares(f"{show_amount(hours)} {unit}", told if has_gpus else "workers reserve no GPU", parts)]
        if runs
        else []
    )
    head = ["run", "began", "state", "time", "rows", "tokens", unit, "cost"]
    table = make_table(head, [make_run_cells(run, has_gpus) for run in runs])
    note = (
        "Starvation and tail are the part of the in-flight window that was empty, before and after the last shard was "
        "lent: an engine with fewer slots than its window loses less than that."
    )
    return make_section("bill", "Hours and cost", ("", [*charts, f'<div class="card">{table}</div>']), note=note)


def make_run_cells(run: Mapping[str, Any], has_gpus: bool) -> list[str]:
    hours = run["gpu_hours"] if has_gpus else run["worker_hours"]
    counts = [show(run["rows"]), show(run["tokens"]), show_amount(hours), show_amount(run["cost"])]
    return [str(run["epoch"]), show_moment(run["began_at"]), run["state"], show_time(run["elapsed_s"]), *counts]


def make_latency(report: Mapping[str, Any]) -> Section:
    bars, latency = report["histograms"], report["job"]["latency"]
    charts = [draw_histogram(LATENCY_TITLES[name], LATENCY_NOTES[name], bars[name], show_time) for name in LATENCIES]
    rows = [[LATENCY_TITLES[name], *(show_time(latency[f"{name}_{key}_s"]) for key in QUANTILES)] for name in LATENCIES]
    table = f'<div class="card">{make_table(["", *QUANTILES], rows)}</div>'
    note = "Over the rows of all batches, right to 1 %. Times run on a logarithmic axis; the height is rows."
    return make_section("latency", "Latency", ("pair", charts), ("", [table]), note=note)


def make_lengths(report: Mapping[str, Any]) -> Section:
    job, bars = report["job"], report["histograms"]
    charts = [
        draw_histogram("Prompt tokens", "by octave", bars["prompt_tokens"], show_tokens),
        draw_histogram("Completion tokens", "by quarter octave", bars["completion_tokens"], show_tokens),
    ]
    hits = divide(job["cached_tokens"], job["prompt_tokens"])
    facts = [
        (
            "Cache hits",
            f"{show(job['cached_tokens'])} of {show(job['prompt_tokens'])} prompt tokens ({show_share(hits)})",
        )
    ]
    return make_section("lengths", "Lengths and cache", ("pair", charts), rows=facts)


def make_errors(report: Mapping[str, Any]) -> Section:
    errors = report["errors"]
    if not errors:
        return make_section("errors", "Errors", ("", ['<p class="card">No batch had an error.</p>']))
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells in ((e["error_type"], f"{e['count']:,}", e["example"] or UNKNOWN) for e in errors)
    )
    head = '<th scope="col">type</th><th scope="col">rows</th><th scope="col">one of their messages</th>'
    inner = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    table = f'<div class="card scroll"><table class="errors">{inner}</table></div>'
    note = "As batches met them, in all runs: those that a later run tried again count too."
    return make_section("errors", "Errors", ("", [table]), note=note)


def make_what(report: Mapping[str, Any]) -> Section:
    what = report["what"]
    versions = {name: value for name, value in what["versions"].items() if value is not None}
    cluster = what["cluster"]
    nodes = ", ".join(what["nodes"]) + (", and more" if what["num_nodes"] > len(what["nodes"]) else "")
    rows = [
        ("Engine", f"{report['engine']} {', '.join(what['engine_versions']) or UNKNOWN}"),
        ("Model", report["model"]),
        ("Versions", ", ".join(f"{name} {value}" for name, value in versions.items()) or UNKNOWN),
        ("Nodes", f"{what['num_nodes']}: {nodes}" if what["num_nodes"] else UNKNOWN),
    ]
    if cluster:
        rows.append(("Cluster", f"{cluster['pool']}, {tell_workers(cluster)}; driver on {cluster['driver_node']}"))
    if what.get("length_prior"):  # reports of earlier versions don't say
        rows.append(("Lengths expected", f"as measured by {what['length_prior']}"))
    return make_section("what", "What ran", rows=[(label, clean(value)) for label, value in rows])


def tell_workers(cluster: Mapping[str, Any]) -> str:
    low, high, gpus = cluster["workers_min"], cluster["workers_max"], cluster["gpus_per_worker"]
    number = f"{low} to {high} workers" if low != high else "1 worker" if high == 1 else f"{high} workers"
    return f"{number}, {f'{gpus:g} GPUs each' if gpus else 'no GPU'}"


def make_generation(row: Mapping[str, Any]) -> dict[str, Any]:
    facts = row["finish_reason"] or row["error_type"] or UNKNOWN
    if row["completion_tokens"] is not None:
        facts = f"{facts}, {show(row['completion_tokens'])} tokens"
    label = row["custom_id"] or f"{row['source_file']}:{row['source_row']}"
    return {
        "label": clean(label),
        "facts": clean(facts),
        "text": clean(row["text"] or "(no text)"),
        "reasoning": clean(row["reasoning"] or ""),
    }
