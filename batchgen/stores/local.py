"""The local disk (or a mounted one) as a store.

A file is written under `<root>/_batchgen/tmp/`, synced, and only then given its name, so a reader of any other
folder never sees a part of one. Create-if-absent is a hard link, which the kernel decides. Replace is a check and a
rename under a lock file: exact among processes of one machine, and among machines only where the network file system
honours flock. Times may be coarse, so a replacing file is given a later mtime than the file it replaces: two
versions never share a name. A power cut keeps what was synced; an edit by others which keeps size and mtime goes
unseen. A process killed in between leaves its temporary file, which is removed a day later.
"""

import contextlib
import errno
import fcntl
import io
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from batchgen.errors import AlreadyExists, Conflict, StorageError
from batchgen.stores.base import ABSENT, FileInfo, StoreFile, make_error, make_read_error, mapped_os_errors

TEMPORARY_FOLDER = "_batchgen/tmp"
_LOCK_NAME = "replace.lock"
_LEFTOVER_AGE_S = 24 * 3600.0


def _version(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def _info(path: str, status: os.stat_result) -> FileInfo | None:
    return FileInfo(path, status.st_size, _version(status)) if stat.S_ISREG(status.st_mode) else None


class LocalClient:
    """`root` is where temporary files go: on the same file system as what is written. Inputs need none."""

    can_replace = True

    def __init__(self, root: str) -> None:
        self._tmp = Path(root) / TEMPORARY_FOLDER

    def find(self, folder: str) -> Iterator[FileInfo]:
        seen: set[tuple[int, int]] = set()
        for parent, folders, names in os.walk(folder, onerror=_raise_unless_gone, followlinks=True):
            if Path(parent) == self._tmp or not _is_first_visit(parent, seen):
                folders.clear()
                continue
            for name in names:
                if found := self.info(f"{parent.rstrip('/')}/{name}"):
                    yield found

    def list_folder(self, folder: str) -> tuple[list[FileInfo], list[str]]:
        try:
            with mapped_os_errors(folder, "list"), os.scandir(folder) as entries:
                names = [entry.path for entry in entries]
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return [], []
            raise
        return [found for name in names if (found := self.info(name))], [name for name in names if Path(name).is_dir()]

    def info(self, name: str) -> FileInfo | None:
        try:
            with mapped_os_errors(name, "look at"):
                return _info(name, Path(name).stat())
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return None
            raise

    def read(self, name: str) -> tuple[bytes, str]:
        with mapped_os_errors(name), Path(name).open("rb") as file:
            version = _version(os.fstat(file.fileno()))
            return file.read(), version

    def read_range(self, name: str, start: int, num_bytes: int, version: str) -> bytes:
        with mapped_os_errors(name), Path(name).open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), num_bytes, start)
            while 0 < len(data) < num_bytes and (
                more := os.pread(file.fileno(), num_bytes - len(data), start + len(data))
            ):
                data += more
            _verify(file, name, version)
            return data

    def open(self, name: str, block_bytes: int) -> StoreFile:
        with mapped_os_errors(name):
            file = Path(name).open("rb", buffering=block_bytes)  # noqa: SIM115 - the caller closes it
            version = _version(os.fstat(file.fileno()))
        return StoreFile(file, name, version, mapped_os_errors, lambda: _verify(file, name, version))

    def write(self, name: str, data: bytes | memoryview, if_version: str | None) -> str:
        try:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            with self._temporary(data) as temporary:
                version = _link(temporary, name) if if_version == ABSENT else self._rename(temporary, name, if_version)
            _sync_folder(Path(name).parent)
        except OSError as error:
            raise make_error("write", name, error) from error
        return version

    def delete(self, name: str) -> None:
        try:
            with mapped_os_errors(name, "delete"):
                Path(name).unlink(missing_ok=True)
        except StorageError as error:
            if not isinstance(error.__cause__, NotADirectoryError):
                raise

    def delete_leftovers(self, now_s: float) -> None:
        """Remove what killed processes left. Writing takes seconds; a day is beyond doubt even with clocks apart."""
        for leftover in self.list_folder(str(self._tmp))[0]:
            mtime_ns = int(leftover.version.partition("-")[2])
            if now_s - mtime_ns / 1e9 > _LEFTOVER_AGE_S and not leftover.path.endswith(_LOCK_NAME):
                self.delete(leftover.path)

    @contextlib.contextmanager
    def _temporary(self, data: bytes | memoryview) -> Iterator[Path]:
        if not self._tmp.is_dir():
            self._tmp.mkdir(parents=True, exist_ok=True)
        path = self._tmp / uuid.uuid4().hex
        try:
            with path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _replacing(self) -> Iterator[None]:
        """One lock for the whole root: replacing is rare and quick, and a lock a name would litter the folder."""
        self._tmp.mkdir(parents=True, exist_ok=True)
        with (self._tmp / _LOCK_NAME).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _rename(self, temporary: Path, name: str, if_version: str | None) -> str:
        with self._replacing():
            current = self.info(name)
            if if_version is not None and (current is None or current.version != if_version):
                raise Conflict(f"{name} was changed by another writer")
            if current is not None:
                _make_newer(temporary, than_ns=int(current.version.partition("-")[2]))
            version = _version(temporary.stat())
            temporary.replace(name)
            return version


def _link(temporary: Path, name: str) -> str:
    version = _version(temporary.stat())
    try:
        os.link(temporary, name)
    except FileExistsError as error:
        raise AlreadyExists(f"{name} exists already") from error
    except OSError as error:
        if error.errno in {errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV}:
            reason = "no hard link can be made from _batchgen/tmp; keep the whole folder on one disk that has them"
            raise make_error("create", name, error, reason) from error
        raise
    return version


def _make_newer(path: Path, than_ns: int) -> None:
    if path.stat().st_mtime_ns <= than_ns:
        os.utime(path, ns=(than_ns + 1, than_ns + 1))


def _sync_folder(folder: Path) -> None:
    """Without it a power cut may forget the name, though it keeps the bytes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _verify(file: BinaryIO | io.FileIO, name: str, version: str) -> None:
    """Of the open file: one that was renamed over is still whole, and the version that was asked for."""
    if _version(os.fstat(file.fileno())) != version:
        raise Conflict(f"{name} was changed while it was read")


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise make_read_error(str(error.filename), error) from error


def _is_first_visit(folder: str, seen: set[tuple[int, int]]) -> bool:
    """Links to folders are followed, and may lead in a circle."""
    try:
        status = Path(folder).stat()
    except FileNotFoundError:
        return False
    key = (status.st_dev, status.st_ino)
    is_first = key not in seen
    seen.add(key)
    return is_first
