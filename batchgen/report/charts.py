"""The charts of a report, each a figure with its title, its axes and its figures as a table behind it. Pure: parts of the
report value in, HTML out. A part that is unknown is said to be so, in words.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from batchgen.report.figures import show, show_short, show_time
from batchgen.report.svg import HEIGHT, WIDTH, area, escape, grid, line, make_table, plot, rect, vertical

Show = Callable[[float | None], str]
# A table behind a chart shows so many of its bins.
MAX_TABLE_ROWS = 24
LANE = 20.0
BAR = 14.0


def make_figure(title: str, note: str, body: str, table: str = "", legend: Sequence[tuple[str, str]] = ()) -> str:
    """`legend`: (class, label)."""
    keys = "".join(f'<li><i class="{kind}"></i>{escape(label)}</li>' for kind, label in legend)
    behind = f"<details><summary>Figures</summary>{table}</details>" if table else ""
    head = f"<figcaption><b>{escape(title)}</b>{f'<span>{escape(note)}</span>' if note else ''}</figcaption>"
    return f"<figure>{head}{f'<ul class=legend>{keys}</ul>' if keys else ''}{body}{behind}</figure>"


def make_unknown(title: str, why: str) -> str:
    return make_figure(title, "", f'<p class="unknown">unknown: {escape(why)}</p>')


def frame(drawn: str, high: str, axis: Sequence[str]) -> str:
    """The plot between its labels: the top of the y axis (its bottom is 0), and the x axis from left to right."""
    labels = "".join(f"<span>{escape(label)}</span>" for label in axis)
    return (
        f'<div class="plot"><div class="y"><span>{escape(high)}</span><span>0</span></div>{drawn}'
        f'<div class="x">{labels}</div></div>'
    )


def choose_top(values: Sequence[float | None]) -> float:
    """A round number at or above all of them."""
    most = max((value for value in values if value is not None), default=0.0)
    if most <= 0:
        return 1.0
    size = 10.0 ** math.floor(math.log10(most))
    return next(step * size for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * size >= most * 0.999)


# ---- over time -------------------------------------------------------------------------------------------------------


def list_times(timeline: Mapping[str, Any]) -> list[str]:
    elapsed = timeline["elapsed_s"]
    return [show_time(part * elapsed / 4) if part else "0" for part in range(5)]


def place_bins(values: Sequence[float | None], timeline: Mapping[str, Any], top: float) -> list[tuple[float, float]]:
    """Steps: each bin as wide as its time. A bin without a value is one with nothing."""
    scale = WIDTH / max(timeline["elapsed_s"], 1e-9)
    points: list[tuple[float, float]] = []
    for place, value in enumerate(values):
        y = HEIGHT - HEIGHT * min((value or 0.0) / top, 1.0)
        start, end = place * timeline["bin_s"] * scale, (place + 1) * timeline["bin_s"] * scale
        points += [(min(start, WIDTH), y), (min(end, WIDTH), y)]
    return points


def mark_tail(timeline: Mapping[str, Any]) -> list[str]:
    began, elapsed = timeline["tail_began_s"], timeline["elapsed_s"]
    return [vertical(WIDTH * began / elapsed, "mark")] if began is not None and elapsed else []


def tabulate(timeline: Mapping[str, Any], names: Mapping[str, str]) -> str:
    count = len(timeline["rows_per_s"])
    step = max(1, -(-count // MAX_TABLE_ROWS))
    rows = [
        [show_time(place * timeline["bin_s"]), *(show(timeline[name][place]) for name in names)]
        for place in range(0, count, step)
    ]
    return make_table(["from", *names.values()], rows)


def draw_series(
    timeline: Mapping[str, Any], title: str, note: str, name: str, unit: str, kind: str, *, limit: str | None = None
) -> str:
    """One series as an area; `limit` another one as a line above it."""
    values = timeline[name]
    top = choose_top([*values, *(timeline[limit] if limit else [])])
    points = place_bins(values, timeline, top)
    floor = [(x, HEIGHT) for x, _ in points]
    shapes = [*grid(), area(points, floor, f"fill {kind}"), line(points, kind)]
    legend = [(kind, unit)]
    if limit is not None:
        shapes.append(line(place_bins(timeline[limit], timeline, top), "limit"))
        legend.append(("limit", limit))
    if timeline["tail_began_s"] is not None:
        legend.append(("mark", "nothing waits any more"))
    drawn = plot(title, f"{unit} over the run's time, at most {show(top)}", [*shapes, *mark_tail(timeline)])
    table = tabulate(timeline, {name: unit, **({limit: limit} if limit else {})})
    return make_figure(title, note, frame(drawn, show_short(top), list_times(timeline)), table, legend)


def draw_workers(timeline: Mapping[str, Any]) -> str:
    """Starting, busy and idle ones, one upon the other."""
    busy = [value or 0.0 for value in timeline["busy"]]
    idle = [max(0.0, (ready or 0.0) - b) for ready, b in zip(timeline["ready"], busy, strict=True)]
    starting = [value or 0.0 for value in timeline["starting"]]
    layers = (("busy", busy), ("idle", idle), ("startup", starting))
    sums = [0.0] * len(busy)
    top = choose_top([a + b + c for a, b, c in zip(busy, idle, starting, strict=True)])
    shapes, floor = grid(), place_bins(sums, timeline, top)
    for kind, values in layers:
        sums = [a + b for a, b in zip(sums, values, strict=True)]
        points = place_bins(sums, timeline, top)
        shapes.append(area(points, floor, f"solid {kind}"))
        floor = points
    drawn = plot("Workers", f"workers over the run's time, at most {show(top)}", [*shapes, *mark_tail(timeline)])
    legend = [("busy", "busy"), ("idle", "idle"), ("startup", "starting")]
    table = tabulate(timeline, {"busy": "busy", "ready": "up", "starting": "starting"})
    return make_figure("Workers", "", frame(drawn, show_short(top), list_times(timeline)), table, legend)


# ---- distributions ---------------------------------------------------------------------------------------------------


def draw_histogram(title: str, note: str, bars: Sequence[Sequence[float]], show_edge: Show) -> str:
    """Bars on a logarithmic axis, for what they count spans decades."""
    if not bars:
        return make_unknown(title, "nobody measured it")
    top = max(rows for *_, rows in bars)
    width = WIDTH / len(bars)
    shapes = grid(2)
    for place, (low, high, rows) in enumerate(bars):
        height = HEIGHT * rows / top
        told = f"{show_edge(low)} to {show_edge(high)}: {rows:,} rows"
        shapes.append(rect(place * width + 1, HEIGHT - height, width - 2, height, "solid bar", told))
    edges = [bars[round(part * (len(bars) - 1) / 2)] for part in range(3)]
    axis = [show_edge(edges[0][0]), show_edge(math.sqrt(edges[1][0] * edges[1][1])), show_edge(edges[2][1])]
    drawn = plot(title, f"rows by {title}, from {axis[0]} to {axis[2]}, logarithmic", shapes)
    table = make_table(
        ["from", "to", "rows"], [[show_edge(a), show_edge(b), f"{rows:,}"] for a, b, rows in bars if rows]
    )
    return make_figure(title, note, frame(drawn, show_short(top), axis), table)


def show_tokens(value: float | None) -> str:
    return show_short(None if value is None else float(round(value)))


# ---- workers and time lost -------------------------------------------------------------------------------------------


def draw_lanes(lanes: Mapping[str, Any]) -> str:
    """A lane for each worker: start-up, busy, idle, and where it was lost."""
    found, elapsed = lanes["lanes"], max(lanes["elapsed_s"], 1e-9)
    if not found:
        return make_unknown("Workers one by one", "no worker was asked for")
    begin = min(0.0, *(lane["began_s"] for lane in found))
    scale = WIDTH / (elapsed - begin)
    shapes: list[str] = []
    for place, lane in enumerate(found):
        shapes += _draw_lane(lane, place * LANE + (LANE - BAR) / 2, begin, scale, elapsed)
    names = "".join(f"<span title='{escape(lane['node'] or '')}'>{escape(lane['worker'])}</span>" for lane in found)
    drawn = plot("Workers one by one", f"what each of {len(found)} workers did", shapes, height=LANE * len(found))
    times = [show_time(begin + part * (elapsed - begin) / 4) if part or begin else "0" for part in range(5)]
    axis = "".join(f"<span>{escape(label)}</span>" for label in times)
    body = (
        f'<div class="plot lanes" style="--lanes: {len(found)}"><div class="y">{names}</div>{drawn}'
        f'<div class="x">{axis}</div></div>'
    )
    head = ["worker", "node", "start-up", "busy", "idle", "end"]
    rows = [
        [lane["worker"], lane["node"] or "unknown", *(show_time(lane[f"{name}_s"]) for name in ("startup", "busy", "idle")),
         (lane["end"] or "to the end").replace("_", " ")]
        for lane in found
    ]  # fmt: skip
    many = lanes["num_workers"] > len(found)
    note = (
        f"the {len(found)} of {lanes['num_workers']:,} with the most time not busy" if many else "busy: it has a batch"
    )
    legend = [("startup", "start-up"), ("busy", "busy"), ("idle", "idle"), ("lost", "lost")]
    return make_figure("Workers one by one", note, body, make_table(head, rows), legend)


def _draw_lane(lane: Mapping[str, Any], y: float, begin: float, scale: float, elapsed: float) -> list[str]:
    ended = elapsed if lane["ended_s"] is None else lane["ended_s"]
    ready = ended if lane["ready_s"] is None else lane["ready_s"]

    def bar(start: float, end: float, kind: str) -> str:
        return rect((start - begin) * scale, y, max(0.0, end - start) * scale, BAR, f"solid {kind}")

    parts = [bar(lane["began_s"], ready, "startup"), bar(ready, ended, "idle")]
    parts += [bar(start, end, "busy") for start, end in lane["busy"]]
    if lane["end"] in ("lost", "start_failed"):
        parts.append(rect((ended - begin) * scale - 2, y - 2, 4, BAR + 4, "solid lost", "lost"))
    return parts


def draw_shares(title: str, note: str, parts: Sequence[tuple[str, str, float | None, str]]) -> str:
    """One bar of (class, label, share, figure). What is unknown has no width, and says so in the legend."""
    x, shapes = 0.0, []
    for kind, label, share, figure in parts:
        width = WIDTH * (share or 0.0)
        if width > 0:
            shapes.append(rect(x, 0, width, HEIGHT, f"solid {kind}", f"{label}: {figure}"))
        x += width
    drawn = plot(title, ", ".join(f"{label} {figure}" for _, label, _, figure in parts), shapes)
    keys = "".join(
        f'<li><i class="{kind}"></i>{escape(label)}<b>{escape(figure)}</b></li>' for kind, label, _, figure in parts
    )
    return make_figure(title, note, f'<div class="shares">{drawn}</div><ul class="legend values">{keys}</ul>')
