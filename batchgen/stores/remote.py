"""Stores behind fsspec other than S3, and the one place where the errors of fsspec, s3fs and botocore are mapped.

`memory://` lives in one process and versions by content hash. Other fsspec stores create as far as their
`pipe_file(mode="create")` is exclusive (the probe tells), and replace by check and write, which is no promise.
"""

import contextlib
import hashlib
import io
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import aiohttp
import fsspec
from botocore import exceptions as botocore_errors

from batchgen.errors import AlreadyExists, Conflict, NotFound, StorageError
from batchgen.stores.base import (
    ABSENT,
    FileInfo,
    StoreFile,
    error_code,
    is_refused,
    make_error,
    make_read_error,
)

MAX_READ_TRIES = 3
_NO_KEYS = "no usable AWS credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"
_UNREACHABLE = "the store cannot be reached; check AWS_ENDPOINT_URL and the network"
_BROKEN = "the connection broke or timed out again and again; check the network"
_EXPLANATIONS: list[tuple[type[BaseException], str]] = [
    (botocore_errors.NoCredentialsError, _NO_KEYS),
    (botocore_errors.PartialCredentialsError, _NO_KEYS),
    (botocore_errors.CredentialRetrievalError, _NO_KEYS),
    (botocore_errors.TokenRetrievalError, _NO_KEYS),
    (botocore_errors.SSOError, _NO_KEYS),
    (botocore_errors.ProfileNotFound, "AWS_PROFILE names a profile that does not exist; correct it"),
    (botocore_errors.NoRegionError, "no region is set; set AWS_DEFAULT_REGION"),
    (botocore_errors.ParamValidationError, "the store's client finds the bucket or the name invalid; correct the URL"),
    (botocore_errors.SSLError, "TLS failed; check AWS_ENDPOINT_URL and AWS_CA_BUNDLE"),
    (botocore_errors.ConnectionError, _UNREACHABLE),
    (botocore_errors.HTTPClientError, _BROKEN),
    (aiohttp.ClientError, _BROKEN),
    (TimeoutError, _BROKEN),
    (ImportError, "the package for this kind of URL is not installed; install it on every machine"),
]
TRANSIENT = (botocore_errors.HTTPClientError, aiohttp.ClientError, TimeoutError)
# Clients whose errors are not OSErrors. They are looked up among what is loaded, so none becomes a dependency.
_OTHERS_ERRORS = [("gcsfs.retry", "HttpError"), ("azure.core.exceptions", "AzureError")]


def vendor_errors() -> tuple[type[BaseException], ...]:
    loaded = [getattr(sys.modules[module], name) for module, name in _OTHERS_ERRORS if module in sys.modules]
    return (OSError, ImportError, botocore_errors.BotoCoreError, botocore_errors.ClientError, *TRANSIENT, *loaded)


def explanation(error: BaseException) -> str:
    if error_code(error):
        return ""
    return next((sentence for kind, sentence in _EXPLANATIONS if isinstance(error, kind)), "")


class mapped(AbstractContextManager[None]):
    """No generator, as `mapped_os_errors` is none."""

    def __init__(self, name: str, action: str = "read") -> None:
        self._name, self._action = name, action

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None or not isinstance(error, vendor_errors()):
            return
        name, action = self._name, self._action
        if action != "read":
            raise make_error(action, name, error, explanation(error)) from error
        if is_refused(error):
            raise Conflict(f"{name} was changed while it was read") from error
        raise make_read_error(name, error, explanation(error)) from error


class FsspecClient:
    """Any fsspec store without conditions of its own but `mode="create"`."""

    can_replace = False

    def __init__(self, protocol: str) -> None:
        try:
            with mapped(f"{protocol}://", "open"):
                kind = fsspec.get_filesystem_class(protocol)
        except ValueError as error:
            raise StorageError(
                f"no such kind of URL: {protocol}://; write a local path or a URL such as s3://"
            ) from error
        with mapped(f"{protocol}://", "open"):
            self._fs: Any = self._open_fs(kind)

    def _open_fs(self, kind: Any) -> Any:
        return kind(use_listings_cache=False)

    def _bare(self, url: str) -> str:
        return str(self._fs._strip_protocol(url))

    def find(self, folder: str) -> Iterator[FileInfo]:
        base = self._bare(folder)
        try:
            with mapped(folder):
                found = self._fs.find(base, detail=True)
        except NotFound:
            return
        for name, info in found.items():
            if info["type"] == "file" and not name.endswith("/"):  # a console's mark for an empty folder
                yield self._info(folder + name[len(base) :], info)

    def list_folder(self, folder: str) -> tuple[list[FileInfo], list[str]]:
        base = self._bare(folder)
        try:
            with mapped(folder):
                entries = self._fs.ls(base, detail=True)
        except NotFound:
            return [], []
        named = [(folder + entry["name"].rstrip("/")[len(base) :], entry) for entry in entries]
        files = [self._info(url, entry) for url, entry in named if entry["type"] == "file" and url != folder]
        return files, [url for url, entry in named if entry["type"] == "directory"]

    def info(self, name: str) -> FileInfo | None:
        try:
            with mapped(name):
                info = self._fs.info(self._bare(name))
        except NotFound:
            return None
        return self._info(name, info) if info["type"] == "file" else None

    def read(self, name: str) -> tuple[bytes, str]:
        """Looks at the version before and after, and reads again when they differ."""
        for _ in range(MAX_READ_TRIES):
            before = self._known(name)
            with mapped(name):
                data = bytes(self._fs.cat_file(self._bare(name)))
            if self._known(name).version == before.version:
                return data, before.version
        raise Conflict(f"{name} changed each time that it was read")

    def read_range(self, name: str, start: int, num_bytes: int, version: str) -> bytes:
        with mapped(name):
            data = bytes(self._fs.cat_file(self._bare(name), start=start, end=start + num_bytes))
        self._verify(name, version)
        return data

    def open(self, name: str, block_bytes: int) -> StoreFile:
        with mapped(name):
            version = self._known(name).version
            raw = self._fs.open(self._bare(name), "rb", block_size=block_bytes)
        return StoreFile(raw, name, version, mapped, lambda: self._verify(name, version))

    def write(self, name: str, data: bytes | memoryview, if_version: str | None) -> str:
        if if_version and ((current := self.info(name)) is None or current.version != if_version):
            raise Conflict(f"{name} was changed by another writer")
        mode = {"mode": "create"} if if_version == ABSENT else {}
        failures: tuple[type[BaseException], ...] = (*vendor_errors(), NotImplementedError, TypeError, ValueError)
        try:
            self._fs.pipe_file(self._bare(name), bytes(data), **mode)
        except FileExistsError as error:
            raise AlreadyExists(f"{name} exists already") from error
        except failures as error:
            raise make_error("write", name, error, explanation(error)) from error
        return self._known(name).version

    def delete(self, name: str) -> None:
        with mapped(name, "delete"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._bare(name))

    def _info(self, url: str, info: dict[str, Any]) -> FileInfo:
        return FileInfo(url, int(info["size"] or 0), self._version(info))

    def _version(self, info: dict[str, Any]) -> str:
        for key in ("ETag", "etag", "generation", "blob_id", "md5Hash", "mtime", "last_modified", "LastModified"):
            if info.get(key):
                return str(info[key]).strip('"')
        return f"{info['size']}-"

    def _known(self, name: str) -> FileInfo:
        found = self.info(name)
        if found is None:
            raise NotFound(f"no such file: {name}")
        return found

    def _verify(self, name: str, version: str) -> None:
        if self._known(name).version != version:
            raise Conflict(f"{name} was changed while it was read")


class MemoryClient(FsspecClient):
    can_replace = True
    _lock = threading.RLock()

    def __init__(self) -> None:
        super().__init__("memory")

    def _version(self, info: dict[str, Any]) -> str:
        return hashlib.md5(self._fs.cat_file(info["name"]), usedforsecurity=False).hexdigest()

    def find(self, folder: str) -> Iterator[FileInfo]:
        with self._lock:
            return iter(list(super().find(folder)))

    def info(self, name: str) -> FileInfo | None:
        with self._lock:
            return super().info(name)

    def open(self, name: str, block_bytes: int) -> StoreFile:
        """Of a copy: the store hands out one shared file object with one position."""
        del block_bytes
        data, version = self.read(name)
        return StoreFile(io.BytesIO(data), name, version, mapped, lambda: self._verify(name, version))

    def write(self, name: str, data: bytes | memoryview, if_version: str | None) -> str:
        with self._lock:
            return super().write(name, data, if_version)
