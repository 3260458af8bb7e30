"""Deletes the outputs of a retired run, a part at a time, in an order that misleads nobody when it is cut short.

The pointer of its date goes first, then `_SUCCESS`, so that nobody takes the rest for a whole dataset; then the data, and
what a job needs to know of itself last. Only names that a job writes: what somebody else put there stays.
"""

from collections.abc import Sequence

from batchgen.pipelines.graph import FILTERED
from batchgen.pipelines.publish import unpublish
from batchgen.storage import Storage

# What a job writes, in the order in which it goes.
_ORDER = ("_SUCCESS", "manifest.json", "report.", "data/", "batch_stats/", "_batchgen/", "shard-")


def delete_some(outputs: Sequence[str], publish: str | None, key: str, max_files: int) -> bool:
    """Delete up to so many files; is all gone? Goes on where it stopped, however it was stopped."""
    if publish is not None:
        unpublish(Storage(publish), key)
    left = max_files
    for output in [*outputs, *(f"{output}{FILTERED}" for output in outputs)]:
        storage = Storage(output)
        paths = [info.path for info in storage.list_files()]
        own = [path for start in _ORDER for path in paths if path.startswith(start)]
        first = [path for path in own if path == "_SUCCESS"]
        storage.delete_many(first)
        storage.delete_many(own[len(first) : left])
        left -= len(own)
        if left < 0:
            return False
    return True
