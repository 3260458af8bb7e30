"""A comparison for people: Markdown, and one offline HTML page with the differences drawn. Pure."""

import html
import json
from collections.abc import Sequence
from typing import Any

from batchgen.evaluate.benchmarks import CARD
from batchgen.evaluate.compare import Line, line_to_json
from batchgen.evaluate.statistics import Comparison

SCORE_HEAD = (
    "benchmark", "against", "questions x samples", "base", "other", "difference", "interval", "McNemar p",
    "verdict", "card FP8 -> NVFP4",
)  # fmt: skip
SPEED_HEAD = (
    "benchmark", "run", "truncated", "errors", "no answer", "tokens a sample", "tokens/s", "tokens/s/GPU",
    "latency p50 / p99",
)  # fmt: skip
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 48rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
th { white-space: nowrap; font-weight: 500; }
pre { overflow-x: auto; font-size: .85rem; }
"""


def describe_verdict(comparison: Comparison) -> str:
    """One phrase. The difference is in points (a hundredth of all questions)."""
    size = f"{100 * abs(comparison.difference):.1f} ± {100 * comparison.interval.half_width:.1f} points"
    if comparison.verdict == "inconclusive":
        what = "questions" if comparison.interval.is_exact else "samples of each"
        return f"inconclusive, {comparison.num_more_samples:,} more {what} would tell"
    if comparison.verdict == "equivalent":
        return f"equivalent within {100 * comparison.margin:g} points"
    return f"{comparison.verdict} by {size}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _show(value: float | None, form: str = "{:,.0f}") -> str:
    return "-" if value is None else form.format(value)


def make_score_row(line: Line) -> list[str]:
    comparison, card = line.comparison, CARD.get(line.benchmark)
    clusters = comparison.num_clusters
    asked = f"{comparison.num_questions:,} x {line.base['sampling']['n']}"
    if line.base["sampling"]["n"] != line.other["sampling"]["n"]:
        asked += f" and {line.other['sampling']['n']}"
    if clusters != comparison.num_questions:
        asked += f", {clusters:,} problems"
    return [
        f"{line.title} ({line.name})" if line.name != line.benchmark else line.title,
        line.other_name,
        asked,
        f"{comparison.base:.3f}",
        f"{comparison.other:.3f}",
        _points(comparison.difference),
        f"{_points(comparison.interval.low)} to {_points(comparison.interval.high)}",
        _show(comparison.p_mcnemar, "{:.2g}"),
        describe_verdict(comparison),
        "-" if card is None else f"{card[0]:.3f} -> {card[1]:.3f}",
    ]


def make_speed_rows(lines: Sequence[Line], base_name: str) -> list[list[str]]:
    """One row a run; the base's once for each place."""
    rows: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        for name, summary in ((base_name, line.base), (line.other_name, line.other)):
            rows.setdefault((line.name, name), _make_speed_row(line.name, name, summary))
    return list(rows.values())


def _make_speed_row(place: str, name: str, summary: dict[str, Any]) -> list[str]:
    speed = summary["speed"]
    shares = [f"{100 * summary[key]:.1f} %" for key in ("truncated", "errors", "no_answer")]
    return [
        place,
        name,
        *shares,
        _show(summary["mean_completion_tokens"], "{:,.1f}"),
        _show(speed["tokens_per_s"]),
        _show(speed["tokens_per_s_per_gpu"]),
        f"{_show(speed['latency_p50_s'], '{:.2g}')} / {_show(speed['latency_p99_s'], '{:.2g}')} s",
    ]


def make_markdown(lines: Sequence[Line], base_name: str) -> str:
    return "\n\n".join([_make_table(SCORE_HEAD, [make_score_row(line) for line in lines]),
                        _make_table(SPEED_HEAD, make_speed_rows(lines, base_name)), make_legend(lines)]) + "\n"  # fmt: skip


def _make_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def make_legend(lines: Sequence[Line]) -> str:
    comparison = lines[0].comparison
    return (
        f"Scores are means over questions. Differences in points (other minus base), with the {comparison.confidence:.0%} "
        "interval of a paired bootstrap over questions (over problems where their questions belong together). Equivalent: "
        f"the whole interval is within ±{100 * comparison.margin:g} points, the margin stated beforehand; else worse or "
        "better where it leaves out 0. McNemar: exact, where each question was asked once. Tokens/s: completion tokens "
        "over the time in which any batch ran."
    )


def make_json(lines: Sequence[Line]) -> str:
    return json.dumps([line_to_json(line) for line in lines], indent=1)


# ---- the plot

WIDTH, LEFT, ROW = 760, 300, 28


def make_plot(lines: Sequence[Line]) -> str:
    """SVG: each difference with its interval, the margin as a band."""
    margin = lines[0].comparison.margin
    reach: float = 1.15 * max(
        [margin, *(max(-line.comparison.interval.low, line.comparison.interval.high) for line in lines)]
    )

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT) * (value + reach) / (2 * reach)

    height = ROW * (len(lines) + 1)
    parts = [
        f'<rect x="{x(-margin):.1f}" y="0" width="{x(margin) - x(-margin):.1f}" height="{height - ROW}" fill="#4a98"/>',
        f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{height - ROW}" stroke="currentColor" stroke-dasharray="3"/>',
    ]
    for number, line in enumerate(lines):
        parts += _draw_line(line, ROW * number + ROW / 2, x)
    label = f"difference in points; band: ±{100 * margin:g}"
    parts.append(f'<text x="{x(0):.1f}" y="{height - 8}" text-anchor="middle">{label}</text>')
    style = 'font-family="system-ui, sans-serif" font-size="13" fill="currentColor"'
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" {style}>{"".join(parts)}</svg>'


def _draw_line(line: Line, y: float, x: Any) -> list[str]:
    low, high, middle = line.comparison.interval.low, line.comparison.interval.high, line.comparison.difference
    text = html.escape(f"{line.name}: {line.other_name} ({_points(middle)})")
    return [
        f'<text x="0" y="{y + 4:.1f}">{text}</text>',
        f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" stroke-width="2"/>',
        f'<circle cx="{x(middle):.1f}" cy="{y:.1f}" r="4"/>',
    ]


def make_html(lines: Sequence[Line], base_name: str) -> str:
    """One self-contained page; every value escaped."""
    tables = [
        _make_html_table(SCORE_HEAD, [make_score_row(line) for line in lines]),
        _make_html_table(SPEED_HEAD, make_speed_rows(lines, base_name)),
    ]
    title = f"{html.escape(base_name)} and {html.escape(', '.join(dict.fromkeys(line.other_name for line in lines)))}"
    style = STYLE.replace("48rem", "76rem")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>batchgen evaluate</title><style>{style}</style></head><body><h1>{title}</h1>{make_plot(lines)}"
        f"{''.join(tables)}<p>{html.escape(make_legend(lines))}</p></body></html>\n"
    )


def _make_html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
