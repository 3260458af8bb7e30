"""The keeper, the marks and the sweep, with plain processes in the engine's place."""

import ast
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from trtllm_util import is_zombie, until

from batchgen.engines.trtllm import keeper
from batchgen.engines.trtllm import process as processes
from batchgen.engines.trtllm.keeper import TurnedLog, is_alive, read_stat
from batchgen.engines.trtllm.orphans import MARK, Mark, make_mark, parse_mark, read_mark, sweep_orphans, sweep_start
from batchgen.engines.trtllm.process import EngineProcess, create_process
from batchgen.errors import EngineDied

# Starts a daemon as a daemon does (two forks, a session of its own), deaf to SIGTERM, and waits.
DAEMON = "import os,signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\n"  # noqa: E501
ENGINE = f"""
import subprocess, sys, time
print("noise", flush=True)
subprocess.run([sys.executable, "-S", "-c", {DAEMON + "time.sleep(60)"!r}])
print("up", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _own_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@asynccontextmanager
async def running(source: str = ENGINE) -> AsyncIterator[EngineProcess]:
    process = await create_process([sys.executable, "-S", "-c", source])
    try:
        yield process
    finally:
        await process.end()
        assert list_members(process) == []


def list_members(process: EngineProcess) -> list[int]:
    """Whoever has this start's mark."""
    mark = process._mark
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if read_mark(pid) == mark and not is_zombie(pid)]


async def until_up(process: EngineProcess) -> None:
    """The keeper, the engine and its daemon."""
    await until(lambda: "up" in process.log_path.read_text(), "the engine is up")
    await until(lambda: len(list_members(process)) == 3, "keeper, engine, daemon")


def run(test: Awaitable[None]) -> None:
    async def main() -> None:
        await test

    asyncio.run(main())


def test_it_needs_the_standard_library_alone() -> None:
    """And so starts in milliseconds, whatever the actor's process has loaded."""
    tree = ast.parse(Path(keeper.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def read_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_it_is_up_at_once() -> None:
    """After little work of its own; how long that takes is the machine's."""

    async def main() -> None:
        started = time.monotonic()
        async with running("import time; time.sleep(60)") as process:
            await until(lambda: "engine" in process.pids, "the keeper has started the engine")
            assert read_cpu_s(process.pids["keeper"]) < 0.3
            assert time.monotonic() - started < 5

    run(main())


def test_end_leaves_no_daemon() -> None:
    async def main() -> None:
        async with running() as process:
            await until_up(process)
            stat = read_stat(process.pids["keeper"])
            assert stat is not None
            assert stat[1] != os.getpid(), "Ray kills the children of an actor that ends"
            await asyncio.gather(process.end(), process.end())
            assert list_members(process) == []
            await process.end()

    run(main())


def test_the_engines_end_is_the_end_of_all() -> None:
    """Its socket closes too, also when a daemon has inherited it."""

    async def main() -> None:
        async with running() as process:
            await until_up(process)
            os.kill(process.pids["engine"], signal.SIGKILL)
            assert await asyncio.wait_for(process.reader.read(), 60) == b""
            await until(lambda: list_members(process) == [], "all are gone")

    run(main())


def test_a_killed_keepers_daemons_are_swept() -> None:
    async def main() -> None:
        async with running() as process:
            await until_up(process)
            os.kill(process.pids["keeper"], signal.SIGKILL)
            await until(lambda: len(list_members(process)) == 1, "the engine dies with it, the daemon does not")
            assert sweep_orphans() == [], "its owner lives, and may end it itself"

    run(main())


def test_a_stopped_engine_is_killed_too() -> None:
    async def main() -> None:
        async with running() as process:
            await until_up(process)
            for pid in list_members(process):
                os.kill(pid, signal.SIGSTOP) if pid != process.pids["keeper"] else None

    run(main())


def test_a_caller_that_is_cancelled_leaves_nothing() -> None:
    async def main() -> None:
        for pause_s in (0.0, 0.005, 0.02):
            creating = asyncio.ensure_future(create_process([sys.executable, "-S", "-c", ENGINE]))
            await asyncio.sleep(pause_s)
            if not creating.cancel():
                await creating.result().end()
        await until(lambda: not list_ours(), "nothing of them is left")

    def list_ours() -> list[int]:
        marks = {pid: read_mark(pid) for pid in (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))}
        return [pid for pid, mark in marks.items() if mark and mark.owner_pid == os.getpid() and not is_zombie(pid)]

    run(main())


def test_what_can_not_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def main() -> None:
        process = await create_process(["/no/such/program"])
        assert await asyncio.wait_for(process.reader.read(), 60) == b""
        assert "No such file" in process.log_path.read_text()
        await process.end()
        monkeypatch.setattr(processes, "KEEPER", tmp_path / "absent.py")
        with pytest.raises(EngineDied, match="keeper can't be started here"):
            await create_process(["true"])

    run(main())


# ---- marks


def start_marked(mark: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"], MARK: mark})


def test_the_sweep_ends_what_a_dead_owner_left_and_nothing_else() -> None:
    own = make_mark()
    gone = Mark(own.namespace, own.owner_pid, own.owner_started - 1, "x")  # our id, and another one's start time
    elsewhere = Mark("1", gone.owner_pid, gone.owner_started, "x")
    marks = [str(gone), str(own), str(elsewhere), "nonsense", "a:b:c:d", ""]
    processes = [start_marked(mark) for mark in marks]
    try:
        assert [process.pid for process in processes if read_mark(process.pid) is not None] == [
            process.pid for process in processes[:3]
        ]
        swept = sweep_orphans()
        assert processes[0].pid in swept
        assert not {process.pid for process in processes[1:]} & set(swept)
        assert processes[0].wait(60) == -signal.SIGKILL
        assert sweep_start(make_mark()) == []
        assert sweep_start(own) == [processes[1].pid]
        assert processes[1].wait(60) == -signal.SIGKILL
        assert [process.poll() for process in processes[2:]] == [None] * 4
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_mark_is_text_and_back() -> None:
    mark = make_mark()
    assert parse_mark(str(mark)) == mark
    assert mark.owner_pid == os.getpid()
    assert is_alive(mark.owner_pid, mark.owner_started)
    assert not is_alive(mark.owner_pid, mark.owner_started + 1)
    assert make_mark().start_id != mark.start_id


def test_a_process_that_was_not_waited_for_is_dead() -> None:
    process = subprocess.Popen(["true"])
    stat = read_stat(process.pid)
    assert stat is not None
    while (now := read_stat(process.pid)) is not None and now[0] != "Z":
        time.sleep(0.01)
    assert not is_alive(process.pid, stat[2])
    process.wait()
    assert read_stat(process.pid) is None


# ---- the log


def test_the_log_is_turned_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "MAX_LOG_BYTES", 100)
    path = tmp_path / "log"
    log = TurnedLog(path)
    for number in range(50):
        log.write(b"line %d\n" % number)
    assert path.stat().st_size <= 110
    assert (tmp_path / "log.1").stat().st_size <= 110
    assert path.read_text().endswith("line 49\n") or not path.read_text()


def test_a_log_is_for_its_user_and_old_ones_go(tmp_path: Path) -> None:
    paths = [processes.create_log(f"{number:08d}") for number in range(processes.MAX_LOGS + 5)]
    assert paths[-1].stat().st_mode & 0o777 == 0o600
    assert paths[-1].parent.stat().st_mode & 0o777 == 0o700
    assert paths[-1].parent.parent == tmp_path
    assert sum(path.exists() for path in paths) == processes.MAX_LOGS
    assert paths[-1].exists()
