"""How a run looks: a live line for people at a terminal, plain lines for a log or a pipe.

Everything goes to standard error, so that standard output stays free for `--json`. No prompt or generated text.
"""

import time
from collections.abc import Callable, Iterable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from batchgen.queue.progress import Progress


def format_eta(progress: Progress) -> str:
    """Time left at the mean rate of this run; '-' before any row was finished."""
    fresh = progress.num_rows_done - progress.num_rows_done_before
    if fresh <= 0 or progress.elapsed_s <= 0:
        return "-"
    left = (progress.num_rows - progress.num_rows_done) / (fresh / progress.elapsed_s)
    hours, rest = divmod(int(left), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def format_line(progress: Progress) -> str:
    """One plain line: rows, tokens/s, errors, workers, window, time left."""
    rate = progress.num_tokens / progress.elapsed_s if progress.elapsed_s > 0 else 0.0
    starting = f" + {progress.num_starting} starting" if progress.num_starting else ""
    return "  ".join(
        [
            f"rows {progress.num_rows_done:,}/{progress.num_rows:,}",
            f"shards {progress.num_shards_done:,}/{progress.num_shards:,}",
            f"{rate:,.0f} tok/s",
            f"errors {progress.num_rows_error:,}",
            f"workers {progress.num_workers} up{starting}",
            f"in flight {progress.num_inflight}/{progress.window}",
            f"ETA {format_eta(progress)}",
        ]
    )


class View(Protocol):
    """Whoever watches a run."""

    def say(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...

    def show(self, progress: Progress) -> None: ...


class LineView:
    """A line every few seconds."""

    def __init__(
        self, interval_s: float, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval_s, self._write, self._clock = interval_s, write, clock
        self._next = clock()

    def say(self, message: str) -> None:
        self._write(f"batchgen: {message}")

    def warn(self, message: str) -> None:
        self._write(f"batchgen: warning: {message}")

    def show(self, progress: Progress) -> None:
        if self._clock() >= self._next:
            self._next = self._clock() + self._interval_s
            self._write(f"batchgen: {format_line(progress)}")


class RichView:
    """A live bar with the same figures. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
        self._bar = Bar(*columns, TextColumn("{task.description}"), console=console, transient=True)
        self._task = self._bar.add_task("starting workers", total=None)

    def __enter__(self) -> "RichView":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False)

    def warn(self, message: str) -> None:
        self._console.print(f"warning: {message}", style="yellow", markup=False, highlight=False)

    def show(self, progress: Progress) -> None:
        self._bar.update(
            self._task, total=progress.num_rows, completed=progress.num_rows_done, description=format_line(progress)
        )


def print_rows(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    """A two-column table."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, value in rows:
        table.add_row(label, value)
    console.print(table, markup=False)
