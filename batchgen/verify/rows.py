"""What is checked of rows, batches and plans when a finished folder is verified. Pure: tables and values in, findings out.

Rows are compared with what the frozen plan says must be there: since every shard's rows are exactly the planned ones in
order, and the plan's shards follow each other without gap or overlap, no row is missing or twice, and no memory is
needed to know it. Only the user's own keys have to be remembered: 8 bytes a row (`KeyCheck`).
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.batches import FileFooter
from batchgen.records import InputFile, Shard

AGAIN = "restore it from a copy, or delete it and run the job again: its rows are then generated again"
RESTORE = "restore it from a copy"
# Key hashes are compared in as many parts, so that comparing takes little beside holding them.
NUM_KEY_PARTS = 16
# Columns of which the checks need the values.
CHECKED = (
    *("custom_id", "source_file", "source_row", "sample_index", "completion_tokens", "finish_reason", "status"),
    *("error_type", "error_message", "is_retryable", "batch_id"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: where, what, and the mend. Never text of a row."""

    where: str
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.mend}"


@dataclass(slots=True)
class RowCheck:
    """The rows of one shard file, taken in from the first to the last. `has_own_keys`: custom_id is the user's."""

    shard: Shard
    n: int
    has_own_keys: bool
    num_rows: int = 0
    num_ok: int = 0
    num_error: int = 0
    num_retryable: int = 0
    batches: dict[str, tuple[int, int]] = field(default_factory=dict)
    hashes: "array[int]" = field(default_factory=lambda: array("q"))
    faults: dict[str, None] = field(default_factory=dict)
    _key: str | None = None

    def add(self, rows: pa.Table) -> None:
        """The next rows, in the order of the file."""
        self._check_order(rows)
        self._check_keys(rows)
        self._check_states(rows)
        self._count(rows)
        self.num_rows += rows.num_rows

    def _check_order(self, rows: pa.Table) -> None:
        slots = pa.array(range(self.num_rows, self.num_rows + rows.num_rows), pa.int64())
        steps = pc.divide(slots, self.n)
        wrong = [
            pc.not_equal(rows["source_file"], self.shard.file.path),
            pc.not_equal(rows["source_row"], pc.add(steps, self.shard.row_start)),
            pc.not_equal(pc.cast(rows["sample_index"], pa.int64()), pc.subtract(slots, pc.multiply(steps, self.n))),
        ]
        place = _find_first(pc.or_(pc.or_(wrong[0], wrong[1]), wrong[2]))
        if place is not None:
            row, sample = divmod(self.num_rows + place, self.n)
            self._fault(
                f"the row at place {self.num_rows + place} is not row {self.shard.row_start + row}, sample {sample}"
            )

    def _check_keys(self, rows: pa.Table) -> None:
        if self.has_own_keys:
            self._take_keys(rows["custom_id"].to_pylist())
            return
        made = pc.binary_join_element_wise(rows["source_file"], pc.cast(rows["source_row"], pa.string()), ":")
        unread = pc.fill_null(pc.equal(rows["error_type"], "unreadable_input"), False)
        wrong = pc.and_(pc.fill_null(pc.not_equal(rows["custom_id"], made), True), pc.invert(unread))
        place = _find_first(wrong)
        if place is not None:
            self._fault(f"the custom_id at place {self.num_rows + place} is not the one made from file and row")

    def _take_keys(self, keys: Sequence[str | None]) -> None:
        for place, key in enumerate(keys, self.num_rows):
            if place % self.n == 0:
                self._key = key
                if key is not None:  # of a row that could not be read, or whose key is no text
                    self.hashes.append(hash(key))
            elif key != self._key:
                self._fault(f"the samples of one row differ in custom_id at place {place}")

    def _check_states(self, rows: pa.Table) -> None:
        is_ok, is_error = pc.equal(rows["status"], "ok"), pc.equal(rows["status"], "error")
        has_answer = pc.is_valid(rows["finish_reason"])
        told = [pc.is_valid(rows[name]) for name in ("error_type", "error_message", "is_retryable")]
        as_error = pc.and_(pc.and_(told[0], pc.and_(told[1], told[2])), pc.invert(has_answer))
        as_ok = pc.and_(pc.invert(pc.or_(told[0], pc.or_(told[1], told[2]))), has_answer)
        right = pc.or_(pc.and_(is_ok, as_ok), pc.and_(is_error, as_error))
        place = _find_first(pc.invert(pc.fill_null(right, False)))
        if place is not None:
            self._fault(
                f"the row at place {self.num_rows + place} is neither a generation nor an error with its reason"
            )

    def _count(self, rows: pa.Table) -> None:
        is_ok = pc.fill_null(pc.equal(rows["status"], "ok"), False)
        num_ok = pc.sum(is_ok).as_py() or 0
        self.num_ok += num_ok
        self.num_error += rows.num_rows - num_ok
        self.num_retryable += pc.sum(rows["is_retryable"]).as_py() or 0
        counted = pa.table({"batch_id": rows["batch_id"], "ok": is_ok, "tokens": rows["completion_tokens"]})
        for row in counted.group_by("batch_id").aggregate([("ok", "sum"), ("tokens", "sum")]).to_pylist():
            ok, tokens = self.batches.get(row["batch_id"], (0, 0))
            self.batches[row["batch_id"]] = (ok + row["ok_sum"], tokens + (row["tokens_sum"] or 0))

    def _fault(self, what: str) -> None:
        """The first of its kind is enough: one dropped row moves all that follow."""
        if not any(known.split(" at place ")[0] == what.split(" at place ")[0] for known in self.faults):
            self.faults[what] = None

    def list_faults(self, footer: FileFooter) -> list[str]:
        """What is wrong with the rows, and with what the footer says of them."""
        expected = self.shard.num_rows * self.n
        faults = list(self.faults)
        if self.num_rows != expected:
            faults.append(f"holds {self.num_rows} rows where {expected} were planned")
        counted = (self.num_ok, self.num_error, self.num_retryable)
        if counted != (footer.num_rows_ok, footer.num_rows_error, footer.num_rows_retryable):
            faults.append("its footer counts other rows than it has (ok, error, retryable)")
        if unknown := self.batches.keys() - {batch.batch_id for batch in footer.batches}:
            faults.append(f"its footer has no stats of the batch {min(map(str, unknown))}")
        return faults


def _find_first(mask: pa.ChunkedArray) -> int | None:
    """Place of the first true or null."""
    place: int = pc.index(pc.fill_null(mask, True), True).as_py()
    return None if place < 0 else place


class KeyCheck:
    """Is every key of the user's there for one row only? Holds 8 bytes a row: hashes, of which two equal ones make their
    key a suspect. Two keys with one hash are no finding: suspects are looked at again (`confirm`)."""

    def __init__(self) -> None:
        self._hashes = array("q")

    def add(self, hashes: Iterable[int]) -> None:
        self._hashes.extend(hashes)

    def list_suspects(self) -> set[int]:
        """Hashes that are there more than once."""
        held = pa.Array.from_buffers(pa.int64(), len(self._hashes), [None, pa.py_buffer(self._hashes)])
        suspects: set[int] = set()
        for part in range(NUM_KEY_PARTS):
            counts = held.filter(pc.equal(pc.bit_wise_and(held, NUM_KEY_PARTS - 1), part)).value_counts()
            suspects.update(counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist())
        return suspects


def confirm_repeated(keys: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(place, place of the first) of each key that is there again. `keys`: (key, place) of suspects, each row once."""
    first: dict[str, str] = {}
    for key, place in keys:
        if key in first:
            yield place, first[key]
        else:
            first[key] = place


def check_plan(files: Sequence[InputFile], shards: Sequence[Shard]) -> list[str]:
    """Do the shards follow each other through the files, without gap or overlap?"""
    faults = [
        f"{file.path}: its row groups don't add up to its rows"
        for file in files
        if sum(file.row_group_rows) != file.num_rows
    ]
    left = [(file.path, file.num_rows) for file in files if file.num_rows]
    number, row = 0, 0
    for place, shard in enumerate(shards):
        while number < len(left) and row == left[number][1]:
            number, row = number + 1, 0
        is_next = number < len(left) and (shard.file.path, shard.row_start) == (left[number][0], row)
        if shard.number != place or not is_next or not row < shard.row_end <= left[number][1]:
            return [*faults, f"{shard.id} does not begin where the one before it ends"]
        row = shard.row_end
    return faults


def check_batches(
    stats: Sequence[Mapping[str, Any]], found: Mapping[str, tuple[int, int]], *, is_exact: bool
) -> Iterator[str]:
    """Batches of data/ (ok rows, completion tokens of each) against the rows of batch_stats: each there, once, and saying
    the same; no less than that where `is_exact` is False: error rows were generated again since."""
    told: dict[str, Mapping[str, Any]] = {}
    for row in stats:
        if row["batch_id"] in told:
            yield f"holds {row['batch_id']} more than once"
        told[row["batch_id"]] = row
    was_replaced = any(row["num_rows_copied"] for row in stats)
    for batch_id in sorted(found):
        if batch_id not in told:
            yield f"has no line for {batch_id}, of which data/ holds rows"
            continue
        said = (told[batch_id]["num_rows_ok"] or 0, told[batch_id]["completion_tokens"] or 0)
        have = found[batch_id]
        if said != have if is_exact and not was_replaced else (said[0] < have[0] or said[1] < have[1]):
            yield (
                f"says {said[0]} ok rows and {said[1]} completion tokens of {batch_id}; data/ holds {have[0]} and {have[1]}"
            )
