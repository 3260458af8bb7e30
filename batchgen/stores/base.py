"""What the stores have in common: the `Client` they implement, and how a failure becomes one of our errors.

Knows no vendor: a store's own error is read by its code (`.response`, as botocore's ClientError carries it, looked
for along the `__cause__` chain, because s3fs translates) or by its errno; never by its text. Every sentence names
what was tried, where, and the mend, and holds neither a secret nor file content.
"""

import errno
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final, Protocol, cast

from batchgen.errors import NotFound, StorageError

#: As `if_version` of `Client.write`: only where no object is. No real version is empty.
ABSENT: Final = ""

_MISSING_CODES = frozenset({"404", "NoSuchKey", "NoSuchVersion"})
_REFUSED_CODES = frozenset({"412", "PreconditionFailed"})
_BUSY_CODES = frozenset({"500", "503", "InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout"})

_RIGHTS = "let these credentials list, read, write and delete there (s3:ListBucket, Get-, Put- and DeleteObject)"
_KEYS = "check the AWS_* variables or the profile in use"
_REGION = "set AWS_DEFAULT_REGION to the bucket's region"
_LATER = "start it again later, or with fewer workers"

_BY_CODE: Final = {
    "NoSuchBucket": ("the bucket does not exist", "create it or correct the URL"),
    "InvalidBucketName": ("this is no valid bucket name", "correct the URL"),
    "AccessDenied": ("access is denied", _RIGHTS),
    "403": ("access is denied", _RIGHTS),
    "AllAccessDisabled": ("access is denied", _RIGHTS),
    "InvalidAccessKeyId": ("the store does not know the access key", _KEYS),
    "SignatureDoesNotMatch": ("the secret key does not fit the access key", _KEYS),
    "ExpiredToken": ("the credentials have expired", "renew them, or use credentials that renew themselves"),
    "InvalidToken": ("the session token is not valid", _KEYS),
    "RequestTimeTooSkewed": ("this machine's clock is wrong", "set the clock"),
    "PermanentRedirect": ("the bucket is in another region", _REGION),
    "301": ("the bucket is in another region", _REGION),
    "AuthorizationHeaderMalformed": ("the bucket is in another region", _REGION),
    "SlowDown": ("the store asked us to slow down, and went on asking", _LATER),
    "503": ("the store is not available", _LATER),
    "ServiceUnavailable": ("the store is not available", _LATER),
    "NotImplemented": ("the store does not know this kind of request", "use another store"),
    "501": ("the store does not know this kind of request", "use another store"),
    "ConditionalRequestConflict": ("other writers of the same object kept getting in between", _LATER),
}

_ELSEWHERE = "give this user write access or choose another folder"
_BY_ERRNO: Final = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another folder"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another folder"),
    errno.EACCES: ("permission is denied", _ELSEWHERE),
    errno.EPERM: ("permission is denied", _ELSEWHERE),
    errno.EROFS: ("the file system is read-only", "choose another folder"),
    errno.ENOENT: ("no such file or folder, and none can be made there", "choose another folder"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another folder"),
    errno.EEXIST: ("a part of the path is a file, not a folder", "choose another folder"),
    errno.EISDIR: ("it is a folder, not a file", "correct the path"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.EMFILE: ("this process has too many files open", "raise `ulimit -n`"),
    errno.ESTALE: ("the network file system lost the file", _LATER),
}


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file. `path`: a full name from `list_inputs`, relative to the root from `Storage`.

    `version`: the etag without quotes on an object store, `<size>-<mtime_ns>` on a local disk. `md5`: of the content, in
    hexadecimal, where the store vouches for it and was asked for this one file; a listing doesn't know it.
    """

    path: str
    num_bytes: int
    version: str
    md5: str | None = field(default=None, compare=False)


class Client(Protocol):
    """Operations on full names (an absolute path or a URL). Raises our errors only; safe to call from many threads."""

    can_replace: bool
    """Is `write` with a version decided by the store itself (or under a lock all writers take)?"""

    def find(self, folder: str) -> Iterator[FileInfo]:
        """Every file below, in any order, never from a cache. Nothing when there is no such folder."""

    def list_folder(self, folder: str) -> tuple[list[FileInfo], list[str]]:
        """Files and folders right below."""

    def info(self, name: str) -> FileInfo | None: ...

    def read(self, name: str) -> tuple[bytes, str]:
        """Content, and the version it belongs to. NotFound."""

    def read_range(self, name: str, start: int, num_bytes: int, version: str) -> bytes:
        """These bytes of that version, from many threads at once. NotFound; Conflict when it is another version."""

    def open(self, name: str, block_bytes: int) -> "StoreFile": ...

    def write(self, name: str, data: bytes | memoryview, if_version: str | None) -> str:
        """All or nothing; the new version. `if_version`: None, ABSENT (AlreadyExists) or a version (Conflict)."""

    def delete(self, name: str) -> None:
        """A missing file is fine."""


Mapped = Callable[[str], AbstractContextManager[None]]


class StoreFile(io.BufferedIOBase):
    """A seekable file of a store whose failures are ours: NotFound or Conflict when it changed under the reader.

    `verify` runs at the first close and raises when what was read may not be one version; it must not need the file
    open after it returns.
    """

    def __init__(self, raw: object, name: str, version: str, mapped: Mapped, verify: Callable[[], None]) -> None:
        super().__init__()
        self._raw, self._mapped, self._verify = cast(BinaryIO, raw), mapped, verify
        self.file_name, self.version = name, version

    def read(self, size: int | None = -1, /) -> bytes:
        with self._mapped(self.file_name):
            return self._raw.read(-1 if size is None else size)

    def read1(self, size: int = -1, /) -> bytes:
        return self.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def verify(self) -> None:
        """Raise when the file changed since it was opened, as far as its store can tell."""
        with self._mapped(self.file_name):
            self._verify()

    def close(self) -> None:
        if self.closed:
            return
        try:
            self.verify()
        finally:
            try:
                self._raw.close()
            finally:
                super().close()


def error_code(error: BaseException | None) -> str:
    """The store's own code, '' when there is none."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def is_missing(error: BaseException) -> bool:
    code = error_code(error)
    return code in _MISSING_CODES or (not code and isinstance(error, FileNotFoundError | NotADirectoryError))


def is_refused(error: BaseException) -> bool:
    """Did the store refuse because of the condition that we sent?"""
    return error_code(error) in _REFUSED_CODES or isinstance(error, FileExistsError)


def is_unsupported(error: StorageError) -> bool:
    """Given that the same request works without a condition: is it the condition that the store can't do?"""
    cause, code = error.__cause__, error_code(error)
    if code:
        return code not in _BUSY_CODES
    unlinkable = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK}
    return isinstance(cause, NotImplementedError | TypeError | ValueError) or (
        isinstance(cause, OSError) and cause.errno in unlinkable
    )


def _explain(error: BaseException) -> str:
    code = error_code(error)
    number = error.errno if isinstance(error, OSError) else None
    if code:
        reason, mend = _BY_CODE.get(code, (f"the store answered {code}", "ask whoever keeps the store"))
    elif number in _BY_ERRNO:
        reason, mend = _BY_ERRNO[number]
    else:
        reason, mend = f"it failed with {type(error).__name__}", "look at the exception behind this one"
    return f"{reason}; {mend}"


def make_error(action: str, name: str, error: BaseException, explanation: str = "") -> StorageError:
    return StorageError(f"cannot {action} {name}: {explanation or _explain(error)}")


def make_read_error(name: str, error: BaseException, explanation: str = "") -> StorageError:
    if is_missing(error):
        return NotFound(f"no such file: {name}")
    return make_error("read", name, error, explanation)


class mapped_os_errors(AbstractContextManager[None]):
    """For a local disk. Reading a missing file is NotFound; all else StorageError.

    No generator: on Python 3.12 one that raises leaves the error and all callers' frames in a ring, and with them whatever
    they hold, a part of 8 MiB say, until the collector comes by.
    """

    def __init__(self, name: str, action: str = "read") -> None:
        self._name, self._action = name, action

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, OSError):
            name, action = self._name, self._action
            raise (make_read_error(name, error) if action == "read" else make_error(action, name, error)) from error
