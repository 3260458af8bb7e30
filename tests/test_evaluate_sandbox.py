"""What nobody trusts runs where it can do nothing: each of these programs tries, and says what came of it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs_util import wait_for
from sandboxes import needs_sandbox

from batchgen.errors import SpecError
from batchgen.evaluate.sandbox import Ended, Limits, Sandbox

pytestmark = needs_sandbox
LIMITS = Limits(
    cpu_s=3, wall_s=20.0, memory_bytes=512 * 2**20, max_processes=16, disk_bytes=8 * 2**20, output_bytes=2**20
)


def run(program: str, stdin: bytes = b"", **limits: float) -> Ended:
    values = {name: getattr(LIMITS, name) for name in Limits.__slots__}
    return Sandbox(Limits(**{**values, **limits})).run({"main.py": program.encode()}, stdin)


def count_ours(mark: str) -> int:
    """Processes of this machine whose environment or command holds the mark."""
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found += mark.encode() in (folder / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
    return found


def test_a_program_runs() -> None:
    ended = run("import sys; print(sys.stdin.read().upper()); sys.exit(3)", b"hello")
    assert ended == Ended("exited", 3, b"HELLO\n")


def test_the_callers_umask_does_not_hide_the_program() -> None:
    before = os.umask(0o077)
    try:
        assert run("print(1)").stdout == b"1\n"
    finally:
        os.umask(before)


FORK = """
import os, time
num = 0
try:
    while num < 200:
        if os.fork() == 0:
            time.sleep(60)
        num += 1
except OSError:
    pass
print(num, flush=True)
"""


def test_a_fork_bomb_goes_out() -> None:
    # Its children hold the output open, but they go when their first process does.
    ended = run(FORK)
    assert ended.reason == "exited"
    assert 0 < int(ended.stdout) < LIMITS.max_processes


def test_a_bomb_that_never_stops_is_killed_whole() -> None:
    mark = f"bomb-{time.monotonic_ns()}"
    sandbox = Sandbox(Limits(**{**{n: getattr(LIMITS, n) for n in Limits.__slots__}, "wall_s": 1.0}))
    program = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    spawn = f"import os, sys\nos.execv(sys.executable, [sys.executable, '-c', {program!r}, {mark!r}])\n"
    assert sandbox.run({"main.py": spawn.encode()}).reason == "timeout"
    wait_for(lambda: not count_ours(mark), what="its end")


def test_there_is_no_network() -> None:
    program = """
import socket
for family, address in ((socket.AF_INET, ("127.0.0.1", 22)), (socket.AF_INET, ("1.1.1.1", 53))):
    try:
        socket.socket(family).connect(address)
        print("connected")
    except OSError:
        print("refused")
print(*(name for _, name in socket.if_nameindex()))
"""
    assert run(program).stdout.split() == [b"refused", b"refused", b"lo"]


def test_the_disk_can_not_be_filled() -> None:
    program = """
import os
for folder in ("/tmp", "/dev/shm", "/dev", "/", "/program", "/usr", "/proc", "/var", "/run"):
    num = 0
    try:
        for number in range(100):
            with open(f"{folder}/file{number}", "wb") as file:
                file.write(bytes(2**20))
            num += 1
    except OSError:
        pass
    print(num)
"""
    counts = [int(word) for word in run(program).stdout.split()]
    assert counts[:2] == [8, 8]
    assert counts[2:] == [0] * 7


def test_one_file_is_bounded_too() -> None:
    ended = run("open('/tmp/f', 'wb').truncate(2**40)")
    assert ended.exit_code not in (0, None)


def test_an_endless_loop_ends() -> None:
    ended = run("while True: pass", cpu_s=1)
    assert ended.reason == "timeout" or ended.exit_code in (128 + 9, 128 + 24)


def test_a_sleeper_is_woken() -> None:
    began = time.monotonic()
    assert run("import time; time.sleep(600)", wall_s=1.0) == Ended("timeout", None, b"")
    assert time.monotonic() - began < 100


def test_one_that_closes_its_output_and_goes_on_is_ended() -> None:
    assert run("import os, time; os.close(1); time.sleep(600)", wall_s=1.0).reason == "timeout"


def test_endless_output_is_cut() -> None:
    ended = run("while True: print('x' * 10_000)")
    assert ended.reason == "too_much_output"
    assert len(ended.stdout) == LIMITS.output_bytes


def test_memory_is_bounded() -> None:
    assert run("bytearray(2**30)").exit_code == 1


def test_nothing_of_this_machine_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    program = """
import glob, os
for path in ("/etc/passwd", "/etc/hostname", "/home", "/work", "/var", "/sys", "/root/.ssh", "/root/.bashrc"):
    print(os.path.exists(path))
for path in [*glob.glob("/proc/[0-9]*/environ"), *glob.glob("/proc/[0-9]*/cmdline")]:
    try:
        print("hush" in open(path).read())
    except OSError:
        pass
print(os.getuid() == 0, "hush-hush" in str(os.environ), len(glob.glob("/proc/[0-9]*")) > 8)
"""
    assert set(run(program).stdout.split()) == {b"False"}


def test_it_can_not_make_namespaces_of_its_own() -> None:
    program = """
import ctypes
libc = ctypes.CDLL(None)
print(libc.unshare(0x10000000), libc.unshare(0x00020000), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))
"""
    assert run(program).stdout.split() == [b"-1", b"-1", b"-1"]


def test_a_daemon_does_not_outlive_it() -> None:
    mark = f"daemon-{time.monotonic_ns()}"
    program = f"""
import os, sys, subprocess
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", {mark!r}], stdout=subprocess.DEVNULL,
                 start_new_session=True)
print("gone")
"""
    assert run(program) == Ended("exited", 0, b"gone\n")
    wait_for(lambda: not count_ours(mark), what="its end")


def test_packages_are_there_when_asked_for() -> None:
    program = {"main.py": b"import numpy; print(numpy.arange(3).sum())"}
    limits = Limits(cpu_s=30, wall_s=60.0)
    assert Sandbox(limits, has_packages=True).run(program).stdout == b"3\n"
    assert Sandbox(limits).run(program).exit_code == 1


def test_a_machine_without_bubblewrap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SpecError, match="apt-get install bubblewrap"):
        Sandbox()


def test_a_program_does_not_outlive_a_killed_caller() -> None:
    mark = f"orphan-{time.monotonic_ns()}"
    program = (
        f"import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(600)', {mark!r}])"
    )
    code = (
        "from batchgen.evaluate.sandbox import Limits, Sandbox\n"
        f"Sandbox(Limits(wall_s=600)).run({{'main.py': {program!r}.encode()}})"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as caller:
        # The caller's own command line holds the mark too.
        wait_for(lambda: count_ours(f"time.sleep(600)\0{mark}"), what="the program")
        caller.kill()
    wait_for(lambda: not count_ours(mark), what="its end")
