"""The processes of the benchmark: where they run, how long they may, how they end, what CPU time they took.

The machine is cut in two: servers (the simulated engine, the S3 server) and this process on the first core, what is
measured on the others. A process inherits its parent's cores. Whatever was started is ended by its process group or by the
mark in its environment, never by a name: other people's processes live on this machine too.
"""

import contextlib
import os
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "BATCHGEN_BENCH"
SAMPLE_S = 0.25
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def split_cores() -> tuple[set[int], set[int]]:
    """(for servers and harness, for what is measured); the same one where there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    return {cores[0]}, set(cores[1:]) or {cores[0]}


@contextlib.contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """What is started inside runs there, and so does all that it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def run_server(command: Sequence[str], cores: set[int], env: Mapping[str, str], log: Path) -> Iterator[str]:
    """Start what prints one line when it is up, and ends when its standard input does; the line. Raises RuntimeError."""
    with log.open("ab") as errors, on_cores(cores):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=env, start_new_session=True
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline().decode().strip()
        if not line:
            raise RuntimeError(f"{Path(command[1]).name} did not start; see {log}")
        yield line
    finally:
        process.stdin.close()
        wait_or_kill(process, 20.0)
        process.stdout.close()


def wait_or_kill(process: "subprocess.Popen[bytes]", timeout_s: float) -> int | None:
    """The exit code; None when it had to be killed, with all of its group."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # the whole group has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_child(
    command: Sequence[str], cores: set[int], env: Mapping[str, str], log: Path, timeout_s: float
) -> str | None:
    """Run it to its end. Why it failed, or None."""
    with log.open("wb") as out, on_cores(cores):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=env, start_new_session=True
        )
    assert process.stdin is not None
    with process.stdin:
        code = wait_or_kill(process, timeout_s)
    if code is None:
        return f"not done after {timeout_s:.0f} s"
    if code == 0:
        return None
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1][:160] if lines else 'no output'}"


def make_env(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without its Ray and cloud settings, and with a mark that all descendants inherit."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    return {**kept, MARK: uuid.uuid4().hex, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **extra}


def list_marked(mark: str) -> list[Path]:
    """Folders of /proc of all processes with this mark in their environment."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes():
                found.append(folder)
        except OSError:
            continue  # it ended, or is not ours to read
    return found


def end_marked(mark: str) -> None:
    """A cluster that was killed leaves processes in sessions of their own."""
    for folder in list_marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(folder.name), signal.SIGKILL)


# ---- CPU time ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CpuTime:
    """Of one process: what it is called and what it has used so far (s)."""

    name: str
    used_s: float


class CpuMeter:
    """CPU time of all processes that carry a mark, by name, while it runs. Sampled: what a process uses in its last
    quarter of a second is missed."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._first: dict[int, float] = {}
        self._last: dict[int, CpuTime] = {}
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample_often, name="cpu-meter", daemon=True)

    def __enter__(self) -> "CpuMeter":
        self._sample()
        self._first = {pid: used.used_s for pid, used in self._last.items()}
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopped.set()
        self._thread.join()
        self._sample()

    def read(self) -> dict[str, float]:
        """{name: CPU seconds since the start}."""
        used: dict[str, float] = {}
        for pid, last in self._last.items():
            used[last.name] = used.get(last.name, 0.0) + last.used_s - self._first.get(pid, 0.0)
        return used

    def _sample_often(self) -> None:
        while not self._is_stopped.wait(SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        for folder in {*list_marked(self._mark), *(Path(f"/proc/{pid}") for pid in self._last)}:
            pid = int(folder.name)
            known = self._last.get(pid)
            try:
                self._last[pid] = read_cpu_time(folder, known.name if known else "")
            except OSError:
                continue  # it ended


def read_cpu_time(folder: Path, known_name: str) -> CpuTime:
    """Of the process with this folder of /proc. One that has ended and waits for its parent has no command line."""
    words = (folder / "cmdline").read_bytes().split(b"\0")
    scripts = [word for word in words if word.endswith(b".py")]
    name = Path((scripts or words)[0].decode(errors="replace")).name.partition("(")[0][:40] or known_name
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    return CpuTime(name, (int(fields[11]) + int(fields[12])) / TICKS_PER_S)
