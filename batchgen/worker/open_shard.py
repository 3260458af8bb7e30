"""One leased shard while its worker works on it: which rows are finished, their results as Arrow, what is journaled.

Invariants: each (row, sample) is finished at most once, later answers for it are dropped; results without a journal
reference are exactly those that a lost worker would cost; a request that is away is another worker's until it is taken
back. What is journaled may be dropped from memory; the commit reads it back. No I/O, no Ray, one thread (the worker's event
loop) but for `make_parts`.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, product

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.errors import BatchgenError
from batchgen.records import JournalRef, Lease, Result, RowId, ShardProgress, Slot
from batchgen.row_ranges import RowRanges, iter_rows
from batchgen.worker.answer import count_values, make_quarantined
from batchgen.worker.result_batch import make_storable_batch
from batchgen.worker.spilled import Finished, Parts, ReadBack, load_rows, split_carried
from batchgen.write import make_output_table

# Results become Arrow this many rows, or token ids and logprobs, at a time: Python objects of more never pile up, and the
# event loop is never held longer than packing takes: 10 ms for so many logprobs.
BATCH_ROWS = 256
BATCH_VALUES = 2**16


class OpenShard:
    """See the module. `lease` may gain journal references only. `is_wanted`: others wait to read rows of it."""

    def __init__(
        self,
        lease: Lease,
        n: int,
        schema: pa.Schema,
        wanted: Sequence[Slot] | None = None,
        on_packed: Callable[[pa.RecordBatch], None] = lambda _: None,
    ) -> None:
        """`wanted`: the only requests of the shard that are to be made here; None for all. `on_packed`: told of what ended,
        at the latest when it is journaled."""
        self._on_packed = on_packed
        self.lease, self._n, self._schema = lease, n, schema
        self._no_rows = pa.Table.from_batches([], schema)
        self.is_closed = False
        self.error: BatchgenError | None = None
        self.num_inflight = 0
        self.replaced_epoch = 0
        self.is_recovered = self.is_wanted = False
        self.shared_ids: set[str] = set()
        self._away: dict[Slot, str] = {}
        self.num_copied = self.num_recovered = 0
        self.error_types: Counter[str] = Counter()
        self.read_s = self.prepare_s = 0.0
        self._finished = bytearray(lease.shard.num_rows * n)
        self._sent = bytearray(lease.shard.num_rows * n)
        self._num_finished = 0
        self._recovered: list[pa.Table] = []
        self._buffer: list[Result] = []
        self._num_values = 0
        self.num_unflushed_bytes = 0
        # Replaced as a whole, never changed: the commit takes it in another thread.
        self._parts: tuple[Finished, ...] = ()
        self._num_left_out = 0
        self._inputs: list[pa.Table] = []
        self._ended = asyncio.Event()
        self.waiting = set[Slot]()  # for a copy (`reuse.duplicates`)
        if wanted is not None:
            self._leave_out_all_but(wanted)

    def _leave_out_all_but(self, wanted: Sequence[Slot]) -> None:
        places = {self._slot(*slot) for slot in wanted}
        self._finished = bytearray(place not in places for place in range(len(self._finished)))
        self._num_finished = self._num_left_out = len(self._finished) - len(places)

    # ---- what comes in -----------------------------------------------------------------------------------------------

    def recover(self, rows: pa.Table, *, are_copied: bool) -> None:
        """Rows that an earlier attempt finished (from the journal) or that stand in the file to be replaced.

        Of a file to be replaced the journal may still hold the very error rows that are to be tried again."""
        if self.lease.replaces is not None and not are_copied:
            rows = rows.filter(pc.equal(rows["status"], "ok"))
        num_rows = self._take(rows)
        if are_copied:
            self.num_copied += num_rows
        else:
            self.num_recovered += num_rows
        self._check_ended()

    def take_in(self, rows: pa.Table, shared_ids: Iterable[str]) -> None:
        """Rows that other workers journaled meanwhile, their errors too: they tried as we would. `shared_ids`: the batches
        of those that helped."""
        self.shared_ids |= set(shared_ids)
        self.num_recovered += self._take(rows)
        self._check_ended()

    def _take(self, rows: pa.Table) -> int:
        rows = self._pick_new(rows)
        self._recovered.append(rows)
        self.error_types.update(rows["error_type"].drop_null().to_pylist())
        return int(rows.num_rows)

    def _pick_new(self, rows: pa.Table) -> pa.Table:
        """Those that were not finished before; now they are."""
        keys = zip(rows["source_row"].to_pylist(), rows["sample_index"].to_pylist(), strict=True)
        return rows.filter(pa.array([self._mark(row, sample) for row, sample in keys], pa.bool_()))

    def add_inputs(self, inputs: pa.Table) -> None:
        """The next rows' custom_id and passthrough columns (`prepare.make_inputs`), kept until the commit joins them to the
        results."""
        self._inputs.append(inputs)

    def note_sent(self, row_id: RowId) -> None:
        """A request is in flight now, maybe again; the sender says when it is not."""
        self._sent[self._slot(*row_id.slot)] = 1
        self.num_inflight += 1

    def add(self, result: Result) -> None:
        """One request ended. A second answer for the same row and sample is dropped: the first stands."""
        if not self._mark(result.row_id.source_row, result.row_id.sample_index):
            return
        if result.failure is not None:
            self.error_types[result.failure.error_type] += 1
        self._buffer.append(result)
        self._num_values += count_values(result.generation)
        if len(self._buffer) >= BATCH_ROWS or self._num_values >= BATCH_VALUES:
            self._pack()
        self._check_ended()

    def carry(self, rows: pa.Table) -> None:
        """Results that are taken over instead of being generated (`make_reused_id`); new to the journal."""
        rows = self._pick_new(rows)
        if rows.num_rows:
            self._parts = (*self._parts, Finished(rows))
            self.num_unflushed_bytes += rows.nbytes
            self._check_ended()

    def quarantine(self, rows: RowRanges) -> None:
        """These rows end as errors, where they did not end before."""
        for row in iter_rows(rows):
            for sample in range(self._n):
                self.add(make_quarantined(RowId(self.lease.shard.file.path, row, sample)))

    def close(self, error: BatchgenError | None = None) -> None:
        """Nothing more is read or committed for this attempt: whatever waits for it goes on at once, `wait_ended` with
        the error where one is given. Answers that still come are kept for the journal."""
        self.is_closed = True
        self.error = self.error or error
        self._ended.set()

    # ---- what others make --------------------------------------------------------------------------------------------

    def choose_to_give(self, max_requests: int) -> list[Slot]:
        """Requests that another worker may have, from the end: those that nobody has finished, that were never sent, and
        that wait for no copy of another's answer."""
        if not self.is_recovered:
            return []  # the journal may hold what would be given
        slots = product(range(self.lease.shard.row_end - 1, self.lease.shard.row_start - 1, -1), range(self._n))
        kept = self.waiting
        free = (s for s in slots if not self._sent[self._slot(*s)] and s not in kept and not self.is_settled(*s))
        return list(islice(free, max_requests))

    def give(self, slots: Iterable[Slot], share_id: str) -> None:
        """They are another worker's, whether they were sent before or not."""
        for slot in slots:
            self._away[slot] = share_id
            self._sent[self._slot(*slot)] = 0

    def take_back(self, share_ids: Iterable[str]) -> list[Slot]:
        """Requests of these shares that nobody finished: ours again."""
        wanted = set(share_ids)
        back = [slot for slot, share_id in self._away.items() if share_id in wanted]
        for slot in back:
            del self._away[slot]
        return [slot for slot in back if not self.is_finished(*slot)]

    def wants(self, source_row: int, sample_index: int, *, is_again: bool) -> bool:
        """Is this request to be sent now, for the first time or again? Only once for the first time: one that was given
        away and taken back may be waiting twice."""
        slot = self._slot(source_row, sample_index)
        is_due = is_again or not self._sent[slot]
        return is_due and not self._finished[slot] and (source_row, sample_index) not in self._away

    def is_settled(self, source_row: int, sample_index: int) -> bool:
        """Not to be sent: finished, or another worker's."""
        return (source_row, sample_index) in self._away or self.is_finished(source_row, sample_index)

    # ---- what is known -----------------------------------------------------------------------------------------------

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def is_finished(self, source_row: int, sample_index: int) -> bool:
        return bool(self._finished[self._slot(source_row, sample_index)])

    def is_missing(self, row_id: RowId) -> bool:
        """Is it a request of this batch that is not finished?"""
        shard, (row, sample) = self.lease.shard, row_id.slot
        is_of_it = row_id.source_file == shard.file.path and shard.row_start <= row < shard.row_end
        return is_of_it and not self.is_finished(row, sample)

    @property
    def num_error(self) -> int:
        return self.error_types.total()

    @property
    def _num_made(self) -> int:
        return self._num_finished - self._num_left_out

    @property
    def progress(self) -> ShardProgress:
        """Input rows done, counted in whole rows of n samples."""
        num_inflight, num_waiting = self.num_inflight, len(self.waiting)
        num_unsent = max(0, len(self._finished) - self._num_finished - len(self._away) - num_inflight - num_waiting)
        done, types = self._num_made // self._n, tuple(self.error_types.items())
        return ShardProgress(self.lease.batch_id, done, self.num_error, num_unsent, types, num_inflight, num_waiting)

    def is_row_finished(self, source_row: int) -> bool:
        """All its samples."""
        slot = self._slot(source_row, 0)
        return 0 not in self._finished[slot : slot + self._n]

    async def wait_ended(self) -> None:
        """Until every row is finished, or the shard was closed. Raises the error that closed it."""
        await self._ended.wait()
        if self.error is not None:
            raise self.error

    # ---- what goes out -----------------------------------------------------------------------------------------------

    def take_unflushed(self) -> tuple[pa.Table, int] | None:
        """(results not journaled yet, mark for `set_flushed`); None when there are none."""
        self._pack()
        new = [part.rows for part in self._parts if part.ref is None]
        return (pa.concat_tables(new), len(self._parts)) if new else None

    def set_flushed(self, mark: int, ref: JournalRef) -> None:
        """What was taken with this mark is journaled there."""
        taken = [part.rows for part in self._parts[:mark] if part.ref is None]
        kept = [part for part in self._parts[:mark] if part.ref is not None]
        self._parts = (*kept, Finished(pa.concat_tables(taken), ref), *self._parts[mark:])
        self.num_unflushed_bytes = sum(part.num_bytes for part in self._parts[len(kept) + 1 :])

    @property
    def flushed(self) -> tuple[Finished, ...]:
        """What this attempt has journaled."""
        return tuple(part for part in self._parts if part.ref is not None)

    def replace_flushed(self, old: Sequence[Finished], new: Finished) -> None:
        """The same results, journaled elsewhere or dropped from memory."""
        gone = {id(part) for part in old}
        place = next(place for place, part in enumerate(self._parts) if id(part) in gone)
        kept = [part for part in self._parts if id(part) not in gone]
        self._parts = (*kept[:place], new, *kept[place:])

    def make_parts(self, output_schema: pa.Schema, read_back: ReadBack | None = None) -> Parts:
        """The finished shard; may run in another thread. `read_back`: rows that are journaled only. Raises ValueError when
        a row is missing or twice, and what `read_back` raises."""
        self._pack()
        made = pa.concat_tables([self._no_rows, *(load_rows(part, self.lease, read_back) for part in self._parts)])
        generated, carried = split_carried(made, self.lease.batch_id)
        recovered = pa.concat_tables([self._no_rows, *self._recovered])
        inputs = pa.concat_tables(self._inputs)
        output = make_output_table(pa.concat_tables([made, recovered]), inputs, self.lease, self._n, output_schema)
        return Parts(output, generated, carried, recovered)

    def _slot(self, source_row: int, sample_index: int) -> int:
        shard = self.lease.shard
        if not (shard.row_start <= source_row < shard.row_end and 0 <= sample_index < self._n):
            raise ValueError(f"{shard.id}: row {source_row}, sample {sample_index} is not a part of it")
        return (source_row - shard.row_start) * self._n + sample_index

    def _mark(self, source_row: int, sample_index: int) -> bool:
        slot = self._slot(source_row, sample_index)
        if self._finished[slot]:
            return False
        self._finished[slot] = 1
        self._num_finished += 1
        return True

    def _pack(self) -> None:
        if not self._buffer:
            return
        batch, refused = make_storable_batch(self._buffer, self.lease.batch_id, self._schema)
        self.error_types.update(refused)
        self._on_packed(batch)
        self._parts = (*self._parts, Finished(pa.Table.from_batches([batch])))
        self.num_unflushed_bytes += batch.nbytes
        self._buffer, self._num_values = [], 0

    def _check_ended(self) -> None:
        if self._num_finished == len(self._finished):
            # Nothing is left to pack later: the commit makes its parts in a thread while the journal is flushed here.
            self._pack()
            self._ended.set()
