"""An object store in memory, as S3 decides and as seeds make it fail. A `stores.base.Client`.

Every operation takes virtual time and happens at one instant within it. It may fail before that instant, or after it so
that only the reply is lost; a retry of the client's own may then meet what the first try wrote. Listings may be
stale of what other processes created, as a network file system's are.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from batchgen.errors import AlreadyExists, Conflict, NotFound, StorageError
from batchgen.stores.base import ABSENT, FileInfo, StoreFile

from .kernel import Kernel, Process

CLIENT_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Chances of one operation. `slow_s` bounds how long a slow one takes; `freezes`: its process, before a write that it
    has decided on, so that it comes too late; `freezes_at`: only writes with this in their names."""

    fails: float = 0.0
    loses_reply: float = 0.0
    is_retried: float = 0.0
    kills: float = 0.0
    freezes: float = 0.0
    freezes_at: str = ""
    freeze_s: float = 30.0
    is_slow: float = 0.0
    slow_s: float = 20.0
    is_stale: float = 0.0
    stale_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Held:
    data: bytes
    version: str
    at: float
    writer: Process | None = None


class SimStore:
    """`watch(path, before, after)` is told of every change, at its instant; None is absent."""

    can_replace = True

    def __init__(self, kernel: Kernel, watch: Callable[[str, bytes | None, bytes | None], None]) -> None:
        self._kernel, self._watch = kernel, watch
        self.rates = Rates()
        self.on_freeze: Callable[[], None] = lambda: None
        self.held: dict[str, Held] = {}
        self.num_operations = 0
        self.num_faults: dict[str, int] = {}

    def plant(self, name: str, data: bytes) -> None:
        """Before the world begins."""
        self.held[name] = Held(data, hashlib.md5(data).hexdigest(), -1e9)

    # ---- the client --------------------------------------------------------------------------------------------------

    def find(self, folder: str) -> Iterator[FileInfo]:
        return iter(self._do("list", folder, lambda: self._list(folder)))

    def list_folder(self, folder: str) -> tuple[list[FileInfo], list[str]]:
        found = list(self.find(folder))
        direct = [info for info in found if "/" not in info.path[len(folder) + 1 :]]
        below = {folder + "/" + info.path[len(folder) + 1 :].partition("/")[0] for info in found} - {
            info.path for info in direct
        }
        return direct, sorted(below)

    def info(self, name: str) -> FileInfo | None:
        held = self._do("look", name, lambda: self.held.get(name))
        return held and FileInfo(name, len(held.data), held.version)

    def read(self, name: str) -> tuple[bytes, str]:
        held = self._do("read", name, lambda: self._get(name))
        return held.data, held.version

    def read_range(self, name: str, start: int, num_bytes: int, version: str) -> bytes:
        held = self._do("read", name, lambda: self._get(name))
        if held.version != version:
            raise Conflict(f"{name} was changed while it was read")
        return held.data[start : start + num_bytes]

    def open(self, name: str, block_bytes: int) -> StoreFile:
        """Of a copy: readers in C++ threads must not meet the kernel."""
        del block_bytes
        held = self._do("read", name, lambda: self._get(name))
        return StoreFile(io.BytesIO(held.data), name, held.version, _unmapped, lambda: None)

    def write(self, name: str, data: bytes | memoryview, if_version: str | None) -> str:
        content = bytes(data)
        version: str = self._do("write", name, lambda: self._write(name, content, if_version))
        return version

    def delete(self, name: str) -> None:
        self._do("delete", name, lambda: self._delete(name))

    # ---- what happens at the instant -----------------------------------------------------------------------------------

    def _list(self, folder: str) -> list[FileInfo]:
        newest, reader = self._kernel.now, self._kernel.process
        if self._draws(self.rates.is_stale, "stale"):
            newest -= self._kernel.rng.uniform(0, self.rates.stale_s)
        inside = f"{folder.rstrip('/')}/"
        return [
            FileInfo(name, len(held.data), held.version)
            for name, held in self.held.items()
            if (name.startswith(inside) or name == folder) and (held.at <= newest or held.writer is reader)
        ]

    def _get(self, name: str) -> Held:
        if name not in self.held:
            raise NotFound(f"no such file: {name}")
        return self.held[name]

    def _write(self, name: str, data: bytes, if_version: str | None) -> str:
        standing = self.held.get(name)
        if if_version == ABSENT and standing is not None:
            raise AlreadyExists(f"{name} exists already")
        if if_version and (standing is None or standing.version != if_version):
            raise Conflict(f"{name} was changed by another writer")
        at = standing.at if standing is not None else self._kernel.now
        self.held[name] = Held(data, hashlib.md5(data).hexdigest(), at, self._kernel.process)
        self._watch(name, standing and standing.data, data)
        return self.held[name].version

    def _delete(self, name: str) -> None:
        if (standing := self.held.pop(name, None)) is not None:
            self._watch(name, standing.data, None)

    # ---- the way there and back ----------------------------------------------------------------------------------------

    def _do(self, what: str, name: str, act: Callable[[], Any]) -> Any:
        kernel, rates = self._kernel, self.rates
        process = kernel.process
        assert process is not None, f"{what} {name}: nobody's operation"
        self.num_operations += 1
        self._travel(process)
        if self._draws(rates.fails, "fails"):
            self._fail(what, name)
        if self._draws(rates.kills / 2, "killed before"):
            kernel.kill(process, f"before {what} {name}")
        if what == "write" and rates.freezes_at in name and self._draws(rates.freezes, "frozen"):
            kernel.tell(f"frozen before {what} {name}")
            process.frozen_until = kernel.now + kernel.rng.uniform(0, rates.freeze_s)
            self.on_freeze()
            kernel.sleep(0.001)
        if what in ("write", "delete") and self._draws(rates.is_retried, "retried"):
            act()  # the reply is lost, and the client's own retry meets what it wrote
            kernel.tell(f"{what} {name}: reply lost, tried again")
            self._travel(process)
        value = act()
        if what in ("write", "delete"):
            kernel.tell(f"{what} {name}")
        if self._draws(rates.kills / 2, "killed after"):
            kernel.kill(process, f"after {what} {name}")
        self._travel(process)
        if self._draws(rates.loses_reply, "reply lost"):
            self._fail(what, name)
        return value

    def _travel(self, process: Process) -> None:
        """Half a round trip. Where the store is out of reach its client tries for a while, then gives up."""
        kernel, rates = self._kernel, self.rates
        is_slow = self._draws(rates.is_slow, "slow")
        kernel.sleep(kernel.rng.uniform(0.0, rates.slow_s) if is_slow else kernel.rng.uniform(0.001, 0.02))
        left = process.store_cut_until - kernel.now
        if left > 0:
            kernel.sleep(min(left, CLIENT_PATIENCE_S))
            if process.store_cut_until > kernel.now:
                raise StorageError("cannot reach the store; check the network")

    def _fail(self, what: str, name: str) -> None:
        self._kernel.tell(f"{what} {name}: fails")
        raise StorageError(f"cannot {what} {name}: the store is not available; start it again later")

    def _draws(self, chance: float, what: str) -> bool:
        if not chance or self._kernel.rng.random() >= chance:
            return False
        self.num_faults[what] = self.num_faults.get(what, 0) + 1
        return True


@contextlib.contextmanager
def _unmapped(name: str) -> Iterator[None]:
    del name
    yield
