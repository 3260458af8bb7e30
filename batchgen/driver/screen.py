"""A run on a terminal: bar, rates, time left, workers and their state, errors. Values in, lines or a `rich` drawing out.

The same drawing serves `run` and `status --watch`. No prompt or generated text.
"""

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batchgen.queue.progress import Progress
from batchgen.queue.pulse import Snapshot, WorkerLine

MAX_WORKER_LINES = 12
STYLES = {"busy": "green", "idle": "yellow", "starting": "cyan", "leaving": "yellow", "silent": "bold red"}


def format_time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def format_eta(progress: Progress) -> str:
    """Time left and its interval; '-' before any row was finished."""
    if isinstance(progress, Snapshot):
        if progress.eta_low_s is None or progress.eta_s is None or progress.eta_low_s == progress.eta_high_s:
            return format_time(progress.eta_s)
        return (
            f"{format_time(progress.eta_s)} ({format_time(progress.eta_low_s)} to {format_time(progress.eta_high_s)})"
        )
    fresh = progress.num_rows_done - progress.num_rows_done_before
    if fresh <= 0 or progress.elapsed_s <= 0:
        return "-"
    return format_time((progress.num_rows - progress.num_rows_done) / (fresh / progress.elapsed_s))


def format_rate(progress: Progress) -> str:
    mean = progress.num_tokens / progress.elapsed_s if progress.elapsed_s > 0 else 0.0
    now = progress.tokens_per_s if isinstance(progress, Snapshot) else None
    return f"{mean:,.0f} tok/s" if now is None else f"{now:,.0f} tok/s (mean {mean:,.0f})"


def format_errors(progress: Progress) -> str:
    types = progress.error_types if isinstance(progress, Snapshot) else {}
    named = ", ".join(f"{name} {count:,}" for name, count in types.items())
    return f"{progress.num_rows_error:,}" + (f" ({named})" if named else "")


def format_workers(progress: Progress) -> str:
    states = progress.worker_states if isinstance(progress, Snapshot) else {}
    if states:
        told = ", ".join(f"{count:,} {state}" for state, count in sorted(states.items()))
    else:
        told = f"{progress.num_workers} up" + (f" + {progress.num_starting} starting" if progress.num_starting else "")
    return told + (f", {progress.num_lost:,} lost" if progress.num_lost else "")


def format_line(progress: Progress) -> str:
    """One plain line: rows, tokens/s, errors, workers, window, time left, GPU-hours."""
    gpu_hours = progress.gpu_hours if isinstance(progress, Snapshot) else None
    parts = [
        f"rows {progress.num_rows_done:,}/{progress.num_rows:,}",
        f"shards {progress.num_shards_done:,}/{progress.num_shards:,}",
        format_rate(progress),
        f"errors {format_errors(progress)}",
        f"workers {format_workers(progress)}",
        f"in flight {progress.num_inflight}/{progress.window}",
        f"ETA {format_eta(progress)}",
    ]
    return "  ".join([*parts, f"GPU-hours {gpu_hours:,.2f}"] if gpu_hours is not None else parts)


def make_screen(progress: Progress, heads: Sequence[str] = ()) -> RenderableType:
    """All of it, 6 to 20 lines high. `heads`: lines above."""
    gpu_hours = progress.gpu_hours if isinstance(progress, Snapshot) else None
    facts = [
        ("shards", f"{progress.num_shards_done:,} of {progress.num_shards:,}"),
        ("tokens", f"{format_rate(progress)}, {progress.num_tokens:,} in all"),
        ("time left", f"{format_eta(progress)} after {format_time(progress.elapsed_s)}"),
        ("in flight", f"{progress.num_inflight:,} of {progress.window:,}"),
        ("workers", format_workers(progress)),
        ("errors", format_errors(progress)),
    ]
    if gpu_hours is not None:
        facts.append(("GPU-hours", f"{gpu_hours:,.2f} in this run"))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in facts:
        table.add_row(name, Text(value))
    lines = progress.workers if isinstance(progress, Snapshot) else ()
    return Group(*(Text(head) for head in heads), _make_bar(progress), table, *_make_workers(lines, progress))


def _make_bar(progress: Progress) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    share = progress.num_rows_done / progress.num_rows if progress.num_rows else 1.0
    counted = f"{progress.num_rows_done:,} of {progress.num_rows:,} rows"
    bar = ProgressBar(total=max(1, progress.num_rows), completed=progress.num_rows_done, width=32)
    row.add_row(bar, Text(f"{share:.1%}"), Text(counted))
    return row


def _make_workers(lines: Sequence[WorkerLine], progress: Progress) -> Iterable[RenderableType]:
    if not lines:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("worker", "state", "shards", "in flight", "tok/s", "node"):
        table.add_column(name, justify="left" if name in ("worker", "state", "node") else "right", no_wrap=True)
    for line in lines[:MAX_WORKER_LINES]:
        rate = "-" if line.tokens_per_s is None else f"{line.tokens_per_s:,.0f}"
        inflight = f"{line.num_inflight}/{line.window}" if line.window else "-"
        state = Text(line.state, style=STYLES[line.state])
        table.add_row(line.worker, state, str(line.num_shards), inflight, rate, Text(line.node))
    yield table
    num_more = progress.num_workers + progress.num_starting - len(lines[:MAX_WORKER_LINES])
    if num_more > 0:
        yield Text(f"and {num_more:,} more workers", style="dim")
