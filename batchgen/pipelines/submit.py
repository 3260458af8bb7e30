"""Where attempts run: the `Submitter` seam, and the one for machines without Ray, a process for each attempt.

Submitting is idempotent: an id that is known already is not run again. A local attempt outlives the scheduler that started
it; whether it lives is seen in the store, by the lease that it holds on its run, so that any scheduler of the same machine
can go on with it.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from batchgen.driver.lease import Holder, get_machine, is_dead_here, read_holder
from batchgen.errors import BatchgenError
from batchgen.pipelines.orders import make_order_path, make_run_folder, make_started_path, make_submission_id
from batchgen.storage import Storage

Status = Literal["running", "ended", "unknown"]
# How long an attempt of another submitter may give no sign of life.
SILENCE_S = 600.0
# Ended processes that a scheduler remembers.
MAX_ENDED = 100


class SubmitterAway(BatchgenError):
    """It doesn't answer; nothing is known of what was asked. It will be asked again."""

    is_retryable = True


@dataclass(frozen=True, slots=True)
class Submission:
    """One attempt at one partition of a run of the pipeline with this folder."""

    folder: Storage
    name: str
    key: str
    attempt: int
    order: str
    partition: str = ""

    @property
    def id(self) -> str:
        return make_submission_id(self.name, self.key, self.partition, self.attempt)

    @property
    def arguments(self) -> list[str]:
        """Of `python -m batchgen.cli`."""
        return ["pipelines", "execute", self.folder.url(make_order_path(self.order))]


class Submitter(Protocol):
    """`kind` says where attempts belong: only a submitter of the same kind knows of them. Every method may raise
    SubmitterAway."""

    @property
    def kind(self) -> str: ...

    def submit(self, submission: Submission) -> None:
        """Does nothing for an id that is known."""

    def get_status(self, submission: Submission) -> Status:
        """ended: its process is gone, whatever became of it; unknown: never submitted, or forgotten."""

    def stop(self, submission: Submission) -> None:
        """Ask it to end; it may take a while, or be gone already."""


class LifeSigns:
    """Does an attempt's process live, by its lease? One on another machine is told by its heartbeats, so the first look
    says that it does."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._beats: dict[str, tuple[tuple[int, int], float]] = {}

    def read_status(self, submission: Submission) -> Status:
        folder, key, partition = submission.folder, submission.key, submission.partition
        if folder.info(make_started_path(key, partition, submission.attempt)) is None:
            return "unknown"
        holder = read_holder(Storage(folder.url(make_run_folder(key, partition))))
        return "running" if holder is not None and self._is_alive(submission.id, holder) else "ended"

    def _is_alive(self, name: str, holder: Holder) -> bool:
        if holder.has_ended or is_dead_here(holder):
            self._beats.pop(name, None)
            return False
        beat, now = (holder.epoch, holder.beat), self._monotonic()
        known, since = self._beats.get(name, (None, now))
        if known != beat:
            self._beats[name] = (beat, now)
            return True
        return now - since < holder.ttl_s


class LocalSubmitter:
    """A process of this machine for each attempt. What it says goes to a file, because a pipe would break with us."""

    kind = "local"

    def __init__(self, signs: LifeSigns) -> None:
        self._signs = signs
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def submit(self, submission: Submission) -> None:
        if submission.id in self._children:
            return
        log = get_log_path(submission.id)
        command = [sys.executable, "-m", "batchgen.cli", *submission.arguments]
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as out:
                self._children[submission.id] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
                )
            self._forget()
        except OSError as error:  # no room for its log, no more processes: other pipelines go on meanwhile
            raise SubmitterAway(f"{submission.id} can't be started here: {error}") from error

    def _forget(self) -> None:
        """Of those that ended, all but the newest: their ends are in the log."""
        ended = [name for name, child in self._children.items() if child.poll() is not None]
        for name in ended[:-MAX_ENDED]:
            del self._children[name]

    def get_status(self, submission: Submission) -> Status:
        child = self._children.get(submission.id)
        if child is not None:
            return "running" if child.poll() is None else "ended"
        return self._signs.read_status(submission)

    def stop(self, submission: Submission) -> None:
        run_folder = make_run_folder(submission.key, submission.partition)
        holder = read_holder(Storage(submission.folder.url(run_folder)))
        if holder is not None and holder.machine == get_machine() and not holder.has_ended and not is_dead_here(holder):
            with suppress(ProcessLookupError):  # it ended just now
                os.kill(holder.pid, signal.SIGTERM)


def get_log_path(submission_id: str) -> Path:
    """Where a local attempt writes what it says."""
    return Path(tempfile.gettempdir()) / f"batchgen-runs-{os.getuid()}" / f"{submission_id}.log"
