"""Has the input of a run arrived? A marker object that is there, or a listing that has stayed the same for a while.

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
from batchgen.pipelines.spec import PipelineSpec
from batchgen.pipelines.template import render
from batchgen.storage import Storage, list_inputs

# Listings of a large folder cost money: one a minute.
LOOK_INTERVAL_S = 60.0


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

    def look(self, spec: PipelineSpec, key: str) -> Arrival:
        """Is everything there that the run of this date waits for? Raises StorageError for a marker's store."""
        values = make_date_values(spec, parse_key(key))
        for wait in spec.wait_for:
            if wait.marker is not None:
                marker = str(render(wait.marker, values))
                if not is_there(marker):
                    return Arrival(False, f"{marker} is not there")
            else:
                listing = str(render(wait.stable, values))
                if (missing := self._find_unstable(listing, wait.unchanged_for)) is not None:
                    return Arrival(False, missing)
        return Arrival(True)

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
