"""A worker's finished rows of shards that are not committed: to the journal at every interval, and out of memory there.

The interval is 10 s by default. A flush is one PUT for a worker, whatever it holds: 8,640 a day, 0.04 dollars on S3, and
100 requests/s for 1,000 workers, where S3 takes 3,500 of a prefix. Shorter gains nothing: an engine that dies loses half of
every generation that it has in flight, minutes of its work beside these seconds. When rows come so fast that an interval of
them is large, they are flushed sooner.

Answers so far of rows that an engine is asked for in parts are journaled as well, in segments of their own: a row's once a
part, so that a lost worker costs a row one part and an interval.

Invariants: one flush at a time; a store that fails keeps nothing waiting and loses nothing, the rows stay where they are.
A shard that ended is the commit's: its segments are not merged any more.
"""

import asyncio
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.errors import StorageError
from batchgen.journal import make_partials_path, make_segment_path
from batchgen.queue.claim_table import make_place
from batchgen.queue.events import JournalFlushed, PoolEvent, WorkerWarned
from batchgen.records import JournalRef, Partial, RowId, Slot
from batchgen.worker.open_shard import OpenShard
from batchgen.worker.partial_rows import make_partial_rows
from batchgen.worker.partials import Partials
from batchgen.worker.shard_files import ShardFiles
from batchgen.worker.shares import join_rows
from batchgen.worker.spilled import Finished, load_rows

# Finished rows that stay in memory though they are journaled, so that most commits need not read them back.
MAX_KEPT_BYTES = 256 * 2**20
# Rows that a lost worker would cost, before they are flushed ahead of the interval.
MAX_UNFLUSHED_BYTES = 64 * 2**20
LOOK_S = 1.0
# The interval where other workers wait for copies of these rows.
WANTED_S = 1.0
# Segments of one worker that hold rows of one shard, before they are merged: a resume reads so many at most.
MAX_SEGMENTS = 32


class Spill:
    """Belongs to one event loop. `list_shards`: those that are open now; `partials`: where rows are asked for in parts;
    `n_told`: requests a row, where the driver is told which rows a segment holds."""

    def __init__(
        self,
        files: ShardFiles,
        epoch: int,
        worker_id: str,
        list_shards: Callable[[], Sequence[OpenShard]],
        emit: Callable[[PoolEvent], None],
        partials: Partials | None = None,
        n_told: int | None = None,
    ) -> None:
        self._n_told = n_told
        self._partials, self._partials_of = partials, dict[int, list[str]]()
        self._files, self._epoch, self._worker_id = files, epoch, worker_id
        self._list_shards, self._emit = list_shards, emit
        self._num_segments = 0
        self._mixed: set[str] = set()
        self._flushing = asyncio.Lock()

    async def flush_often(self, interval_s: float) -> None:
        """For ever."""
        loop = asyncio.get_running_loop()
        flushed_at = loop.time()
        while True:
            due = flushed_at + (min(WANTED_S, interval_s) if self._is_wanted() else interval_s)
            await asyncio.sleep(min(LOOK_S, max(0.0, due - loop.time())))
            num_bytes = sum(shard.num_unflushed_bytes for shard in self._list_shards())
            if loop.time() >= due or num_bytes > MAX_UNFLUSHED_BYTES:
                await self.flush(self._list_shards())
                flushed_at = loop.time()

    def _is_wanted(self) -> bool:
        return any(shard.is_wanted for shard in self._list_shards())

    async def flush(self, shards: Sequence[OpenShard]) -> None:
        """Journal what is finished and not committed. A store that fails now is tried again at the next interval."""
        async with self._flushing:
            try:
                await self._flush(shards)
                await self._merge([shard for shard in shards if len(shard.flushed) > MAX_SEGMENTS])
                if self._partials is not None:
                    await self._flush_partials(self._partials, shards)
            except StorageError as error:
                self._emit(WorkerWarned(self._worker_id, f"finished rows are not journaled yet: {error}"))
            self._drop()

    async def _flush(self, shards: Iterable[OpenShard]) -> None:
        taken = {shard: taken for shard in shards if (taken := shard.take_unflushed())}
        if not taken:
            return
        rows = join_rows((shard.lease.shard.number, table) for shard, (table, _) in taken.items())
        refs = await self._write(rows)
        if len(rows) < len(taken):  # two batches of one shard, its own and a share: not one's to merge
            self._mixed |= {ref.path for ref in refs.values()}
        for shard, (_, mark) in taken.items():
            shard.set_flushed(mark, refs[shard.lease.shard.number])
        self._tell(refs, rows)

    def _tell(
        self,
        refs: dict[int, JournalRef],
        rows: Mapping[int, pa.Table],
        replaced: tuple[tuple[int, tuple[str, ...]], ...] = (),
    ) -> None:
        told = (
            ()
            if self._n_told is None
            else tuple((no, pack_places(no, some, self._n_told)) for no, some in rows.items())
        )
        self._emit(JournalFlushed(self._worker_id, tuple(refs.items()), replaced, told))

    async def _merge(self, shards: Iterable[OpenShard]) -> None:
        """Many segments of a shard become one. A crash in between leaves rows twice, which is fine."""
        for shard in shards:
            number = shard.lease.shard.number
            old = [part for part in shard.flushed if part.ref is not None and part.ref.path not in self._mixed]
            read_back = self._files.read_back
            tables = [await asyncio.to_thread(load_rows, part, shard.lease, read_back) for part in old]
            merged = pa.concat_tables(tables)
            if shard.has_ended:
                continue
            refs = await self._write({number: merged})
            if shard.has_ended:  # its commit may be reading the old ones: both stay until it is done
                self._tell(refs, {number: merged})
                continue
            is_kept = all(part.rows is not None for part in old)
            shard.replace_flushed(old, Finished(merged if is_kept else None, refs[number]))
            paths = tuple(part.ref.path for part in old if part.ref is not None)
            self._tell(refs, {number: merged}, ((number, paths),))

    async def _write(self, rows: dict[int, pa.Table]) -> dict[int, JournalRef]:
        self._num_segments += 1
        path = make_segment_path(self._epoch, self._worker_id, self._num_segments)
        return await asyncio.to_thread(self._files.write_segment, path, rows)

    async def _flush_partials(self, partials: Partials, shards: Sequence[OpenShard]) -> None:
        """Those that grew; and of a shard with many segments all, so that the others may go."""
        new, is_open = partials.list_new(), {shard.lease.shard.number for shard in self._list_shards()}
        self._partials_of = {number: paths for number, paths in self._partials_of.items() if number in is_open}
        rows = sort_by_shard(new, shards)
        merged = [number for number in rows if len(self._partials_of.get(number, ())) >= MAX_SEGMENTS]
        if merged:
            whole = sort_by_shard(partials.iter_all(), shards)
            rows |= {number: whole[number] for number in merged}
        if rows:
            await self._write_partials(rows, merged)
        partials.note_journaled(new)

    async def _write_partials(self, rows: Mapping[int, Sequence[tuple[Slot, Partial]]], merged: Sequence[int]) -> None:
        self._num_segments += 1
        path = make_partials_path(self._epoch, self._worker_id, self._num_segments)

        def write() -> dict[int, JournalRef]:
            return self._files.write_segment(path, {number: make_partial_rows(some) for number, some in rows.items()})

        refs = await asyncio.to_thread(write)
        replaced = tuple((number, tuple(self._partials_of.pop(number))) for number in merged)
        for number in refs:
            self._partials_of.setdefault(number, []).append(path)
        self._emit(JournalFlushed(self._worker_id, tuple(refs.items()), replaced))

    def _drop(self) -> None:
        """The largest first, until the rest is small enough."""
        parts = [(part, shard) for shard in self._list_shards() if not shard.has_ended for part in shard.flushed]
        num_bytes = sum(part.num_bytes for part, _ in parts)
        for part, shard in sorted(parts, key=lambda pair: -pair[0].num_bytes):
            if num_bytes <= MAX_KEPT_BYTES:
                return
            num_bytes -= part.num_bytes
            shard.replace_flushed([part], Finished(None, part.ref))


def pack_places(shard_number: int, rows: pa.Table, n: int) -> bytes:
    """Which rows these are, in order."""
    requests = pc.add(pc.multiply(rows["source_row"], n), rows["sample_index"].cast(pa.int64()))
    places = pc.add(requests, make_place(shard_number, (0, 0), n))
    return array("Q", sorted(places.to_pylist())).tobytes()


def sort_by_shard(
    found: Iterable[tuple[RowId, Partial]], shards: Sequence[OpenShard]
) -> dict[int, list[tuple[Slot, Partial]]]:
    """By shard number, without rows that ended meanwhile and those whose shard is not open any more."""
    rows: dict[int, list[tuple[Slot, Partial]]] = {}
    for row_id, partial in found:
        shard = next((shard for shard in shards if shard.is_missing(row_id)), None)
        if shard is not None:
            rows.setdefault(shard.lease.shard.number, []).append((row_id.slot, partial))
    return rows
