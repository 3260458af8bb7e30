"""A worker's side of shares: it gives requests of its shards away, makes those of others, and takes in what others made.

Requests that were not sent are given as they are; those that the engine has begun are stopped where they are, what they
have so far is journaled, and the helper goes on from there, as does the owner with what a helper leaves.

Invariants: only the owner of a shard commits it; a request that was given is sent here again only once its share has
ended; a helper journals all that it made before it says so. Whatever goes wrong with a share, its requests go back.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import pyarrow as pa

from batchgen.errors import Refusal, StorageError
from batchgen.queue.events import PoolEvent, RowsGiven, ShareEnded
from batchgen.queue.orders import DropShare, GiveRows, HelpShare, ShareOrder, TakeIn
from batchgen.records import JournalRef, Share, Slot, WorkerInfo
from batchgen.stats import make_lost_stats
from batchgen.worker.continuation import Continuation
from batchgen.worker.open_shard import OpenShard
from batchgen.worker.ready import Ready
from batchgen.worker.sender import Sender
from batchgen.worker.shard_files import ShardFiles

# Pause between tries to journal what a helper made, while the store refuses it.
FLUSH_PAUSE_S = 1.0


class Read(Protocol):
    """`Feeder.feed`."""

    def __call__(self, shard: OpenShard, wanted: Collection[Slot] | None = None) -> Awaitable[None]: ...


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a share needs of its worker: read and send, journal, tell the driver, count what ended."""

    read: Read
    flush: Callable[[], Awaitable[None]]
    emit: Callable[[PoolEvent], None]
    note: Callable[[pa.RecordBatch], None]


def join_rows(tables: Iterable[tuple[int, pa.Table]]) -> dict[int, pa.Table]:
    """Rows by shard number: a worker may have two batches of one shard, its own and a share."""
    joined: dict[int, pa.Table] = {}
    for number, table in tables:
        joined[number] = pa.concat_tables([joined[number], table]) if number in joined else table
    return joined


class WorkerShares:
    """Belongs to the worker's event loop. `shards`: the worker's open shards by batch, which shares join; `serving`: where
    requests that an engine has begun can be moved, and `moves_seeded`: those with a seed, too."""

    def __init__(
        self,
        info: WorkerInfo,
        files: ShardFiles,
        sender: Sender,
        shards: MutableMapping[str, OpenShard],
        hooks: Hooks,
        serving: Continuation | None = None,
        moves_seeded: bool = False,
    ) -> None:
        self._serving, self._moves_seeded = serving, moves_seeded
        self._info, self._files, self._sender, self._shards = info, files, sender, shards
        self._read, self._flush, self._emit, self._note = hooks.read, hooks.flush, hooks.emit, hooks.note
        self._dropped: set[str] = set()

    async def obey(self, order: ShareOrder) -> None:
        match order:
            case GiveRows():
                await self._give(order)
            case HelpShare(share):
                await self._help(share)
            case TakeIn():
                await self._take_in(order)
            case DropShare(share):
                self._dropped.add(share.lease.batch_id)
                if (shard := self._shards.pop(share.lease.batch_id, None)) is not None:
                    shard.close()

    # ---- the owner ---------------------------------------------------------------------------------------------------

    async def _give(self, order: GiveRows) -> None:
        """Chosen and marked at once, before anything is awaited: no answer can come in between."""
        share, share_id = order.share, order.share.lease.batch_id
        shard = self._shards.get(share.owner_batch_id)
        slots: list[Slot] = []
        if shard is not None and not shard.is_closed and not shard.has_ended:
            choose = self._stop_begun if order.is_begun else OpenShard.choose_to_give
            slots = choose(shard, order.num_requests)
        if shard is None or not slots:
            self._emit(RowsGiven(self._info.worker_id, share, 0))
            return
        shard.give(slots, share_id)
        if order.is_begun:
            await self._flush()  # a store that refuses it costs the helper what they had
        try:
            await asyncio.to_thread(self._files.write_handoff, share_id, slots)
        except StorageError:  # nobody was told: they are ours as before
            self._emit(RowsGiven(self._info.worker_id, share, 0))
            await self._regain(shard, [share])
            return
        self._emit(RowsGiven(self._info.worker_id, share, len(slots)))

    def _stop_begun(self, shard: OpenShard, max_requests: int) -> list[Slot]:
        """Those that were sent last: they wait inside the engine still, or have the least to be prefilled again."""
        serving = self._serving
        if serving is None or not shard.is_recovered:
            return []
        found = (ready for ready in reversed(self._sender.inflight) if ready.shard is shard)
        chosen = list(islice((ready for ready in found if self._may_move(serving, ready)), max_requests))
        for ready in chosen:
            serving.save(ready.request.row_id)
        self._sender.recall(chosen)
        return [ready.request.row_id.slot for ready in chosen]

    def _may_move(self, serving: Continuation, ready: Ready) -> bool:
        """A seed's draws go on as they would have on no other engine, unless it begins anew there."""
        if ready.request.sampling.seed is not None:
            return self._moves_seeded
        return serving.can_save(ready.request)

    async def load_begun(self, shard: OpenShard, refs: Sequence[JournalRef]) -> list[str]:
        """Take over what others had of this batch's rows; what is to be said of segments that are damaged. Raises
        StorageError."""
        if self._serving is None or not refs:
            return []
        begun, left_out = await asyncio.to_thread(self._files.read_partials, shard.lease.shard, refs)
        self._serving.partials.load((row_id, partial) for row_id, partial in begun if shard.is_missing(row_id))
        return left_out

    async def _take_in(self, order: TakeIn) -> None:
        shard = self._shards.get(order.batch_id)
        if shard is None or shard.is_closed or shard.has_ended:
            return
        try:
            lease = replace(shard.lease, journal=order.refs)
            rows, _ = await asyncio.to_thread(self._files.read_journal, lease, shard.replaced_epoch)
            await self.load_begun(shard, order.refs)
        except (StorageError, Refusal) as error:
            shard.close(error)
            return
        if not shard.is_closed and not shard.has_ended:
            shard.take_in(rows, [share.lease.batch_id for share in order.ended])
            await self._regain(shard, order.ended)

    async def _regain(self, shard: OpenShard, shares: Iterable[Share]) -> None:
        """What nobody made of these shares is read and sent again."""
        if not (missing := shard.take_back(share.lease.batch_id for share in shares)):
            return
        try:
            await self._read(shard, frozenset(missing))
        except (StorageError, Refusal) as error:
            shard.close(error)

    # ---- the helper --------------------------------------------------------------------------------------------------

    async def _help(self, share: Share) -> None:
        started_at, started = time.time(), time.monotonic()
        try:
            slots = await asyncio.to_thread(self._files.read_handoff, share)
            shard = self._files.open_share(share, slots, self._note)
            await self.load_begun(shard, share.lease.journal)
        except (StorageError, Refusal) as error:
            self._emit(ShareEnded(self._info.worker_id, share, None, str(error)))
            return
        if self._has_no_use(share):
            return
        self._shards[share.lease.batch_id] = shard
        try:
            await self._read(shard, frozenset(slots))
            await shard.wait_ended()
            await self._journal(shard)
            reason = None
        except (StorageError, Refusal) as error:
            await self._flush()
            reason = str(error)
        if self._has_no_use(share):  # and where the worker ends, its rows go to the journal with the rest
            return
        shard.close()
        del self._shards[share.lease.batch_id]
        # Its rows are counted by whoever commits them: after an owner's death some may have been made twice.
        batch_id, wall_s = share.lease.batch_id, time.monotonic() - started
        stats = make_lost_stats(batch_id, info=self._info, started_at=started_at, wall_s=wall_s, outcome="shared")
        self._emit(ShareEnded(self._info.worker_id, share, replace(stats, read_s=shard.read_s), reason))

    def _has_no_use(self, share: Share) -> bool:
        """It was dropped meanwhile, or the worker ends."""
        return self._sender.is_stopped or share.lease.batch_id in self._dropped

    async def _journal(self, shard: OpenShard) -> None:
        """Until all that was made is in the journal, or the shard was closed."""
        await self._flush()
        while shard.take_unflushed() is not None and not shard.is_closed:
            await asyncio.sleep(FLUSH_PAUSE_S)
            await self._flush()
