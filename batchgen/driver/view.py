"""How a run looks: a live screen for people at a terminal, plain lines in a notebook or a pipe, events in a log.

Everything goes to standard error, so that standard output stays free for `--json`. No prompt or generated text. Each view
draws at most once a second, and only what is new to it: watching must cost a run nothing that could be measured.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from batchgen.driver.screen import format_line, make_screen
from batchgen.logs import log_event, log_note
from batchgen.queue.progress import Progress
from batchgen.queue.pulse import Snapshot


class View(Protocol):
    """Whoever watches a run."""

    def say(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...

    def show(self, progress: Progress) -> None:
        """Called at every turn of the run's loop; once a second or so with a `Snapshot`, which knows more."""
        ...


class QuietView:
    """Nobody watches; warnings still go to the logger `batchgen`."""

    def say(self, message: str) -> None:
        log_note(message, level=logging.INFO, event="said")

    def warn(self, message: str) -> None:
        log_note(message, level=logging.WARNING, event="warning")

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
        if isinstance(progress, Snapshot) and self._clock() >= self._next:
            self._next = self._clock() + self._interval_s
            self._write(f"batchgen: {format_line(progress)}")


class LogView(QuietView):
    """Events in the log (`logs`): progress every few seconds, all else as it comes."""

    def __init__(self, interval_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s, self._clock = interval_s, clock
        self._next = clock()

    def show(self, progress: Progress) -> None:
        if isinstance(progress, Snapshot) and self._clock() >= self._next:
            self._next = self._clock() + self._interval_s
            fields = {item.name: getattr(progress, item.name) for item in dataclasses.fields(progress)}
            del fields["workers"]  # they are counted by state; one by one they stand in the status object
            log_event("progress", format_line(progress), **fields)


# The screen takes at most one part in so many of a core: a draw takes 2 ms of CPU with one worker, 10 with a dozen.
SCREEN_PATIENCE = 800.0


class RichView:
    """A live screen with the same figures. Use as a context manager."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._next = clock()
        # Drawn when there is news, by the run's own thread: a thread that draws all the time takes 2 % of a core.
        self._live = Live("starting", console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> "RichView":
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False)

    def warn(self, message: str) -> None:
        self._console.print(f"warning: {message}", style="yellow", markup=False, highlight=False)

    def show(self, progress: Progress) -> None:
        if isinstance(progress, Snapshot) and (now := self._clock()) >= self._next:
            began = time.thread_time()
            self._live.update(make_screen(progress), refresh=True)
            self._next = now + SCREEN_PATIENCE * (time.thread_time() - began)


def print_rows(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    """A two-column table."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, value in rows:
        table.add_row(label, value)
    console.print(table, markup=False)
