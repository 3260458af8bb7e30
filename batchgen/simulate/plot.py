"""A virtual run over time, as text and as SVG: tokens a second and workers up. Pure."""

from collections.abc import Sequence
from html import escape
from itertools import pairwise

from batchgen.simulate.record import VirtualRun

BARS = " ▁▂▃▄▅▆▇█"
WIDTH, HEIGHT, MARGIN = 720, 240, 50


def bin_run(record: VirtualRun, count: int) -> tuple[list[float], list[float]]:
    """(tokens/s, workers up) in `count` equal parts of the run, each the mean over it."""
    width = max(record.makespan_s, 1e-9) / count
    tokens, ready = [0.0] * count, [0.0] * count
    for earlier, later in pairwise(record.moments):
        _spread(tokens, earlier.at, later.at, (later.tokens - earlier.tokens) / max(later.at - earlier.at, 1e-9), width)
        _spread(ready, earlier.at, later.at, float(earlier.num_ready), width)
    return [value / width for value in tokens], [value / width for value in ready]


def _spread(bins: list[float], start: float, end: float, rate: float, width: float) -> None:
    """Adds rate x time to each part that the span touches."""
    place = int(start / width)
    while start < end and place < len(bins):
        border = min(end, (place + 1) * width)
        bins[place] += rate * (border - start)
        start, place = border, place + 1


def make_sparkline(values: Sequence[float]) -> str:
    top = max(values, default=0.0)
    return "".join(BARS[round((len(BARS) - 1) * value / top)] if top else BARS[0] for value in values)


def make_text_plot(record: VirtualRun, width: int = 60) -> list[str]:
    tokens, ready = bin_run(record, width)
    return [
        f"tokens/s, up to {max(tokens):,.0f}   |{make_sparkline(tokens)}|",
        f"workers up, at most {max(ready):,.0f}   |{make_sparkline(ready)}|",
    ]


def make_svg(record: VirtualRun, title: str) -> str:
    tokens, ready = bin_run(record, 180)
    lines = [_make_line(tokens, "#1f6feb"), _make_line(ready, "#bf8700")]
    labels = [
        (MARGIN, 20, title),
        (
            MARGIN,
            HEIGHT + 2 * MARGIN - 12,
            f"blue: tokens/s, up to {max(tokens):,.0f}; ochre: workers up, to {max(ready):,.0f}",
        ),
        (MARGIN, HEIGHT + MARGIN + 16, "0"),
        (WIDTH, HEIGHT + MARGIN + 16, f"{record.makespan_s / 3600:.2f} h"),
    ]
    texts = [
        f'<text x="{x}" y="{y}" font-size="13" font-family="sans-serif">{escape(text)}</text>' for x, y, text in labels
    ]
    frame = f'<rect x="{MARGIN}" y="{MARGIN}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>'
    size = f'width="{WIDTH + 2 * MARGIN}" height="{HEIGHT + 2 * MARGIN}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', frame, *lines, *texts, "</svg>", ""])


def _make_line(values: Sequence[float], colour: str) -> str:
    top = max(values) or 1.0
    points = (
        f"{MARGIN + (place + 0.5) * WIDTH / len(values):.1f},{MARGIN + HEIGHT * (1 - value / top):.1f}"
        for place, value in enumerate(values)
    )
    return f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{" ".join(points)}"/>'
