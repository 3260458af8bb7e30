"""A pipeline's log in its store: events as objects with running numbers, each only ever created if absent.

`append` writes number n + 1 having read n, and says whether it was written: False when another scheduler was first. Then
what it wrote is folded in instead, and the decision is to be taken anew. So the log is one line of events, decided one
after the other, however many write to it. `history.json` is a copy of the history so far: a cache that spares reading the
whole log; an old one, a missing or a damaged one costs time and nothing else.

Each event is a small object that stays for ever: two for each run, two or more for each of its partitions, and its hooks'.
"""

import json
import uuid

from batchgen.errors import AlreadyExists, NotFound, OutputError
from batchgen.pipelines.events import Event, dump_event, parse_event
from batchgen.pipelines.history import History, dump_history, parse_history
from batchgen.storage import Storage

COPY = "history.json"
# Events between two copies of the history: what a scheduler has to read one by one when it starts. More where the copy is
# long, because a run has many partitions: one event for so many of them.
COPY_INTERVAL, PARTS_PER_EVENT = 100, 50


class Log:
    """One reader's view. `catch_up` first; belongs to one thread."""

    def __init__(self, storage: Storage) -> None:
        """`storage`: the pipeline's own folder."""
        self._storage = storage
        self.history = self._read_copy()
        self._copied = self.history.length

    def catch_up(self) -> History:
        """With what others have written. Raises StorageError, OutputError where an event is damaged."""
        while (found := self._read(self.history.length + 1)) is not None:
            self._apply(found[0])
        return self.history

    def append(self, event: Event) -> bool:
        """Was it written, as the next one? If not, `history` has what came instead. Raises StorageError: it may have been
        written or not; `catch_up` will tell."""
        number, token = self.history.length + 1, uuid.uuid4().hex
        try:
            self._storage.create(make_path(number), json.dumps({**dump_event(event), "token": token}).encode())
        except AlreadyExists:
            found = self._read(number)
            if found is None:
                raise OutputError(
                    f"{self._storage.url(make_path(number))}: was deleted; restore it, or start with another state"
                ) from None
            self._apply(found[0])
            return found[1] == token  # our own after a lost reply
        self._apply(event)
        return True

    def _apply(self, event: Event) -> None:
        self.history.apply(event)
        if self.history.length - self._copied < COPY_INTERVAL:
            return
        num_parts = sum(len(run.parts) for run in self.history.runs.values())
        if self.history.length - self._copied >= num_parts / PARTS_PER_EVENT:
            self._storage.put(COPY, dump_history(self.history))
            self._copied = self.history.length

    def _read(self, number: int) -> tuple[Event, str] | None:
        """(event, token of who wrote it); None where the log ends."""
        path = make_path(number)
        try:
            raw = self._storage.read_bytes(path)
        except NotFound:
            return None
        try:
            fields = json.loads(raw)
            token = str(fields.pop("token"))
            return parse_event(json.dumps(fields).encode()), token
        except (ValueError, KeyError, AttributeError) as error:
            raise OutputError(
                f"{self._storage.url(path)}: is damaged, or of another version; restore it from a backup of the store"
            ) from error

    def _read_copy(self) -> History:
        try:
            return parse_history(self._storage.read_bytes(COPY))
        except (NotFound, ValueError):
            return History()


def make_path(number: int) -> str:
    return f"log/{number:09d}.json"
