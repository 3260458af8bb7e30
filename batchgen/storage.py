"""The few file operations that we need, on a local disk, on S3 and on any other fsspec URL.

The only door to files: what lies behind (`stores/`) is used by nobody else. All failures are ours, each a sentence
with the URL and the mend. Writes are all or nothing. Nothing is cached: a listing is the store's present one. A
`Storage` may be used from many threads, and pickles by its URL: clients are opened in the process that uses them.

Paths are taken literally ('%', '#', blanks and brackets are just characters) and are '/'-separated. A URL with a
password in it is refused, for it would end up in specs and logs.
"""

import fnmatch
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from batchgen.errors import AlreadyExists, Conflict, InputChanged, InputError, NotFound, StorageError
from batchgen.paths import expand_home
from batchgen.stores.base import ABSENT, Client, FileInfo, StoreFile
from batchgen.stores.local import LocalClient
from batchgen.stores.opening import open_client, scheme_of
from batchgen.urls import has_password

__all__ = ["FileInfo", "Storage", "is_input", "list_inputs", "open_input", "read_text"]

_BLOCK_BYTES = 4 * 2**20
_PARALLEL_DELETES = 16
_MAGIC = re.compile(r"[*?[]")


class Storage:
    """A folder, local or remote.

    `is_exclusive`, `can_replace`: what a probe of the store found. Where it is False no conditional request is sent:
    `create` looks and then writes, `replace` compares and then writes, and two writers at once may both win.
    """

    def __init__(self, url: str, *, is_exclusive: bool = True, can_replace: bool = True) -> None:
        self.root = _absolute(url)
        self.is_local = scheme_of(self.root) == ""
        self.can_create_exclusively = is_exclusive
        self.can_replace_exclusively = can_replace
        self._opened: Client | None = None

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def has_atomic_replace(self) -> bool:
        """Is `replace` decided by the store, as opposed to a look and a write?"""
        return self._client.can_replace and self.can_replace_exclusively and self.can_create_exclusively

    def url(self, path: str) -> str:
        return f"{self.root.rstrip('/')}/{path}" if path else self.root

    def list_files(self, folder: str = "", suffix: str = "") -> list[FileInfo]:
        """All files below, sorted by path; [] where there is no such folder."""
        cut = len(self.root.rstrip("/")) + 1
        found = (info for info in self._client.find(self.url(folder)) if info.path.endswith(suffix))
        below = [FileInfo(info.path[cut:], info.num_bytes, info.version) for info in found]
        return sorted(below, key=lambda info: info.path)

    def list_folders(self, folder: str = "") -> list[str]:
        """Names of the folders right below, sorted; [] where there is no such folder."""
        return sorted(path.rstrip("/").rpartition("/")[2] for path in self._client.list_folder(self.url(folder))[1])

    def info(self, path: str) -> FileInfo | None:
        found = self._client.info(self.url(path))
        return found and replace(found, path=path)

    def read_bytes(self, path: str) -> bytes:
        """NotFound."""
        return self.read_versioned(path)[0]

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        """Content, and the version that it belongs to. NotFound."""
        return self._client.read(self.url(path))

    def read_range(self, path: str, start: int, num_bytes: int, version: str) -> bytes:
        """Part of a file, from many threads at once. NotFound; Conflict when it isn't `version` any more."""
        return self._client.read_range(self.url(path), start, num_bytes, version)

    def open_read(self, path: str) -> BinaryIO:
        """Seekable. NotFound; Conflict when the file is replaced while it is read."""
        return cast(BinaryIO, self._client.open(self.url(path), _BLOCK_BYTES))

    def create(self, path: str, data: bytes | memoryview) -> str:
        """Only where nothing is; the new version. AlreadyExists, also for our own object after a lost reply."""
        if self.can_create_exclusively:
            return self._client.write(self.url(path), data, ABSENT)
        if self.info(path) is not None:
            raise AlreadyExists(f"{self.url(path)} exists already")
        return self._client.write(self.url(path), data, None)

    def replace(self, path: str, data: bytes | memoryview, version: str) -> str:
        """Only where `version` is still there; the new version. Conflict, also when the file is missing."""
        if self.can_create_exclusively and self.can_replace_exclusively:
            return self._client.write(self.url(path), data, version)
        current = self.info(path)
        if current is None or current.version != version:
            raise Conflict(f"{self.url(path)} was changed by another writer")
        return self._client.write(self.url(path), data, None)

    def put(self, path: str, data: bytes | memoryview) -> str:
        """Whatever is there; the new version."""
        return self._client.write(self.url(path), data, None)

    def delete(self, path: str) -> None:
        """A missing file is fine."""
        self._client.delete(self.url(path))

    def delete_many(self, paths: Iterable[str]) -> None:
        with ThreadPoolExecutor(_PARALLEL_DELETES, "delete") as pool:
            list(pool.map(self.delete, paths))

    def delete_leftovers(self, now_s: float) -> None:
        """Remove temporary files of killed processes, a day old or more. `now_s`: seconds since the epoch."""
        if isinstance(self._client, LocalClient):
            self._client.delete_leftovers(now_s)

    @property
    def _client(self) -> Client:
        if self._opened is None:
            self._opened = open_client(self.root)
        return self._opened


def list_inputs(url: str) -> list[FileInfo]:
    """The files of a path, a folder or a glob (`*`, `?`, `[..]`, `**`), sorted, by full name.

    A path that exists is taken literally, whatever characters it has. Below a folder or a glob's fixed part, names
    that start with '_' or '.' are left out, and folders that match a glob count with all that is below. InputError.
    """
    try:
        root = _absolute(url)
        found = _find_inputs(open_client(root), root)
    except StorageError as error:
        raise InputError(f"the input can't be listed: {error}") from error
    return sorted(found, key=lambda info: info.path)


def is_input(url: str, path: str) -> bool:
    """Would `list_inputs(url)` list a file of this full name, were it there?"""
    pattern, parts = _absolute(url).split("/"), _absolute(path).split("/")
    fixed = next((number for number, part in enumerate(pattern) if _MAGIC.search(part)), len(pattern))
    is_below = parts[: len(pattern)] == pattern
    return (is_below or _matches(parts, pattern)) and not _is_hidden(parts[len(pattern) if is_below else fixed :])


def open_input(path: str, version: str, *, block_bytes: int = _BLOCK_BYTES) -> BinaryIO:
    """A seekable input file, for `with`. InputChanged at once, while reading or at close, when it isn't `version`.

    On S3 every range is asked for with the etag; on a local disk the open file is looked at again at close.
    """
    name = _absolute(path)
    try:
        file = open_client(name).open(name, block_bytes)
    except NotFound as error:
        raise InputChanged(f"the input file {path} is missing; it was planned as version {version}") from error
    if file.version != version:
        file.close()
        raise InputChanged(f"the input file {path} was changed: planned as version {version}, found {file.version}")
    return cast(BinaryIO, _InputFile(file, path))


def read_text(url: str) -> str:
    """A small UTF-8 file from anywhere. InputError."""
    try:
        name = _absolute(url)
        content, _ = open_client(name).read(name)
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{url} is not UTF-8 text; save it as UTF-8") from error
    except NotFound as error:
        raise InputError(f"{error}; correct the path") from error
    except StorageError as error:
        raise InputError(str(error)) from error


class _InputFile(StoreFile):
    def __init__(self, file: StoreFile, path: str) -> None:
        super().__init__(file, path, file.version, self._as_changed, lambda: None)

    def _as_changed(self, path: str) -> "_AsChanged":
        return _AsChanged(path, self.version)

    def close(self) -> None:
        if not self.closed:
            with self._as_changed(self.file_name):
                super().close()


class _AsChanged:
    """NotFound and Conflict while an input is read mean one thing: it is not what was planned."""

    def __init__(self, path: str, version: str) -> None:
        self._path, self._version = path, version

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NotFound | Conflict):
            message = f"the input file {self._path} was changed while it was read; it was planned as {self._version}"
            raise InputChanged(message) from error


def _absolute(url: str) -> str:
    """One spelling for each place: a full path or `scheme://...`, without a '/' at its end."""
    if "\0" in url:
        raise InputError("cannot use a path with a zero byte in it; write the path itself")
    scheme = scheme_of(url)
    rest = url[len(scheme) + 3 :]
    if scheme in {"file", "local"} or not scheme:
        return os.path.abspath(rest if scheme else expand_home(url))  # noqa: PTH100 - resolve() follows links
    if has_password(url):  # the URL is not repeated: it holds the secret
        raise InputError(f"cannot use a {scheme}:// URL with a password in it; leave credentials to the environment")
    return f"{'s3' if scheme == 's3a' else scheme}://{rest.rstrip('/')}"


def _find_inputs(client: Client, root: str) -> list[FileInfo]:
    exact = client.info(root)
    if exact is not None:
        return [exact]
    base = root
    found = list(client.find(root))
    if not found and _MAGIC.search(root):
        base, pattern = _split_glob(client, root)
        found = _list_matching(client, base, pattern)
    elif not found and not (scheme_of(root) == "" and Path(root).is_dir()):
        raise InputError(f"no such path: {root}; correct input.paths")
    visible = [info for info in found if not _is_hidden(_parts_below(base, info.path))]
    if not visible:
        hint = " (names that start with '_' or '.' don't count)" if found else ""
        raise InputError(f"no file matches {root}{hint}; correct input.paths")
    return visible


def _split_glob(client: Client, url: str) -> tuple[str, list[str]]:
    """The folder without wildcards, and the rest. A folder that is really called 'a[1]' is no wildcard."""
    prefix = url[: len(scheme_of(url)) + 3] if scheme_of(url) else "/"
    first, *rest = url[len(prefix) :].split("/") if prefix != "/" else ["", *url[1:].split("/")]
    base = prefix + first
    while rest:
        longer = f"{base.rstrip('/')}/{rest[0]}"
        if _MAGIC.search(rest[0]) and ("[" not in rest[0] or next(client.find(longer), None) is None):
            break
        base = longer
        del rest[0]
    return base, rest


def _list_matching(client: Client, base: str, pattern: list[str]) -> list[FileInfo]:
    """One listing of one level where that is enough, else one of everything below: the fewest requests on S3."""
    if len(pattern) == 1 and pattern != ["**"]:
        files, folders = client.list_folder(base)
        found = [info for info in files if _matches(_parts_below(base, info.path), pattern)]
        for folder in folders:
            if _matches(_parts_below(base, folder), pattern):
                found += client.find(folder)
        return found
    return [info for info in client.find(base) if _matches(_parts_below(base, info.path), pattern)]


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Does the path, or a folder that it lies in, match? `**` is any number of folders."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts)))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _parts_below(base: str, path: str) -> list[str]:
    return path[len(base.rstrip("/")) + 1 :].split("/")


def _is_hidden(parts: list[str]) -> bool:
    return any(part.startswith(("_", ".")) for part in parts)
