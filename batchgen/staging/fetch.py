"""Carries a stage plan out: parts of files, many at a time, from a store into a folder on the local disk.

A part is written in its place in `X.part` and then recorded in the sidecar with its CRC-32, so that whoever starts again
after a SIGKILL reads what is recorded, believes what matches, and fetches the rest. A file gets its name when all of it is
there, is synced, and is what its source says (size; SHA-256 or MD5 where known; the safetensors header). One that isn't is
fetched a second time, and refused when that is no better. The caller holds the lock on the folder.
"""

import contextlib
import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

from batchgen.errors import Cancelled, Conflict, NotFound, StorageError
from batchgen.preflight.checkpoint import LENGTH_BYTES, parse_header, read_length
from batchgen.staging.plan import (
    SIDECAR,
    Part,
    SourceFile,
    StagePlan,
    format_file,
    format_part,
    list_parts,
    parse_sidecar,
)
from batchgen.storage import Storage
from batchgen.stores.base import mapped_os_errors

_HASH_BYTES = 8 * 2**20


class Fetcher:
    """One use. `stop`: set it to end early with Cancelled; what is fetched stays. `on_bytes`: bytes that are there."""

    def __init__(
        self,
        plan: StagePlan,
        folder: Path,
        *,
        num_threads: int,
        part_bytes: int,
        stop: threading.Event,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._plan, self._folder, self._stop, self._on_bytes = plan, folder, stop, on_bytes
        self._num_threads, self._part_bytes = num_threads, part_bytes
        self._storage = Storage(plan.source)
        self._lock = threading.Lock()  # over what follows
        self._left: dict[str, int] = {}
        self._damaged: dict[str, tuple[SourceFile, str]] = {}
        self._num_bytes = 0
        self.fetched = parse_sidecar(read_lines(folder / SIDECAR))

    def run(self) -> None:
        """StorageError (a full disk, a source that fails or is damaged), Cancelled."""
        name = str(self._folder / SIDECAR)
        with mapped_os_errors(name, "write"), Path(name).open("a", encoding="utf-8") as sidecar:
            sidecar.write("\n")  # ends a line that a killed writer left
            self._sidecar = sidecar
            missing = [file for file in self._plan.files if not self._has(file)]
            self._count(sum(file.num_bytes for file in self._plan.files if file not in missing))
            for tries_left in (1, 0):
                self._fetch(missing)
                if not self._damaged:
                    return
                missing = self._drop_damaged(can_retry=bool(tries_left))

    def drop_rotten(self) -> list[str]:
        """Reads all that is recorded, and forgets the files that differ from what was fetched; their paths."""
        whole = [file for file in self._plan.files if self._has(file)]
        with ThreadPoolExecutor(self._num_threads, "stage") as pool:
            is_sound = list(pool.map(self._is_sound, whole))
        rotten = [file.path for file, sound in zip(whole, is_sound, strict=True) if not sound]
        for path in rotten:
            self._forget(path)
        return rotten

    def _has(self, file: SourceFile) -> bool:
        path = self._folder / file.path
        return file.path in self.fetched.files and path.is_file() and path.stat().st_size == file.num_bytes

    def _is_sound(self, file: SourceFile) -> bool:
        parts = self.fetched.list_parts(file.path)
        with mapped_os_errors(str(self._folder / file.path)):
            handle = os.open(self._folder / file.path, os.O_RDONLY)
            try:
                return all(read_crc(handle, part) == self.fetched.parts[part] for part in parts)
            finally:
                os.close(handle)

    def _forget(self, path: str) -> None:
        self.fetched.drop(path)
        for name in (self._folder / path, self._part_name(path)):
            name.unlink(missing_ok=True)

    def _drop_damaged(self, *, can_retry: bool) -> list[SourceFile]:
        damaged = list(self._damaged.values())
        for file, reason in damaged:
            self._forget(file.path)
            if not can_retry:
                raise StorageError(
                    f"{self._storage.url(file.path)} {reason}, twice over; put a whole file there (and a right checksum)"
                )
        self._damaged.clear()
        self._count(-sum(file.num_bytes for file, _ in damaged))
        return [file for file, _ in damaged]

    def _fetch(self, files: Iterable[SourceFile]) -> None:
        with ThreadPoolExecutor(self._num_threads, "stage") as pool:
            futures: list[Future[None]] = []
            for file in files:
                self._part_name(file.path).parent.mkdir(parents=True, exist_ok=True)
                parts = list_parts(file, self._part_bytes)
                self._left[file.path] = len(parts)
                futures += [pool.submit(self._fetch_part, file, part) for part in parts]
                if not parts:
                    futures.append(pool.submit(self._finish, file))
            _, unfinished = wait(futures, return_when=FIRST_EXCEPTION)
            for future in unfinished:
                future.cancel()
        for future in futures:
            if not future.cancelled():
                future.result()

    def _fetch_part(self, file: SourceFile, part: Part) -> None:
        if self._stop.is_set():
            raise Cancelled(f"copying {self._plan.source} was stopped; what was copied is kept")
        name = self._part_name(file.path)
        with mapped_os_errors(str(name), "write"):
            handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if part not in self.fetched.parts or read_crc(handle, part) != self.fetched.parts[part]:
                self._copy(handle, file, part)
        finally:
            os.close(handle)
        self._count(part.num_bytes)
        with self._lock:
            self._left[file.path] -= 1
            is_last = not self._left[file.path]
        if is_last:
            self._finish(file)

    def _copy(self, handle: int, file: SourceFile, part: Part) -> None:
        try:
            data = self._storage.read_range(file.path, part.start, part.num_bytes, file.version)
        except (NotFound, Conflict) as error:
            where = self._storage.url(file.path)
            raise StorageError(
                f"{where} was changed while it was copied; start again when the source is quiet"
            ) from error
        if len(data) != part.num_bytes:
            raise StorageError(
                f"{self._storage.url(file.path)} ended early; its store gave {len(data)} bytes of a range"
            )
        with mapped_os_errors(str(self._part_name(file.path)), "write"):
            write_at(handle, data, part.start)
        with self._lock, mapped_os_errors(str(self._folder / SIDECAR), "write"):
            self.fetched.parts[part] = zlib.crc32(data)
            self._sidecar.write(format_part(part, self.fetched.parts[part]))
            self._sidecar.flush()

    def _finish(self, file: SourceFile) -> None:
        name = self._part_name(file.path)
        with mapped_os_errors(str(name), "write"):
            with name.open("ab") as handle:
                handle.truncate(file.num_bytes)  # an earlier, longer version of it may have lain there
                os.fsync(handle.fileno())
            reason = find_fault(name, file)
            if reason is not None:
                with self._lock:
                    self._damaged[file.path] = (file, reason)
                return
            name.replace(self._folder / file.path)
        with self._lock, mapped_os_errors(str(self._folder / SIDECAR), "write"):
            self.fetched.files.add(file.path)
            self._sidecar.write(format_file(file))
            self._sidecar.flush()

    def _part_name(self, path: str) -> Path:
        return self._folder / f"{path}.part"

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self._num_bytes += num_bytes
            self._on_bytes(self._num_bytes)


def find_fault(path: Path, file: SourceFile) -> str | None:
    """What is wrong with a file that was fetched whole, as a clause."""
    for kind, expected in (("sha256", file.sha256), ("md5", file.md5)):
        if expected is not None:
            if hash_file(path, kind) != expected:
                return f"has another {kind} than its source says"
            break  # a file of checksums is somebody's word on the content; an etag that happens to be one is weaker
    if file.path.endswith(".safetensors"):
        try:
            check_safetensors(path)
        except ValueError as error:
            return str(error)
    return None


def check_safetensors(path: Path) -> None:
    """Raises ValueError, a clause."""
    with path.open("rb") as handle:
        length = read_length(handle.read(LENGTH_BYTES))
        parse_header(handle.read(length), path.stat().st_size)


def hash_file(path: Path, kind: str) -> str:
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb", buffering=0) as handle:
        while block := handle.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_crc(handle: int, part: Part) -> int | None:
    """CRC-32 of what lies there; None where there is less."""
    crc, left, start = 0, part.num_bytes, part.start
    while left:
        block = os.pread(handle, min(left, _HASH_BYTES), start)
        if not block:
            return None
        crc, left, start = zlib.crc32(block, crc), left - len(block), start + len(block)
    return crc


def write_at(handle: int, data: bytes, start: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, start)
        view, start = view[written:], start + written


def read_lines(path: Path) -> list[str]:
    with contextlib.suppress(NotFound), mapped_os_errors(str(path)):
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    return []
