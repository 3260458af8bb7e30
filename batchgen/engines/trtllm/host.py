"""What the engine's process asks of Linux: to die with its parent, to keep its descendants, to count their memory.

MPI puts ranks into sessions of their own, so neither a process group nor a session holds them all. This process becomes
the reaper of its descendants instead: whoever of them loses its parent is still found below it, for as long as it lives.
"""

import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

from batchgen.engines.trtllm.keeper import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    kill_all,
    list_descendants,
    set_option,
)

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def die_with_parent() -> None:
    """SIGKILL at the moment the parent is gone; at once, if it goes meanwhile. One that was gone before this is noticed
    by the end of the socket. The kernel means the thread of the parent that started this process."""
    parent = os.getppid()
    set_option(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def keep_descendants() -> None:
    set_option(PR_SET_CHILD_SUBREAPER, 1)


def point_stdout_at_stderr() -> None:
    """The vendor and its libraries print: for this process and all that it starts, stdout is stderr."""
    sys.stdout.flush()
    os.dup2(2, 1)


def read_rss_bytes(pids: Iterable[int]) -> int:
    """Resident memory of these processes together, shared pages counted once for each; those that are gone count 0."""
    total = 0
    for pid in pids:
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def read_group_rss_bytes() -> int:
    """Of this process and all below it."""
    return read_rss_bytes([os.getpid(), *list_descendants(os.getpid())])


def kill_descendants() -> None:
    """SIGKILL to everything below this process, until nothing new is there."""
    killed: set[int] = set()
    while left := set(list_descendants(os.getpid())) - killed:
        kill_all(left)
        killed |= left
