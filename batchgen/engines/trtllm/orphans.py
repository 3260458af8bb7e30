"""Processes of engines whose actor is gone, found by a mark in their environment and ended.

The keeper leaves none behind unless it is itself killed; then its ranks hold their GPUs for good, and no parent leads to
them any more. All that an engine starts inherits `BATCHGEN_ENGINE`, which names the process that owns it, by the process
namespace, its id and its start time, and the one start of the engine. A process is ended only when its mark names an
owner of this namespace that is gone, or the very start that its living owner gives up. Linux; no dependency.
"""

import contextlib
import os
import signal
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from batchgen.engines.trtllm.keeper import is_alive, list_pids, read_stat

MARK = "BATCHGEN_ENGINE"
NAMESPACE = "/proc/self/ns/pid"


@dataclass(frozen=True, slots=True)
class Mark:
    """Who owns a process. `namespace`: process ids mean nothing in another one."""

    namespace: str
    owner_pid: int
    owner_started: int
    start_id: str

    def __str__(self) -> str:
        return f"{self.namespace}:{self.owner_pid}:{self.owner_started}:{self.start_id}"


def make_mark() -> Mark:
    """A new start, owned by this process."""
    stat = read_stat(os.getpid())
    assert stat is not None, "a process that runs is in /proc"
    return Mark(read_namespace(), os.getpid(), stat[2], uuid.uuid4().hex)


def parse_mark(text: str) -> Mark | None:
    """None for what is no mark of ours."""
    parts = text.split(":")
    if len(parts) != 4 or not (parts[1].isdigit() and parts[2].isdigit()):
        return None
    return Mark(parts[0], int(parts[1]), int(parts[2]), parts[3])


def read_namespace() -> str:
    """The number of this process namespace: 'pid:[4026531836]' without what would be in the mark's way."""
    return "".join(filter(str.isdigit, os.readlink(NAMESPACE)))  # noqa: PTH115 - no file is meant


def sweep_orphans() -> list[int]:
    """End every process whose owner is gone; their ids. Takes milliseconds; blocks."""
    here = read_namespace()

    def is_orphan(mark: Mark) -> bool:
        return mark.namespace == here and not is_alive(mark.owner_pid, mark.owner_started)

    return end_marked(is_orphan)


def sweep_start(own: Mark) -> list[int]:
    """End every process of one start; their ids."""
    return end_marked(lambda mark: mark == own)


def end_marked(is_meant: Callable[[Mark], bool]) -> list[int]:
    """SIGKILL to each process that runs and has a mark that is meant. This process is never among them."""
    return [pid for pid in list_pids() if pid != os.getpid() and end_if_marked(pid, is_meant)]


def end_if_marked(pid: int, is_meant: Callable[[Mark], bool]) -> bool:
    """The process is held by a descriptor before its mark is read, so that its id can't have passed to another one."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return False  # it ended meanwhile
    try:
        mark, stat = read_mark(pid), read_stat(pid)
        if mark is None or stat is None or stat[0] in "ZX" or not is_meant(mark):
            return False
        with contextlib.suppress(ProcessLookupError):  # it ends by itself
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        return True
    finally:
        os.close(fd)


def read_mark(pid: int) -> Mark | None:
    """None: it has none, it has ended, or it is another user's."""
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    name = f"{MARK}=".encode()
    found = next((entry for entry in environ.split(b"\0") if entry.startswith(name)), None)
    return None if found is None else parse_mark(found.removeprefix(name).decode(errors="replace"))
