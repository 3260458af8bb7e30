"""Where a fingerprint's answer lies in earlier outputs: pairs of 8 bytes each, sorted, on local disk beyond a bound.

Built from two columns of the shard files (`row_fingerprint`, `status`), one file after the other; of rows with a generation
only. A pair is the first half of a fingerprint and a place (file number, row in the file): 16 bytes a row. Up to
`MAX_ROWS_IN_MEMORY` they are sorted in memory, 40 bytes a row while that takes; beyond it they lie in two unnamed files of
the temporary folder, which are mapped, and one 256th of them is sorted at a time. So a billion rows take 16 GB of disk (32
while they are sorted), and of memory what the system likes to keep of it. A half may be that of another fingerprint:
whoever reads the row compares the whole.
"""

import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchgen.reuse.fingerprint import NUM_BYTES

MAX_ROWS_IN_MEMORY = 2**24
# Of keys that are there several times: in two outputs of which one reused the other nearly all are.
MAX_TURNS = 2**20
NUM_BUCKETS = 256
ROW_BITS = 32
PAIR = np.dtype([("key", "<u8"), ("place", "<u8")])

Pairs = npt.NDArray[Any]
# (number of the file, row in it)
Place = tuple[int, int]


class ReuseIndex:
    """Sorted pairs. Equal keys stand in the order they were added."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        self.keys = pairs["key"]
        # Of a key that is there several times the next place is given at each time it is asked for, round and round; from
        # the first again where there are too many to remember.
        self._turns: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def num_bytes(self) -> int:
        return int(self._pairs.nbytes)

    def find(self, fingerprints: Sequence[bytes]) -> list[Place | None]:
        """A place that may hold each of them; None where there is none."""
        keys = np.frombuffer(b"".join(fingerprints), "<u8")[:: NUM_BYTES // 8]
        starts, ends = np.searchsorted(self.keys, keys, "left"), np.searchsorted(self.keys, keys, "right")
        return [
            self._choose(int(key), int(start), int(end)) for key, start, end in zip(keys, starts, ends, strict=True)
        ]

    def _choose(self, key: int, start: int, end: int) -> Place | None:
        if start == end:
            return None
        turn = 0
        if end - start > 1:
            turn = self._turns.get(key, 0)
            if len(self._turns) >= MAX_TURNS:
                self._turns.clear()
            self._turns[key] = turn + 1
        place = int(self._pairs["place"][start + turn % (end - start)])
        return place >> ROW_BITS, place & (2**ROW_BITS - 1)


def make_pairs(file_number: int, rows: pa.Table) -> Pairs:
    """Of the generations of one file. `rows`: its columns row_fingerprint and status."""
    prints = rows["row_fingerprint"].combine_chunks()
    is_kept = pc.and_(pc.is_valid(prints), pc.equal(rows["status"].combine_chunks(), "ok"))
    places = np.flatnonzero(is_kept.to_numpy(zero_copy_only=False)).astype("<u8")
    kept = prints.filter(is_kept)
    pairs = np.empty(len(places), PAIR)
    if len(places):
        start, step = kept.offset * NUM_BYTES, len(kept) * NUM_BYTES
        pairs["key"] = np.frombuffer(kept.buffers()[1], np.uint8)[start : start + step].view("<u8")[:: NUM_BYTES // 8]
        pairs["place"] = places | np.uint64(file_number << ROW_BITS)
    return pairs


def build_index(parts: Iterable[Pairs]) -> ReuseIndex:
    """All pairs, sorted. Raises OSError where the temporary folder is full."""
    with tempfile.TemporaryFile(prefix="batchgen-reuse-") as unsorted:
        counts = np.zeros(NUM_BUCKETS, np.int64)
        for part in parts:
            counts += np.bincount(_choose_buckets(part), minlength=NUM_BUCKETS)
            unsorted.write(part.tobytes())
        unsorted.flush()
        num_rows = int(counts.sum())
        if num_rows == 0:
            return ReuseIndex(np.empty(0, PAIR))
        found = np.memmap(unsorted, PAIR, "r", shape=(num_rows,))
        if num_rows <= MAX_ROWS_IN_MEMORY:
            return ReuseIndex(_sort(np.array(found)))
        return ReuseIndex(_sort_by_bucket(found, counts))


def _sort_by_bucket(found: Pairs, counts: npt.NDArray[np.int64]) -> Pairs:
    """Into a mapped file that has no name: it goes when the index does."""
    ends = np.cumsum(counts)
    nexts = ends - counts
    with tempfile.TemporaryFile(prefix="batchgen-reuse-") as file:
        file.truncate(len(found) * PAIR.itemsize)
        made = np.memmap(file, PAIR, "r+", shape=(len(found),))
    for start in range(0, len(found), MAX_ROWS_IN_MEMORY):
        part = found[start : start + MAX_ROWS_IN_MEMORY]
        buckets = _choose_buckets(part)
        order = np.argsort(buckets, kind="stable")
        borders = np.searchsorted(buckets[order], np.arange(NUM_BUCKETS + 1))
        for number in range(NUM_BUCKETS):
            rows = part[order[borders[number] : borders[number + 1]]]
            made[nexts[number] : nexts[number] + len(rows)] = rows
            nexts[number] += len(rows)
    for start, end in zip(ends - counts, ends, strict=True):
        made[start:end] = _sort(made[start:end])
    return made


def _sort(pairs: Pairs) -> Pairs:
    return pairs[np.argsort(pairs["key"], kind="stable")]


def _choose_buckets(pairs: Pairs) -> npt.NDArray[np.int64]:
    return (pairs["key"] >> np.uint64(56)).astype(np.int64)
