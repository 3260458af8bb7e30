"""What a gate asks of committed files: from their footers, where the worker counted by the same rules; else from the rows,
which are read again, so many files at a time.

Rows are read where the limits are others than those that the files were made with, and where a canary ends within a file.
For duplicates each file has a sample of its texts' digests (`texts`) in its footer, where its maker was asked for one: that
is read here, because nobody keeps it.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from threading import BoundedSemaphore, Lock

import pyarrow as pa

from batchgen.batches import FileFooter, GateCounts
from batchgen.gates.count import Rules, make_counter, make_rules
from batchgen.gates.decide import Counts, list_unasked
from batchgen.gates.texts import (
    MAX_ADDED,
    MAX_DIGESTS,
    Digests,
    TextTally,
    digest_texts,
    make_text_sample,
)
from batchgen.manifest import CommittedShard
from batchgen.parquet import ParquetFile
from batchgen.spec import JobSpec
from batchgen.specs.gates import FinalGate, RateLimits
from batchgen.storage import Storage
from batchgen.verify.damage import RESTORE, refusing_damage
from batchgen.worker.shard_footer import read_text_sample

NUM_FOOTER_THREADS = 32
# Of those that may read rows at the same time.
NUM_SCAN_THREADS = 8
# Of each thread: a row group holds 64 times as many, whose texts together may be more than a driver has room for.
BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Part:
    """The first `num_rows` of a file. `needs_counts`: its footer does not know what is asked."""

    shard: CommittedShard
    num_rows: int
    needs_counts: bool


@dataclass(frozen=True, slots=True)
class Scan:
    """What is to be done for one gate. `compares_texts`: are duplicates asked for?"""

    storage: Storage
    rules: Rules
    parts: tuple[Part, ...]
    compares_texts: bool

    @property
    def must_read(self) -> bool:
        return self.compares_texts or any(part.needs_counts for part in self.parts)

    def run(self) -> Counts:
        """Blocking where it must read. Raises StorageError, and OutputError where a file is damaged."""
        if not self.must_read:
            return _add(_count_footer(part.shard.footer) for part in self.parts)
        looks = _Looks(self)
        with ThreadPoolExecutor(NUM_FOOTER_THREADS, thread_name_prefix="gate") as threads:
            counts = _add(threads.map(looks.look, self.parts))
        repeats = Counts(num_hashed=looks.texts.num_answers, num_repeated=looks.texts.count_repeated())
        return counts.add(repeats)


class _Looks:
    """At the files of a scan, by many threads. `texts` is what they said so far: nothing waits for a slow file."""

    def __init__(self, scan: Scan) -> None:
        self._scan, self._count = scan, make_counter(scan.rules)
        self._room, self._lock = BoundedSemaphore(NUM_SCAN_THREADS), Lock()
        # What is read of rows has room for more digests than a footer has: of few files all, so nothing is estimated.
        self._max_digests = max(MAX_DIGESTS, MAX_ADDED // max(1, len(scan.parts)))
        self.texts = TextTally()

    def look(self, part: Part) -> Counts:
        scan, shard, sample = self._scan, part.shard, None
        if scan.compares_texts:
            sample = read_text_sample(scan.storage, shard.info.path, shard.footer_sha256)
        reads_texts = scan.compares_texts and sample is None
        columns = {*(scan.rules.columns if part.needs_counts else ()), *(("status", "text") if reads_texts else ())}
        counts, digests = Counts() if part.needs_counts else _count_footer(shard.footer), list[Digests]()
        with self._room if columns else nullcontext():
            for rows in _iter_rows(scan.storage, part, sorted(columns)) if columns else ():
                if part.needs_counts:
                    num_errors = rows.num_rows - rows["status"].to_pylist().count("ok")
                    counts = counts.add(_make_counts(rows.num_rows, num_errors, self._count(rows)))
                if reads_texts:
                    digests.append(digest_texts(rows))
        sample = make_text_sample(digests, self._max_digests) if reads_texts else sample
        if sample is not None:
            with self._lock:
                self.texts.add(sample)
        return counts


def make_scan(
    storage: Storage, shards: Iterable[CommittedShard], spec: JobSpec, gate: RateLimits, max_rows: int | None = None
) -> Scan:
    """Of the first `max_rows` output rows of these files, in their order; of all without."""
    rules, unasked = make_rules(spec), list_unasked(gate)
    parts, num_rows = [], 0
    for shard in shards:
        held = shard.footer.num_rows_ok + shard.footer.num_rows_error
        taken = held if max_rows is None else min(held, max_rows - num_rows)
        if taken > 0:
            is_known = taken == held and _knows(shard.footer, rules, unasked)
            parts.append(Part(shard, taken, needs_counts=not is_known))
            num_rows += taken
    return Scan(storage, rules, tuple(parts), isinstance(gate, FinalGate) and gate.max_duplicate_rate is not None)


def _knows(footer: FileFooter, rules: Rules, unasked: set[str]) -> bool:
    """Does it tell all that is asked? Of texts only by the same rules."""
    asked = {"truncated", "tokens", "refused", "unfit"} - unasked
    if footer.gates is None:
        return not asked
    return not asked & {"refused", "unfit"} or footer.gates.rules == rules.digest


def _count_footer(footer: FileFooter) -> Counts:
    return _make_counts(footer.num_rows_ok + footer.num_rows_error, footer.num_rows_error, footer.gates)


def _make_counts(num_rows: int, num_errors: int, known: GateCounts | None) -> Counts:
    if known is None:
        return Counts(rows=num_rows, errors=num_errors)
    return Counts(num_rows, num_errors, known.truncated, known.refused or 0, known.unfit or 0, known.tokens)


def _add(found: Iterable[Counts]) -> Counts:
    total = Counts()
    for counts in found:
        total = total.add(counts)
    return total


def _iter_rows(storage: Storage, part: Part, columns: Sequence[str]) -> Iterator[pa.Table]:
    path, left = part.shard.info.path, part.num_rows
    with storage.open_read(path) as source:
        with refusing_damage(storage.url(path), f"is damaged; {RESTORE}"):
            batches = ParquetFile(source).iter_batches(BATCH_ROWS, columns=list(columns))
        while left > 0:
            with refusing_damage(storage.url(path), f"is damaged; {RESTORE}"):
                if (batch := next(batches, None)) is None:
                    return
            rows = pa.Table.from_batches([batch.slice(0, left)])
            left -= rows.num_rows
            yield rows
