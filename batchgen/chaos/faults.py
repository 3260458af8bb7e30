"""Where a run can be hit: every durable step by its name, and one fault at one of them. Ships, so that `batchgen chaos`
and users' own tests can end a process exactly there.

A `Fault` is a value: at the nth time that a process takes a step, die before it, after it or half way through it, or lose
the reply of what was done. `FaultClient` stands between a process and a store, `FaultEngine` between a worker and its
engine; both count steps and know nothing of what the process does. How to die is the caller's: SIGKILL, or a simulation's
own way. `docs/crash_points.md` says what each of them costs.
"""

import os
import signal
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from batchgen.engines import wrapping_engines
from batchgen.engines.base import Peeking
from batchgen.errors import RequestFailed, SpecError, StorageError
from batchgen.records import Generation, Request, RowId
from batchgen.stores.base import Client, FileInfo, StoreFile
from batchgen.stores.local import TEMPORARY_FOLDER
from batchgen.stores.opening import open_real_client, opening_through

Step = Literal["list", "plan", "lease", "read", "generate", "journal", "create", "stats", "manifest", "success"]
When = Literal["before", "after", "torn", "lost_reply"]
STEPS: tuple[Step, ...] = get_args(Step)
WHENS: tuple[When, ...] = get_args(When)

# What a path of the output folder is to a crash, by how it begins; the first that fits.
_WRITES: tuple[tuple[str, Step], ...] = (
    ("_batchgen/spec.json", "plan"),
    ("_batchgen/plan/", "plan"),
    ("_batchgen/lease/", "lease"),
    ("_batchgen/journal/", "journal"),
    ("data/", "create"),
    ("batch_stats/", "stats"),
    ("_batchgen/committed.parquet", "manifest"),
    ("report.", "manifest"),
    ("manifest.json", "manifest"),
    ("_SUCCESS", "success"),
)


@dataclass(frozen=True, slots=True)
class Fault:
    """`nth` counts from 1, in one process. `when`: die before the step, after it, or `torn` with half of its bytes sent; or
    go on with the reply of what was done lost."""

    step: Step
    when: When
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.step}:{self.when}:{self.nth}"


def parse_fault(text: str) -> Fault:
    """From `step:when:nth`. Raises SpecError."""
    step, _, rest = text.partition(":")
    when, _, nth = rest.partition(":")
    if step not in STEPS or when not in WHENS or not nth.isdigit() or nth == "0":
        raise SpecError(
            f"fault '{text}': write step:when:nth, with a step of {', '.join(STEPS)} and when one of {', '.join(WHENS)}"
        )
    return Fault(step, when, int(nth))


def find_impossible(step: Step, when: When) -> str | None:
    """Why there can be no such fault, or None."""
    if when == "torn" and step in ("list", "read"):
        return "it writes nothing; a body that breaks off is an error of the store"
    if when == "torn" and step == "generate":
        return "an answer reaches the worker whole or not at all"
    return None


def name_step(operation: str, path: str) -> Step | None:
    """The step that an operation of the store is; `path` below the output folder, or a full name outside of it."""
    if operation == "list":
        return "list"
    if operation == "read":
        return "read"
    return next((step for start, step in _WRITES if path.startswith(start)), None)


def die_now() -> None:
    """As SIGKILL ends a process: nothing is flushed, nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


class Striker:
    """Counts the steps of one process and strikes once. `count` outlives the fault."""

    def __init__(self, fault: Fault | None, die: Callable[[], None] = die_now) -> None:
        self._fault, self._die = fault, die
        self.count: Counter[str] = Counter()

    def choose(self, step: Step | None) -> When | None:
        """What befalls the step that is about to be taken."""
        if step is None:
            return None
        self.count[step] += 1
        fault = self._fault
        return fault.when if fault and (fault.step, fault.nth) == (step, self.count[step]) else None

    def die(self) -> None:
        self._die()


class FaultClient:
    """A store's client, through which a fault strikes. `root` is the output folder's."""

    def __init__(self, client: Client, root: str, striker: Striker) -> None:
        self._client, self._root, self._striker = client, root.rstrip("/"), striker
        self.can_replace = client.can_replace

    def find(self, folder: str) -> Iterator[FileInfo]:
        return iter(self._take("list", folder, lambda: list(self._client.find(folder))))

    def list_folder(self, folder: str) -> tuple[list[FileInfo], list[str]]:
        found: tuple[list[FileInfo], list[str]] = self._take("list", folder, lambda: self._client.list_folder(folder))
        return found

    def info(self, name: str) -> FileInfo | None:
        return self._client.info(name)

    def read(self, name: str) -> tuple[bytes, str]:
        found: tuple[bytes, str] = self._take("read", name, lambda: self._client.read(name))
        return found

    def read_range(self, name: str, start: int, num_bytes: int, version: str) -> bytes:
        return self._client.read_range(name, start, num_bytes, version)

    def open(self, name: str, block_bytes: int) -> StoreFile:
        file: StoreFile = self._take("read", name, lambda: self._client.open(name, block_bytes))
        return file

    def write(self, name: str, data: bytes | memoryview, if_version: str | None) -> str:
        def again() -> str:
            self._client.write(name, data, if_version)
            return self._client.write(name, data, if_version)  # as a client whose reply was lost tries again

        version: str = self._take("write", name, lambda: self._client.write(name, data, if_version), data, again)
        return version

    def delete(self, name: str) -> None:
        self._take("delete", name, lambda: self._client.delete(name), b"", lambda: self._client.delete(name))

    def _take(
        self,
        operation: str,
        name: str,
        act: Callable[[], Any],
        data: bytes | memoryview = b"",
        again: Callable[[], Any] | None = None,
    ) -> Any:
        when = self._striker.choose(name_step(operation, self._below(name)))
        if when == "torn":
            self._tear(data)
        if when in ("before", "torn"):
            self._striker.die()
        if when == "lost_reply":
            if again is not None:
                return again()
            raise StorageError(f"cannot {operation} {name}: its reply was lost on purpose; start it again")
        done = act()
        if when == "after":
            self._striker.die()
        return done

    def _below(self, name: str) -> str:
        return name[len(self._root) + 1 :] if name.startswith(f"{self._root}/") else name

    def _tear(self, data: bytes | memoryview) -> None:
        """Half of the bytes lie where a local disk keeps what has no name yet. (On S3 they would be parts of an upload that
        nobody completes, which no listing shows.)"""
        folder = Path(self._root) / TEMPORARY_FOLDER
        if folder.is_dir():
            (folder / uuid.uuid4().hex).write_bytes(bytes(data)[: len(data) // 2])


@contextmanager
def striking(fault: Fault | None, root: str, die: Callable[[], None] = die_now) -> Iterator[Striker]:
    """This process meets the fault: all clients and engines that it makes meanwhile are watched. `root`: as
    `Storage.root` of the output folder."""
    striker = Striker(fault, die)
    with (
        opening_through(lambda url: FaultClient(open_real_client(url), root, striker)),
        wrapping_engines(lambda engine: FaultEngine(engine, striker)),
    ):
        yield striker


class FaultEngine:
    """An engine through which a fault strikes; all else is the engine's own."""

    def __init__(self, engine: Any, striker: Striker) -> None:
        self._engine, self._striker = engine, striker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def peek(self, row_id: RowId) -> Generation | None:
        return self._engine.peek(row_id) if isinstance(self._engine, Peeking) else None

    async def generate(self, request: Request) -> Generation:
        when = self._striker.choose("generate")
        if when == "before":
            self._striker.die()
        answer: Generation = await self._engine.generate(request)
        if when == "after":
            self._striker.die()
        if when == "lost_reply":
            raise RequestFailed("engine_error", "its answer was lost on purpose")
        return answer
