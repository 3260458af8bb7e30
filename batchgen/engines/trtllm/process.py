"""One start of the engine's processes: the keeper, the engine's own process and whatever it spawns, and the socket to it.

`create_process` brings them up, `end` leaves none of them. The environment is put in order first, there is nothing to
read from and so no prompt to wait at, and all that they print goes to a log file of bounded size in a local folder; only
its path is ever quoted, because it may hold what a row holds.
"""

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import batchgen
from batchgen.engines.trtllm.env import make_environment
from batchgen.engines.trtllm.keeper import read_stat
from batchgen.engines.trtllm.orphans import MARK, Mark, make_mark, sweep_start
from batchgen.engines.trtllm.wire import Stop, ToEngine, pack
from batchgen.errors import EngineDied

log = logging.getLogger(__name__)

CHILD = (sys.executable, "-P", "-m", "batchgen.engines.trtllm.child")
KEEPER = Path(__file__).with_name("keeper.py")
# SIGKILL is at once, and the kernel may need this long to take 200 GB of mappings down.
END_S = 60.0
AGAIN_S = 0.01
# What the engine said before its keeper went may still be on its way.
LAST_WORDS_S = 1.0
MAX_LOGS = 20


class EngineProcess:
    """See the module. Belongs to one event loop. `reader`: what the engine's process says, to the end of file when it is
    gone. Made by `create_process`."""

    def __init__(
        self,
        mark: Mark,
        log_path: Path,
        reader: asyncio.StreamReader,
        data: asyncio.StreamWriter,
        control: socket.socket,
    ) -> None:
        self.reader, self.log_path, self.pids = reader, log_path, dict[str, int]()
        self._mark, self._data, self._control = mark, data, control
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._listening = asyncio.create_task(self._listen(), name=f"trtllm-keeper-{mark.start_id[:8]}")
        self._ending: asyncio.Task[None] | None = None

    def send(self, message: ToEngine) -> None:
        """Nothing is said of its arrival; to a process that is gone it is a no-op."""
        if not self._data.is_closing():
            self._data.write(pack(message))

    async def stop(self, timeout_s: float) -> None:
        """Ask it to shut down in order, and `end` it when it has or the time is over."""
        self.send(Stop())
        await asyncio.wait({self._gone}, timeout=timeout_s)
        await self.end()

    async def end(self) -> None:
        """SIGKILL to all of them, and wait until none is left. Raises EngineDied where the kernel keeps one. Goes on to
        its end when the caller is cancelled; twice is a no-op."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(), name="trtllm-end")
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            with contextlib.suppress(OSError):  # the keeper is gone already
                await loop.sock_sendall(self._control, b"end\n")
            await asyncio.wait({self._gone}, timeout=END_S)
            await self._sweep(time.monotonic() + END_S)
        finally:
            self._listening.cancel()
            await asyncio.wait({self._listening})
            self._control.close()
            self._data.close()
            with contextlib.suppress(OSError):  # it was reset by the other end
                await self._data.wait_closed()

    async def _sweep(self, give_up_at: float) -> None:
        """What a killed keeper left."""
        while left := await asyncio.to_thread(sweep_start, self._mark):
            if time.monotonic() > give_up_at:
                raise EngineDied(f"processes {left} of the engine can't be killed; this node needs a restart")
            await asyncio.sleep(AGAIN_S)

    async def _listen(self) -> None:
        """To the keeper, until it is gone; then nobody of the engine speaks any more, whoever may hold the socket."""
        loop, heard = asyncio.get_running_loop(), b""
        try:
            while data := await loop.sock_recv(self._control, 4096):
                *lines, heard = (heard + data).split(b"\n")
                for line in lines:
                    name, _, number = line.decode().partition(" ")
                    self.pids[name] = int(number)
        except OSError:
            log.debug("the keeper's socket was reset")
        self._gone.set_result(None)
        await asyncio.sleep(LAST_WORDS_S if not self.reader.at_eof() else 0)
        self.reader.feed_eof()


async def create_process(command: Sequence[str] = CHILD) -> EngineProcess:
    """Start them; `command` gets the number of its end of the socket as its last argument. Raises EngineDied when nothing
    can be started on this machine. A caller that is cancelled leaves nothing behind."""
    mark = make_mark()
    spawning = asyncio.create_task(asyncio.to_thread(spawn, command, mark))
    try:
        data, control, log_path = await asyncio.shield(spawning)
    except asyncio.CancelledError:
        for part in (await spawning)[:2]:
            part.close()  # the keeper sees the end of file
        raise
    reader, writer = await asyncio.open_connection(sock=data)
    return EngineProcess(mark, log_path, reader, writer, control)


def spawn(command: Sequence[str], mark: Mark) -> tuple[socket.socket, socket.socket, Path]:
    """(our end of the engine's socket, our end of the keeper's, the log). Blocks for some milliseconds."""
    log_path = create_log(mark.start_id)
    data, theirs = socket.socketpair()
    control, keepers = socket.socketpair()
    stat = read_stat(os.getpid())
    assert stat is not None, "a process that runs is in /proc"
    options = {"--control": keepers.fileno(), "--inherit": theirs.fileno(), "--log": log_path}
    given = [str(part) for pair in options.items() for part in pair]
    owner = ["--owner", str(os.getpid()), str(stat[2])]
    environ = make_environment(os.environ, MARK, str(mark), str(Path(batchgen.__file__).parents[1]))
    with theirs, keepers, log_path.open("ab") as output:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", str(KEEPER), *given, *owner, "--", *command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environ,
                pass_fds=(keepers.fileno(), theirs.fileno()),
                check=False,
            )
        except OSError as error:
            data.close()
            control.close()
            raise EngineDied(
                f"the engine's processes can't be started here ({type(error).__name__}: {error})"
            ) from error
    if done.returncode != 0:  # else it forked away and this was its first half
        data.close()
        control.close()
        raise EngineDied(f"the engine's keeper can't be started here (code {done.returncode}); its log: {log_path}")
    data.setblocking(False)
    control.setblocking(False)
    return data, control, log_path


def create_log(start_id: str) -> Path:
    """An empty file in a folder that only this user reads; the oldest of its neighbours go."""
    folder = Path(tempfile.gettempdir()) / f"batchgen-engines-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # somebody else took the name
        folder = Path(tempfile.mkdtemp(prefix="batchgen-engines-"))
    logs = sorted(path.name for path in folder.glob("*.log*"))  # a name begins with the time
    for name in logs[: max(0, len(logs) - MAX_LOGS + 1)]:
        (folder / name).unlink(missing_ok=True)
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{start_id[:8]}.log"
    path.touch(mode=0o600)
    return path
