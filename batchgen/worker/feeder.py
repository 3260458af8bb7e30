"""Rows of all open shards on their way to the sender: read in stretches, given out in order, tokenised, pushed.

Two stages, each as far ahead of the next as its bound lets it. `feed` reads one shard after the other and holds what it
read as Arrow (`read_ahead` says how much, and which row goes next, whichever shard it is of). `run` takes the next few
rows, makes requests of them in a thread, and pushes them as the sender has room. So prompts and token ids are Python
objects only shortly before they are sent, and the window stays full across shard borders.

Rows that are finished already (from the journal, or copied) are not prepared again; what an earlier output answers
(`input.reuse_from`) is never sent. What makes a shard unfit as a whole
(the model has no chat template) ends that shard and no other. Knows nothing of leases, commits or the journal.
"""

import asyncio
import time
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import pyarrow as pa

from batchgen.errors import Refusal, StorageError
from batchgen.prompt import list_columns, list_row_columns
from batchgen.queue.orders import DuplicateOrder
from batchgen.read import BATCH_BYTES, Rows, Unreadable, iter_shard, pick_rows
from batchgen.records import Result, Shard, Slot
from batchgen.reuse.answers import Answers
from batchgen.reuse.carrier import Carrier
from batchgen.reuse.duplicates import make_duplicates
from batchgen.reuse.lookout import Around, Emit, OpenShards, Spawn
from batchgen.spec import JobSpec
from batchgen.storage import Storage
from batchgen.worker.answer import make_given_up
from batchgen.worker.hint_check import HintCheck
from batchgen.worker.open_shard import OpenShard
from batchgen.worker.prepare import (
    Prepared,
    Preparer,
    make_custom_ids,
    make_inputs,
    make_unknown_inputs,
    make_unreadables,
)
from batchgen.worker.read_ahead import ReadAhead, Stretch
from batchgen.worker.sender import Sender

# (shard, requests to be sent and failures, rows that are done already)
Made = tuple[OpenShard, list[Prepared] | Refusal | StorageError, pa.Table | None]

# Shards read at the same time: one opens its file while another decodes.
MAX_READERS = 2
# Rows of one stretch at most: Arrow, so that many are small; and rows made into requests at a time, so that few are.
STRETCH_ROWS = 1024
PREPARED_ROWS = 64


@dataclass(slots=True, eq=False)
class Page:
    """Rows that were read together. `kept`: which of them `rows` still holds, by their place when they were read.
    `wanted`: the only requests of theirs to be sent; None for all."""

    shard: OpenShard
    first_row: int
    rows: pa.RecordBatch
    kept: Sequence[int]
    wanted: Collection[Slot] | None = None

    def pick(self, places: Sequence[int]) -> pa.RecordBatch:
        is_whole = isinstance(self.kept, range)
        return pick_rows(self.rows, places if is_whole else [bisect_left(self.kept, place) for place in places])

    def shrink(self, left: Sequence[int]) -> None:
        """Let go of the memory of rows that were given out, once they are half of it: the last rows of a stretch are its
        shortest and stay long."""
        if left and 2 * len(left) <= len(self.kept):
            kept = sorted(left)
            self.rows, self.kept = self.pick(kept), kept


def narrow(shard: Shard, wanted: Collection[Slot] | None) -> Shard:
    """The part of the shard that holds all wanted requests; all of it where they are not told."""
    if wanted is None:
        return shard
    rows = [row for row, _ in wanted]
    return replace(shard, row_start=min(rows), row_end=max(rows) + 1)


class Feeder:
    """Belongs to one event loop. `run` must run for rows to be sent, and for `feed` to end; `connect` goes before it.
    `hints` says whether the order goes by them."""

    def __init__(
        self,
        spec: JobSpec,
        passthrough: pa.Schema,
        preparer: Preparer,
        sender: Sender,
        hints: HintCheck,
        carrier: Carrier | None = None,
    ) -> None:
        self._spec, self._passthrough, self._preparer, self._sender = spec, passthrough, preparer, sender
        self._n, self._carrier = spec.sampling.n, carrier
        self.duplicates = make_duplicates(spec, sender.push, self.feed)
        self.n_told = self._n if self.duplicates is not None else None
        self._ahead: ReadAhead[Page] = ReadAhead()
        self._hints = hints
        self._readers = asyncio.Semaphore(MAX_READERS)
        self._has_rows, self._has_room = asyncio.Event(), asyncio.Event()

    def connect(self, worker_id: str, storage: Storage, emit: Emit, spawn: Spawn, shards: OpenShards) -> None:
        """To the driver and to what other workers have, for rows that are alike. `shards`: the worker's, by batch."""
        if self.duplicates is not None:
            self._sender.on_result = self.duplicates.note_result
            self.duplicates.open(Around(worker_id, Answers(storage, self._spec), emit, spawn, shards))
            spawn(self.duplicates.run())

    async def obey(self, order: DuplicateOrder) -> None:
        if self.duplicates is not None:
            await self.duplicates.obey(order)

    # ---- reading -----------------------------------------------------------------------------------------------------

    async def feed(self, shard: OpenShard, wanted: Collection[Slot] | None = None) -> None:
        """Read all rows of the shard, each stretch as soon as there is room for it, or until the shard is closed. `wanted`:
        the only requests to send, for a share of another worker's shard, or a second time; their passthrough columns are
        not kept. Raises StorageError, InputError."""
        async with self._readers:
            part = narrow(shard.lease.shard, wanted)
            stretches = iter_shard(part, list_columns(self._spec), max_rows=STRETCH_ROWS)
            try:
                while not shard.is_closed and await self._read(shard, stretches, wanted):
                    while self._ahead.is_full and not shard.is_closed:
                        self._has_room.clear()
                        await self._has_room.wait()
            finally:
                stretches.close()

    async def _read(
        self, shard: OpenShard, stretches: Iterator[tuple[int, Rows]], wanted: Collection[Slot] | None
    ) -> bool:
        """The next stretch; False at the end."""
        started = time.monotonic()
        step = await asyncio.to_thread(self._read_stretch, shard, stretches, wanted)
        shard.read_s += time.monotonic() - started
        if step is None:
            return False
        inputs, found = step
        if wanted is None:
            shard.add_inputs(inputs)
        if not isinstance(found, Stretch):
            await self._admit(shard, [failed for failed in found if wanted is None or failed.row_id.slot in wanted])
        elif found.left:
            self._ahead.add(found)
            self._has_rows.set()
        return True

    def _read_stretch(
        self, shard: OpenShard, stretches: Iterator[tuple[int, Rows]], wanted: Collection[Slot] | None
    ) -> tuple[pa.Table, Stretch[Page] | list[Result]] | None:
        """(custom_id and passthrough columns, rows to be sent or failures of rows that can't be read). In a thread."""
        if (step := next(stretches, None)) is None:
            return None
        first_row, rows = step
        file = shard.lease.shard.file.path
        if isinstance(rows, Unreadable):
            return make_unknown_inputs(rows.num_rows, self._passthrough), make_unreadables(
                rows, file, first_row, self._n
            )
        custom_ids = make_custom_ids(rows, self._spec.input.custom_id, file, first_row)
        inputs = make_inputs(rows, custom_ids, self._passthrough, file)
        prompts = rows.select(list_row_columns(self._spec))
        page = Page(shard, first_row, prompts, range(rows.num_rows), wanted)
        left = [place for place in range(rows.num_rows) if not shard.is_row_finished(first_row + place)]
        return inputs, Stretch(page, left, prompts.nbytes / rows.num_rows, self._preparer.expect(prompts))

    # ---- sending -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever: the next rows in order."""
        while True:
            await self._has_rows.wait()
            self._ahead.sort(self._hints.are_useful)
            runs = self._ahead.take(max(1, PREPARED_ROWS // self._n), BATCH_BYTES)
            if self._ahead.num_rows == 0:
                self._has_rows.clear()
            self._has_room.set()
            open_runs = [(stretch.source, places) for stretch, places in runs if not stretch.source.shard.is_closed]
            for shard, prepared, carried in await asyncio.to_thread(self._prepare, open_runs):
                if isinstance(prepared, Refusal | StorageError):
                    shard.close(prepared)
                    continue
                if carried is not None and not shard.is_closed:
                    shard.carry(carried)
                await self._admit(shard, prepared)
            if self.duplicates is not None:
                await self.duplicates.wait_room()
            for stretch, _ in runs:
                stretch.source.shrink(stretch.left)

    def _prepare(self, runs: Sequence[tuple[Page, list[int]]]) -> list[Made]:
        """What becomes of each run, in order. All rows of a page at once: Arrow takes 50 us however few they are. In a
        thread."""
        places: dict[Page, list[int]] = {}
        for page, run in runs:
            places.setdefault(page, []).extend(run)
        made = {page: self._prepare_page(page, some) for page, some in places.items()}
        return [self._carry(page.shard, self._cut(page, made[page], len(run))) for page, run in runs]

    def _carry(self, shard: OpenShard, prepared: list[Prepared] | Refusal) -> Made:
        """What an earlier output has of them needs no engine."""
        if self._carrier is None or isinstance(prepared, Refusal):
            return shard, prepared, None
        try:
            carried, left = self._carrier.take(shard.lease, prepared)
        except (StorageError, Refusal) as error:
            return shard, error, None
        return shard, left, carried

    def _cut(self, page: Page, made: Iterator[Prepared] | Refusal, num_rows: int) -> list[Prepared] | Refusal:
        """What belongs to the page's next rows."""
        if isinstance(made, Refusal):
            return made
        some = islice(made, num_rows * self._n)
        return list(some) if page.wanted is None else [item for item in some if item.row_id.slot in page.wanted]

    def _prepare_page(self, page: Page, places: Sequence[int]) -> Iterator[Prepared] | Refusal:
        file, numbers = page.shard.lease.shard.file.path, [page.first_row + place for place in places]
        started = time.monotonic()
        try:
            return iter(self._preparer.prepare(page.pick(places), file, numbers))
        except Refusal as error:  # the job can't work as asked: that is this shard's end, and told as such
            return error
        finally:
            page.shard.prepare_s += time.monotonic() - started

    async def _admit(self, shard: OpenShard, prepared: Sequence[Prepared]) -> None:
        """Queue requests for the window, after waiting for room to read ahead; failures end at once."""
        requests = []
        for item in prepared:
            if shard.is_settled(*item.row_id.slot):
                continue
            if isinstance(item, Result):
                shard.add(item)
            elif shard.lease.is_last_resort:
                shard.add(make_given_up(item, shard.lease))
            elif self.duplicates is None or self.duplicates.admit(shard, item):
                requests.append(item)
        await self._sender.push(shard, requests)
