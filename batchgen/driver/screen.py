"""A run on a terminal: bar, rates, time left, workers and their state, errors. Values in, lines or a `rich` drawing out.

The same drawing serves `run` and `status --watch`. No prompt or generated text.
"""

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batchgen.queue.pulse import Snapshot

MAX_WORKER_LINES = 12
STYLES = {"busy": "green", "idle": "yellow", "starting": "cyan", "leaving": "yellow", "silent": "bold red"}


def format_time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def format_eta(seen: Snapshot) -> str:
    """Time left and its interval; '-' where it is unknown."""
    if seen.eta_low_s is None or seen.eta_s is None or seen.eta_low_s == seen.eta_high_s:
        return format_time(seen.eta_s)
    return f"{format_time(seen.eta_s)} ({format_time(seen.eta_low_s)} to {format_time(seen.eta_high_s)})"


def format_rate(seen: Snapshot) -> str:
    mean = seen.num_tokens / seen.elapsed_s if seen.elapsed_s > 0 else 0.0
    now = seen.tokens_per_s
    return f"{mean:,.0f} tok/s" if now is None else f"{now:,.0f} tok/s (mean {mean:,.0f})"


def format_errors(seen: Snapshot) -> str:
    named = ", ".join(f"{name} {count:,}" for name, count in seen.error_types.items())
    return f"{seen.num_rows_error:,}" + (f" ({named})" if named else "")


def format_workers(seen: Snapshot) -> str:
    if seen.worker_states:
        told = ", ".join(f"{count:,} {state}" for state, count in sorted(seen.worker_states.items()))
    else:  # the last word of a run has none
        told = f"{seen.num_workers} up" + (f" + {seen.num_starting} starting" if seen.num_starting else "")
    return told + (f", {seen.num_lost:,} lost" if seen.num_lost else "")


def format_hours(seen: Snapshot) -> str:
    """GPU-hours of the run so far and, where they have a price, their cost; '' where they are unknown."""
    if seen.gpu_hours is None:
        return ""
    return f"{seen.gpu_hours:,.2f}" + (f" (cost {seen.cost:,.2f})" if seen.cost is not None else "")


def format_line(seen: Snapshot) -> str:
    """One plain line: rows, tokens/s, errors, workers, window, time left, GPU-hours and cost."""
    parts = [
        f"rows {seen.num_rows_done:,}/{seen.num_rows:,}",
        f"shards {seen.num_shards_done:,}/{seen.num_shards:,}",
        format_rate(seen),
        f"errors {format_errors(seen)}",
        f"workers {format_workers(seen)}",
        f"in flight {seen.num_inflight}/{seen.window}",
        f"ETA {format_eta(seen)}",
    ]
    hours = format_hours(seen)
    return "  ".join([*parts, f"GPU-hours {hours}"] if hours else parts)


def make_screen(seen: Snapshot, heads: Sequence[str] = ()) -> RenderableType:
    """All of it, 6 to 20 lines high. `heads`: lines above."""
    facts = [
        ("shards", f"{seen.num_shards_done:,} of {seen.num_shards:,}"),
        ("tokens", f"{format_rate(seen)}, {seen.num_tokens:,} in all"),
        ("time left", f"{format_eta(seen)} after {format_time(seen.elapsed_s)}"),
        ("in flight", f"{seen.num_inflight:,} of {seen.window:,}"),
        ("workers", format_workers(seen)),
        ("errors", format_errors(seen)),
    ]
    if hours := format_hours(seen):
        facts.append(("GPU-hours", f"{hours} in this run"))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in facts:
        table.add_row(name, Text(value))
    return Group(*(Text(head) for head in heads), _make_bar(seen), table, *_make_workers(seen))


def _make_bar(seen: Snapshot) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    share = seen.num_rows_done / seen.num_rows if seen.num_rows else 1.0
    counted = f"{seen.num_rows_done:,} of {seen.num_rows:,} rows"
    bar = ProgressBar(total=max(1, seen.num_rows), completed=seen.num_rows_done, width=32)
    row.add_row(bar, Text(f"{share:.1%}"), Text(counted))
    return row


def _make_workers(seen: Snapshot) -> Iterable[RenderableType]:
    if not seen.workers:
        return
    lines = seen.workers[:MAX_WORKER_LINES]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("worker", "state", "shards", "in flight", "tok/s", "node"):
        table.add_column(name, justify="left" if name in ("worker", "state", "node") else "right", no_wrap=True)
    for line in lines:
        rate = "-" if line.tokens_per_s is None else f"{line.tokens_per_s:,.0f}"
        inflight = f"{line.num_inflight}/{line.window}" if line.window else "-"
        state = Text(line.state, style=STYLES[line.state])
        table.add_row(line.worker, state, str(line.num_shards), inflight, rate, Text(line.node))
    yield table
    num_more = seen.num_workers + seen.num_starting - len(lines)
    if num_more > 0:
        yield Text(f"and {num_more:,} more workers", style="dim")
