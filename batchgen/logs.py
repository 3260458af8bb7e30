"""Structured logs: one event a line, with the ids of run, shard, batch and worker. The standard library's logging.

Everything goes through the logger `batchgen`, so whoever uses us as a library gets it with handlers of their own. An event
has a name that never changes (`worker_lost`, `shard_committed`), a sentence for people, and ids as fields. No prompt and no
generated text is ever in one: whoever logs gives ids and counts only. `docs/live.md` lists the events.
"""

import contextvars
import json
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from batchgen.names import parse_batch_id

LOGGER = logging.getLogger("batchgen")
# What a process's run is. Of the thread that drives it: several may run in one process.
_run: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("batchgen_run", default=None)


class Note(str):
    """A sentence for people that knows which event it tells of, and its ids: wherever a sentence goes, so can it."""

    event: str
    ids: dict[str, Any]

    def __new__(cls, text: str, event: str, **ids: Any) -> "Note":
        note = super().__new__(cls, text)
        note.event, note.ids = event, ids
        return note

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_note, (str(self), self.event, self.ids)


def _make_note(text: str, event: str, ids: dict[str, Any]) -> Note:
    return Note(text, event, **ids)


def note_batch(batch_id: str, worker_id: str, reason: str) -> Note:
    """A batch ended without a commit."""
    told = f"{batch_id} on {worker_id}: {reason}"
    return Note(told, "batch_failed", shard=parse_batch_id(batch_id)[0], batch=batch_id, worker=worker_id)


def note_restart(worker_id: str, reason: str) -> Note:
    return Note(f"{worker_id}'s engine died and is started anew: {reason}", "engine_restarted", worker=worker_id)


@contextmanager
def in_run(**ids: Any) -> Iterator[None]:
    """Every event of this thread meanwhile has these ids."""
    token = _run.set(ids)
    try:
        yield
    finally:
        _run.reset(token)


def log_event(event: str, message: str = "", *, level: int = logging.INFO, **ids: Any) -> None:
    """Of no effect, and next to no cost, where nobody listens."""
    if LOGGER.isEnabledFor(level):
        LOGGER.log(level, "%s", message or event, extra={"event": event, "ids": ids, "run": _run.get()})


def log_note(message: str, *, level: int, event: str) -> None:
    """A sentence; a `Note` under its own name and with its ids."""
    name, ids = (message.event, message.ids) if isinstance(message, Note) else (event, {})
    log_event(name, str(message), level=level, **ids)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: at, level, event, message, the run's ids, the event's own."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
            "message": record.getMessage(),
            **(getattr(record, "run", None) or {}),
            **getattr(record, "ids", {}),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


@contextmanager
def writing_json(stream: TextIO) -> Iterator[None]:
    """What is logged meanwhile goes there, a line an event."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    level, propagate = LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate


def name_fault(error: Exception) -> str:
    """Kind and place of an error that is nobody's purpose, without its text, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "batchgen" in Path(frame.filename).parts] or frames
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "an unknown place"
    return f"{type(error).__name__} in {where}"
