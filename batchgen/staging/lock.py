"""One process a node at a time: `flock` on a file, in which its holder writes how far it is for those who wait.

The kernel drops the lock when its holder dies, however that ends, so nothing is ever to be cleaned up by hand. The file
stays: deleting it would make two locks of one.
"""

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from batchgen.errors import Cancelled
from batchgen.staging.plan import format_bytes
from batchgen.stores.base import mapped_os_errors

LOG_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class StageProgress:
    """`num_bytes` and `num_bytes_done` are None where nobody knows. `holder`: the process that copies, if not
    we; 0 where it didn't say yet."""

    source: str
    num_bytes: int | None
    num_bytes_done: int | None
    holder: int | None = None

    def describe(self) -> str:
        done, total = self.num_bytes_done, self.num_bytes
        amount = "" if done is None or not total else f": {format_bytes(done)} of {format_bytes(total)}"
        if self.holder is not None:
            who = f"process {self.holder}" if self.holder else "another process"
            return f"waiting for {who}, which copies {self.source}{amount}"
        return f"copying {self.source}{amount}"


OnProgress = Callable[[StageProgress], None]
Tell = Callable[[int, int], None]
"""Takes bytes done and bytes in all."""


@contextlib.contextmanager
def stage_lock(
    path: Path, source: str, poll_s: float, on_progress: OnProgress, stop: threading.Event
) -> Iterator[Tell]:
    """Gives what tells the waiting ones how far we are. Raises Cancelled when `stop` is set while it waits."""
    with mapped_os_errors(str(path), "write"):
        file = path.open("a+b", buffering=0)
    with file:
        while not _try_lock(file.fileno()):
            on_progress(_read_progress(path, source))
            if stop.wait(poll_s):
                raise Cancelled(f"waiting for {source} was stopped")
        try:
            _write_progress(file.fileno(), source, 0, 0)
            yield lambda done, total: _write_progress(file.fileno(), source, done, total)
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing alone leaves it to a child that was forked meanwhile


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_progress(handle: int, source: str, done: int, total: int) -> None:
    text = json.dumps(asdict(StageProgress(source, total, done, os.getpid()))).encode()
    with contextlib.suppress(OSError):  # on a full disk there is worse to tell than this
        os.ftruncate(handle, 0)
        os.write(handle, text)  # opened to append


def _read_progress(path: Path, source: str) -> StageProgress:
    try:
        return StageProgress(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):  # it is being written
        return StageProgress(source, None, None, holder=0)


def make_log_progress(
    say: Callable[[str], None], interval_s: float = LOG_INTERVAL_S, clock: Callable[[], float] = time.monotonic
) -> OnProgress:
    """A line now and then."""
    due = clock()

    def show(progress: StageProgress) -> None:
        nonlocal due
        if clock() >= due:
            due = clock() + interval_s
            say(f"batchgen: {progress.describe()}")

    return show
