"""Figures as people read them. Unknown is 'unknown', never 0. Pure."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

UNKNOWN = "unknown"
# What a run left of itself (`driver.run_record`).
RunRecord = Mapping[str, Any]
MAX_TILE = 10_000_000
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k"))


def show(value: float | int | None, unit: str = "") -> str:
    """Three digits that count, or all of a whole number."""
    if value is None:
        return UNKNOWN
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def show_short(value: float | None) -> str:
    """For an axis: 12k, 3.4M."""
    if value is None:
        return UNKNOWN
    for size, prefix in PREFIXES:
        if abs(value) >= size:
            return f"{value / (1e3 if prefix == 'k' else size):.3g}{prefix}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show_tile(value: int | None) -> str:
    """Whole where it is short enough to stand large."""
    return show(value) if value is None or value < MAX_TILE else show_short(value)


def show_share(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return "0 %" if value == 0 else "< 0.1 %" if value < 0.001 else f"{100 * value:.3g} %" if value < 1 else "100 %"


def show_time(seconds: float | None) -> str:
    """A length of time: 340 us, 12 ms, 4.2 s, 3 min 20 s, 5 h 02 min, 38,148 h."""
    if seconds is None:
        return UNKNOWN
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us" if seconds else "0 s"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes < 60_000 else f"{minutes / 60:,.0f} h"


def show_amount(value: float | None) -> str:
    """Hours or money: of a small job they are next to nothing."""
    return "< 0.01" if value is not None and 0 < value < 0.01 else show(value)


def show_moment(at: float | None) -> str:
    return UNKNOWN if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def show_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def divide(part: float | None, whole: float | None) -> float | None:
    """None where either is unknown, or there is no whole."""
    return part / whole if part is not None and whole else None
