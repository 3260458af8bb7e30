"""Runs a program that nobody trusts: bubblewrap's namespaces, resource limits, a clock and a bound on what it may print.

Inside there is no network, no other process, no file of this machine but the system's libraries under /usr, Python and
what is named in `readable`, all read-only; one small /tmp is writable. Limits are set inside, on the program and all that
it starts: CPU time and memory of each process, the number of processes, the size of files. When the program ends or its
time is up, its process namespace goes with everything in it. What is not bounded as a whole is memory: at most that of one
process times their number.

The kernel exempts root from the limit on processes, also inside a user namespace of root's (a fork bomb of 4,500 processes
told us). So root first becomes a user that nobody else is, and for that user to reach Python and the program, wherever
they lie, a first bubblewrap of root's puts them at the same paths under folders that all may enter.
"""

import os
import secrets
import select
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from batchgen.errors import SpecError

Reason = Literal["exited", "timeout", "too_much_output"]
PROGRAM_FOLDER = "/program"
PACKAGES_FOLDER = "/packages"
_READ_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Limits:
    """`cpu_s` and `memory_bytes`: of each process. `disk_bytes`: of /tmp, and of any one file. `output_bytes`: printed."""

    cpu_s: int = 10
    wall_s: float = 20.0
    memory_bytes: int = 2 * 2**30
    max_processes: int = 16
    disk_bytes: int = 64 * 2**20
    output_bytes: int = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Ended:
    """`exit_code`: above 128 where a signal ended it (128 + signal), as a shell says it; None where we ended it."""

    reason: Reason
    exit_code: int | None
    stdout: bytes


class Sandbox:
    """`has_packages`: this interpreter's site-packages can be imported inside. Raises SpecError where bubblewrap is
    missing or the kernel does not let it work."""

    def __init__(self, limits: Limits | None = None, *, has_packages: bool = False) -> None:
        self._limits = limits or Limits()
        self._has_packages = has_packages
        self._bwrap = _find("bwrap", "bubblewrap")
        self._prlimit = _find("prlimit", "util-linux")
        self._setpriv = _find("setpriv", "util-linux")
        self._check()

    def run(self, files: Mapping[str, bytes], stdin: bytes = b"") -> Ended:
        """Run main.py of `files`, which lie in the program's own folder. Standard error is thrown away."""
        with tempfile.TemporaryDirectory(prefix="batchgen-sandbox-") as folder:
            program = Path(folder) / "program"
            program.mkdir()
            program.chmod(0o755)  # whatever the umask: the program's user is another one
            for name, data in files.items():
                (program / name).write_bytes(data)
                (program / name).chmod(0o644)
            (Path(folder) / "stdin").write_bytes(stdin)
            with (Path(folder) / "stdin").open("rb") as source:
                return self._run([*self._python, f"{PROGRAM_FOLDER}/main.py"], program, source.fileno())

    def _check(self) -> None:
        ended = self.run({"main.py": b"print('ready')"})
        if ended.stdout.strip() != b"ready":
            raise SpecError(
                "run_code: bubblewrap does not work here (unprivileged user namespaces are off, or a container forbids "
                "them); allow them, or score elsewhere: batchgen evaluate score OUT --run-code"
            )

    def _run(self, command: list[str], program: Path, stdin: int) -> Ended:
        shown = {path: path for path in self._list_prefixes()} | {str(program): PROGRAM_FOLDER}
        shown |= {sysconfig.get_paths()["purelib"]: PACKAGES_FOLDER} if self._has_packages else {}
        full = [*self._confine(shown), *self._limit(), *command]
        if os.geteuid() == 0:
            full = [*self._become_nobody(shown), *self._confine({path: path for path in shown.values()})]
            full += [*self._limit(), *command]
        # Without an environment of its own: the namespace's first process shows it in /proc to all that run there.
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        with subprocess.Popen(full, env={}, stdin=stdin, stdout=pipe, stderr=nowhere) as process:
            try:
                reason, printed = _read(process, time.monotonic() + self._limits.wall_s, self._limits.output_bytes)
            finally:
                process.kill()  # and with it the namespaces and all that runs there
            process.wait()
        return Ended(reason, process.returncode if reason == "exited" else None, printed)

    @cached_property
    def _python(self) -> list[str]:
        real = str(Path(sys.executable).resolve())
        return [real, "-s", "-B"] if self._has_packages else [real, "-I", "-S", "-B"]

    @staticmethod
    def _list_prefixes() -> list[str]:
        """Where Python lies, unless it is the system's own."""
        found = {sys.base_prefix, str(Path(sys.executable).resolve().parents[1])}
        return sorted(prefix for prefix in found if not Path(prefix).is_relative_to("/usr"))

    def _become_nobody(self, shown: Mapping[str, str]) -> list[str]:
        """A first mount namespace that hides nothing yet, and a user in it that no other process has."""
        user = str(2**20 + secrets.randbelow(2**29))
        # A process namespace of its own, for the inner bubblewrap, having changed its user, no longer dies with its parent.
        words = [self._bwrap, "--die-with-parent", "--unshare-pid", *_bind_system(), "--dev-bind", "/proc", "/proc"]
        words += ["--dev-bind", "/dev", "/dev", "--tmpfs", "/tmp", *_bind_all(shown), "--"]
        return [*words, self._setpriv, f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs", "--"]

    def _confine(self, shown: Mapping[str, str]) -> list[str]:
        """Later ones lie over earlier ones; what can be written is made read-only at the end."""
        size = str(self._limits.disk_bytes)
        words = [self._bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534"]
        words += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--clearenv"]
        for name, value in self._environment().items():
            words += ["--setenv", name, value]
        words += [*_bind_system(), "--proc", "/proc", "--dev", "/dev"]
        words += ["--size", size, "--tmpfs", "/tmp", "--size", size, "--tmpfs", "/dev/shm"]
        words += [*_bind_all(shown), "--remount-ro", "/dev", "--remount-ro", "/"]
        return [*words, "--chdir", "/tmp", "--"]

    def _environment(self) -> dict[str, str]:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        packages = {"PYTHONPATH": PACKAGES_FOLDER} if self._has_packages else {}
        return {
            "PATH": "/usr/bin:/bin",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",
            **threads,
            **packages,
        }

    def _limit(self) -> list[str]:
        limits = self._limits
        return [
            self._prlimit,
            f"--cpu={limits.cpu_s}",
            f"--as={limits.memory_bytes}",
            f"--nproc={limits.max_processes}",
            f"--fsize={limits.disk_bytes}",
            "--nofile=256",
            "--core=0",
        ]


def _find(name: str, package: str) -> str:
    if (found := shutil.which(name)) is None:
        raise SpecError(f"run_code: '{name}' is not installed; apt-get install {package}")
    return found


def _bind_system() -> list[str]:
    """/usr, and /bin, /lib and the like: links into it on most systems, folders on some."""
    words = ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib64"):
        if Path(name).is_symlink():
            words += ["--symlink", str(Path(name).readlink()), name]
        elif Path(name).is_dir():
            words += ["--ro-bind", name, name]
    return words


def _bind_all(shown: Mapping[str, str]) -> list[str]:
    """At their places, below folders that all may enter: bubblewrap would make root's own again."""
    parents = {parent for inside in shown.values() for parent in Path(inside).parents if parent != Path("/")}
    words = [word for parent in sorted(parents) for word in ("--perms", "0755", "--dir", str(parent))]
    return words + [word for path, inside in shown.items() for word in ("--ro-bind", path, inside)]


def _read(process: "subprocess.Popen[bytes]", until: float, max_bytes: int) -> tuple[Reason, bytes]:
    """What it prints until it ends, its time is up or it has printed too much."""
    assert process.stdout is not None
    printed = bytearray()
    while True:
        left = until - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            return "timeout", bytes(printed)
        data = os.read(process.stdout.fileno(), _READ_BYTES)
        if not data:
            break
        printed += data
        if len(printed) > max_bytes:
            return "too_much_output", bytes(printed[:max_bytes])
    try:
        process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:  # it closed its output and goes on
        return "timeout", bytes(printed)
    return "exited", bytes(printed)
