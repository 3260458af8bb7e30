"""Which shards go into which part: neighbours in order, whole shards, about the wanted size. Pure and deterministic."""

from collections.abc import Sequence
from dataclasses import dataclass

# A part holds whole shards, which are at most about so large; all of it is in memory when it is written.
MAX_TARGET_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Source:
    """A shard file: its number, its size, the rows in it, and the digest of its footer, which covers the whole file."""

    shard: int
    num_bytes: int
    num_rows: int
    footer_sha256: str


def cut_parts(sources: Sequence[Source], target_bytes: int) -> list[list[Source]]:
    """Parts of at most half as much again as the target, unless a shard alone is more, and none under half of it but the
    last, unless its neighbours are too large."""
    parts: list[list[Source]] = []
    size = 0
    for source in sorted(sources, key=lambda source: source.shard):
        if not parts or abs(size - target_bytes) <= abs(size + source.num_bytes - target_bytes):
            parts.append([])
            size = 0
        parts[-1].append(source)
        size += source.num_bytes
    return parts
