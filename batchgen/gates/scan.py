"""What a gate asks of committed files: from their footers, where the worker counted by the same rules; else from the rows,
which are read again, so many files at a time.

Rows are read where the limits are others than those that the files were made with, where a canary ends within a file, and
for duplicates: a text may stand in two files. Texts are known by 8 bytes of digest; of more than `MAX_HASHES` answers those
are kept whose digests are chosen by themselves, so that what repeats is kept or left out together.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from batchgen.batches import FileFooter, GateCounts
from batchgen.gates.count import Hashes, Rules, hash_texts, make_counter, make_rules
from batchgen.gates.decide import Counts, list_unasked
from batchgen.manifest import CommittedShard
from batchgen.parquet import ParquetFile
from batchgen.spec import JobSpec
from batchgen.specs.gates import FinalGate, RateLimits
from batchgen.storage import Storage
from batchgen.verify.damage import RESTORE, refusing_damage

MAX_HASHES = 2**21
NUM_SCAN_THREADS = 8
# Of each thread: a row group holds 64 times as many, whose texts together may be more than a driver has room for.
BATCH_ROWS = 256
NO_HASHES = np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True)
class Part:
    """The first `num_rows` of a file. `needs_counts`: its footer does not know what is asked."""

    shard: CommittedShard
    num_rows: int
    needs_counts: bool


@dataclass(frozen=True, slots=True)
class Scan:
    """What is to be done for one gate. `step`: of the texts' digests those are kept that it divides; None: none."""

    storage: Storage
    rules: Rules
    parts: tuple[Part, ...]
    step: int | None

    @property
    def must_read(self) -> bool:
        return self.step is not None or any(part.needs_counts for part in self.parts)

    def run(self) -> Counts:
        """Blocking where it must read. Raises StorageError, and OutputError where a file is damaged."""
        if not self.must_read:
            return _add(_count_footer(part.shard.footer) for part in self.parts)
        count = make_counter(self.rules)
        with ThreadPoolExecutor(NUM_SCAN_THREADS, thread_name_prefix="gate") as threads:
            found = list(threads.map(lambda part: self._look(part, count), self.parts))
        hashes = np.concatenate([NO_HASHES, *(kept for _, kept in found)])
        repeats = Counts(num_hashed=len(hashes), num_repeated=len(hashes) - len(np.unique(hashes)))
        return _add(counts for counts, _ in found).add(repeats)

    def _look(self, part: Part, count: Callable[[pa.Table], GateCounts]) -> tuple[Counts, Hashes]:
        counts, hashes = Counts() if part.needs_counts else _count_footer(part.shard.footer), [NO_HASHES]
        columns = set(self.rules.columns if part.needs_counts else ()) | ({"status", "text"} if self.step else set())
        for rows in _iter_rows(self.storage, part, sorted(columns)) if columns else ():
            if part.needs_counts:
                num_errors = rows.num_rows - rows["status"].to_pylist().count("ok")
                counts = counts.add(_make_counts(rows.num_rows, num_errors, count(rows)))
            if self.step is not None:
                hashes.append(hash_texts(rows, self.step))
        return counts, np.concatenate(hashes)


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
    wants_hashes = isinstance(gate, FinalGate) and gate.max_duplicate_rate is not None
    return Scan(storage, rules, tuple(parts), max(1, -(-num_rows // MAX_HASHES)) if wants_hashes else None)


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
