"""A small process between the actor and the engine's processes, whose one duty is that none of these outlives its owner.

MPI ranks live in sessions of their own and daemons are born again under init, so killing a process group is not enough.
The keeper is the subreaper of everything that the engine starts: every orphan becomes its child, and nothing but its own
death takes one away from it. It ends them all with SIGKILL, until none is left, when its owner says so, when its owner is
gone by whatever signal, or when the engine's process has ended. Should the keeper itself be killed, the engine's process
dies with it (PR_SET_PDEATHSIG), and what is left is known by an environment variable: see `orphans`.

It forks away from its parent at once: Ray kills the direct children of an actor that ends in order, and this one must
live until its work is done. The engine's output goes through it into a log file that is turned over at a size.

Standard library only, nothing of ours, and Linux: it is run as a file (`python -I -S keeper.py`) and must be up in
milliseconds. On its control socket it says `keeper PID`, `engine PID`, `ended CODE`, one line each, and closes when
nothing is left; whatever it hears there, the end of file above all, means: end them.
"""

import argparse
import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# How often the owner is looked for where no end of file comes: a fork of it may hold the other end of the socket.
LOOK_S = 0.5
AGAIN_S = 0.02
MAX_LOG_BYTES = 16 * 2**20
READ_BYTES = 2**16


# ---- processes, as /proc tells of them -------------------------------------------------------------------------------


def read_stat(pid: int) -> tuple[str, int, int] | None:
    """(state, parent, start time in ticks since boot) of a process; None when there is none. A process is the same one
    only while its start time is."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1]), int(fields[19])


def is_alive(pid: int, started: int) -> bool:
    """Does this very process run? One that has ended and was not waited for does not."""
    stat = read_stat(pid)
    return stat is not None and stat[2] == started and stat[0] not in "ZX"


def list_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - names are enough


def list_descendants(root: int) -> list[int]:
    """All processes below `root` that still run, at any depth."""
    parents = {pid: stat for pid in list_pids() if (stat := read_stat(pid)) is not None}
    children: dict[int, list[int]] = {}
    for pid, (_, parent, _) in parents.items():
        children.setdefault(parent, []).append(pid)
    found, todo = [], [root]
    while todo:
        more = children.get(todo.pop(), [])
        found += more
        todo += more
    return [pid for pid in found if parents[pid][0] not in "ZX"]


def kill_all(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it went meanwhile
            os.kill(pid, signal.SIGKILL)


def set_option(option: int, value: int) -> None:
    """prctl(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


# ---- the log ---------------------------------------------------------------------------------------------------------


class TurnedLog:
    """A file that begins anew at a size; the one before is kept beside it as `NAME.1`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()

    def write(self, data: bytes) -> None:
        # A full disk must not end the engine: its output is of less worth than what it generates.
        with contextlib.suppress(OSError):
            os.write(self._fd, data)
            self._num_bytes += len(data)
            if self._num_bytes > MAX_LOG_BYTES:
                os.close(self._fd)
                self._path.replace(f"{self._path}.1")
                self._open()

    def _open(self) -> None:
        self._num_bytes = 0
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


# ---- the keeper ------------------------------------------------------------------------------------------------------


class Keeper:
    """See the module. `owner`: process id and start time of the process that it serves."""

    def __init__(self, control: socket.socket, owner: tuple[int, int], log: Path) -> None:
        self._control, self._owner, self._log = control, owner, TurnedLog(log)
        # SIGCHLD makes the select below return.
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def run(self, command: list[str], inherited: list[int]) -> None:
        """Until the engine's process has ended or nobody wants it, and then until nothing is left."""
        self._say(f"keeper {os.getpid()}")
        engine = start_engine(command, inherited)
        for fd in inherited:
            os.close(fd)
        assert engine.stdout is not None
        self._say(f"engine {engine.pid}")
        output = engine.stdout.fileno()
        self._watch(engine, output)
        self._end_all()
        # Its last words; whoever could still write is gone.
        while select.select([output], [], [], 0)[0] and self._copy(output):
            pass
        self._say(f"ended {engine.wait()}")

    def _watch(self, engine: "subprocess.Popen[bytes]", output: int) -> None:
        sources = [self._control.fileno(), self._wake, output]
        while engine.poll() is None and is_alive(*self._owner):
            ready, _, _ = select.select(sources, [], [], LOOK_S)
            if self._control.fileno() in ready:
                return
            if output in ready and not self._copy(output):
                sources.remove(output)  # closed by all that had it; the process may go on
            if self._wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake, READ_BYTES)
                self._reap(engine.pid)

    def _copy(self, output: int) -> bool:
        data = os.read(output, READ_BYTES)
        self._log.write(data)
        return bool(data)

    def _reap(self, engine_pid: int) -> None:
        """Wait for orphans that came to us and ended. The engine's own end is left to `poll`."""
        for pid in list_pids():
            stat = read_stat(pid)
            if stat is not None and stat[1] == os.getpid() and stat[0] == "Z" and pid != engine_pid:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    def _end_all(self) -> None:
        """A process that the kernel doesn't let go (a driver that hangs) is waited for as long as it takes: whoever waits
        for us has a limit of its own."""
        while left := list_descendants(os.getpid()):
            kill_all(left)
            time.sleep(AGAIN_S)

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the owner is gone: the next look finds that
            self._control.sendall(f"{line}\n".encode())


def start_engine(command: list[str], inherited: list[int]) -> "subprocess.Popen[bytes]":
    keeper = os.getpid()

    def die_with_keeper() -> None:
        set_option(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:  # it died before the line above
            os._exit(1)

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=inherited,
        preexec_fn=die_with_keeper,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--inherit", type=int, required=True)
    parser.add_argument("--owner", type=int, nargs=2, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    if os.fork():
        os._exit(0)
    os.setsid()
    set_option(PR_SET_CHILD_SUBREAPER, 1)
    control = socket.socket(fileno=given.control)
    control.set_inheritable(False)
    owner = (given.owner[0], given.owner[1])
    Keeper(control, owner, given.log).run(given.command, [given.inherit])
    sys.exit(0)


if __name__ == "__main__":
    main()
