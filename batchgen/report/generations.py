"""A few rows of the output for the page: the only part of a report that reads rows, and only where somebody asked for it.

Which rows they are follows from the job's fingerprint, so that two reports of one dataset show the same ones. Of each file
only the row groups that hold them are read.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

from batchgen.manifest import CommittedShard
from batchgen.parquet import ParquetFile
from batchgen.storage import Storage
from batchgen.verify.damage import RESTORE, refusing_damage

MAX_CHARS = 4000
COLUMNS = [
    *("custom_id", "source_file", "source_row", "sample_index", "text", "reasoning"),
    *("finish_reason", "error_type", "completion_tokens"),
]


def choose_rows(fingerprint: str, sizes: Iterable[int], count: int) -> list[tuple[int, int]]:
    """(file, row in it) of `count` rows, spread over all by the fingerprint; in order, each once."""
    counts = list(sizes)
    total = sum(counts)
    chosen: set[int] = set()
    for place in range(min(count, total)):
        digest = hashlib.sha256(f"{fingerprint}:{place}".encode()).digest()
        row = int.from_bytes(digest[:8], "big") % total
        while row in chosen:
            row = (row + 1) % total
        chosen.add(row)
    return list(_locate(sorted(chosen), counts))


def _locate(rows: list[int], counts: list[int]) -> Iterable[tuple[int, int]]:
    start, place = 0, 0
    for number, size in enumerate(counts):
        while place < len(rows) and rows[place] < start + size:
            yield number, rows[place] - start
            place += 1
        start += size


def read_generations(
    storage: Storage, committed: Iterable[CommittedShard], fingerprint: str, count: int
) -> list[dict[str, Any]]:
    """Raises StorageError, and OutputError where a file is damaged."""
    shards = sorted(committed, key=lambda shard: shard.footer.shard)
    sizes = [shard.footer.num_rows_ok + shard.footer.num_rows_error for shard in shards]
    chosen = choose_rows(fingerprint, sizes, count)
    return [_read_row(storage, shards[number].info.path, row) for number, row in chosen]


def _read_row(storage: Storage, path: str, row: int) -> dict[str, Any]:
    with refusing_damage(storage.url(path), f"is damaged; {RESTORE}"), storage.open_read(path) as source:
        parquet = ParquetFile(source)
        group = 0
        while row >= (size := parquet.metadata.row_group(group).num_rows):
            group, row = group + 1, row - size
        found: dict[str, Any] = parquet.read_row_group(group, columns=COLUMNS).slice(row, 1).to_pylist()[0]
    for name in ("text", "reasoning"):
        if found[name] and len(found[name]) > MAX_CHARS:
            found[name] = found[name][:MAX_CHARS] + "\n[cut here]"
    return found
