"""A run's last words, written only where no later run has spoken.

A driver may be frozen for minutes between two requests, and wake up when its successor has taken the folder over and
finished the job: what it still writes must not replace what its successor wrote. So the versions of all that is rewritten
at the end of a run are looked at while the lease is surely ours, and each is replaced only if it is still that version.
(On a store without conditional writes it is a look and a write, and no promise.)
"""

from collections.abc import Callable, Iterable
from contextlib import suppress

from batchgen.errors import AlreadyExists, Conflict, LeaseLost
from batchgen.storage import Storage

Put = Callable[[str, bytes], None]


class Fence:
    """`check` raises LeaseLost where the lease may not be ours any more; it is asked after the versions were. Where
    another's last words stand and the lease is ours, they are a predecessor's that came too late."""

    def __init__(self, storage: Storage, paths: Iterable[str], check: Callable[[], None]) -> None:
        self._storage = storage
        self._check = check
        infos = {path: storage.info(path) for path in paths}
        check()
        self._versions = {path: None if info is None else info.version for path, info in infos.items()}

    def has(self, path: str) -> bool:
        """Does one of the paths stand?"""
        return self._versions[path] is not None

    def put(self, path: str, data: bytes) -> None:
        """One of the paths, any number of times. Raises LeaseLost when another run has written it."""
        version = self._versions[path]
        try:
            if version is None:
                self._versions[path] = self._storage.create(path, data)
            else:
                self._versions[path] = self._storage.replace(path, data, version)
        except (AlreadyExists, Conflict) as error:
            self._versions[path] = self._find_own(path, data, error)

    def _find_own(self, path: str, data: bytes, error: Exception) -> str:
        """After a lost reply what stands there is our own."""
        where = self._storage.url(path)
        if self._storage.info(path) is not None:
            standing, version = self._storage.read_versioned(path)
            if standing == data:
                return version
            self._check()
            with suppress(Conflict):
                return self._storage.replace(path, data, version)
        raise LeaseLost(f"another run went on with this folder meanwhile, and wrote {where}; start it again") from error
