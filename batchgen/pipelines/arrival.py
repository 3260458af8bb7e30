"""Has the input of a partition arrived? A marker object that is there, or a listing that has stayed the same for a while.

The while is watched here, on the monotonic clock: a scheduler that is started anew begins to watch anew, which can only
make it wait longer. A store that does not answer is an input that is not there yet.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from batchgen.errors import InputError, StorageError
from batchgen.pipelines.calendar import parse_key
from batchgen.pipelines.decide import Arrival
from batchgen.pipelines.graph import make_date_values
from batchgen.pipelines.partitions import Partition
from batchgen.pipelines.spec import PipelineSpec
from batchgen.pipelines.template import render
from batchgen.storage import Storage, list_inputs

# Listings of a large folder cost money: one a minute. And so do markers of many partitions: one looks for ten a second.
LOOK_INTERVAL_S = 60.0
MARKER_INTERVAL_S = 0.1
FORGET_S = 3600.0


@dataclass(frozen=True, slots=True)
class _Seen:
    digest: str
    since: float
    looked_at: float


class Watch:
    """Of one pipeline. `monotonic`: a clock that never jumps (s)."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._seen: dict[str, _Seen] = {}
        self._missed: dict[str, float] = {}

    def forget(self) -> None:
        """What nobody has asked for in a while."""
        oldest = self._monotonic() - FORGET_S
        self._seen = {url: seen for url, seen in self._seen.items() if seen.looked_at > oldest}
        self._missed = {url: at for url, at in self._missed.items() if at > oldest}

    def look(self, spec: PipelineSpec, key: str, partition: Partition, num_waiting: int = 1) -> Arrival:
        """Is everything there that a partition of this date waits for? `num_waiting`: so many of them do. Raises
        StorageError for a marker's store."""
        values = make_date_values(spec, parse_key(key), partition)
        for wait in spec.wait_for:
            if wait.marker is not None:
                marker = str(render(wait.marker, values))
                if not self._is_there(marker, num_waiting):
                    return Arrival(False, f"{marker} is not there")
            else:
                listing = str(render(wait.stable, values))
                if (missing := self._find_unstable(listing, wait.unchanged_for)) is not None:
                    return Arrival(False, missing)
        return Arrival(True)

    def _is_there(self, url: str, num_waiting: int) -> bool:
        now = self._monotonic()
        pause_s = min(LOOK_INTERVAL_S, MARKER_INTERVAL_S * (num_waiting - 1))
        if url in self._missed and now - self._missed[url] < pause_s:
            return False
        if is_there(url):
            return True
        self._missed[url] = now
        return False

    def _find_unstable(self, url: str, unchanged_for_s: float) -> str | None:
        """Why the listing is not to be trusted yet; None when it is."""
        now, seen = self._monotonic(), self._seen.get(url)
        if seen is None or now - seen.looked_at >= min(LOOK_INTERVAL_S, unchanged_for_s):
            digest = make_digest(url)
            since = seen.since if seen is not None and seen.digest == digest else now
            seen = self._seen[url] = _Seen(digest, since, now)
        if not seen.digest:
            return f"{url} has no files"
        if now - seen.since < unchanged_for_s:
            return f"{url} has changed in the last {unchanged_for_s:g} s"
        return None


def is_there(url: str) -> bool:
    folder, _, name = Storage(url).root.rpartition("/")
    return Storage(folder or "/").info(name) is not None


def make_digest(url: str) -> str:
    """Of names, sizes and versions; '' where there is nothing to be seen."""
    try:
        found = list_inputs(url)
    except (InputError, StorageError):
        return ""
    return hashlib.sha256(repr([(info.path, info.num_bytes, info.version) for info in found]).encode()).hexdigest()
