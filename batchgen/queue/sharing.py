"""The driver's side of shares: asks owners to give, helpers to help, and holders to take in what was made.

It moves descriptors only; which requests a share holds is between owner, helper and store. A share is asked for, then
runs, then ends once, whoever dies in between: a dead helper's requests go back to the owner with what it journaled; a
dead owner's share goes on, and what it makes goes to whoever holds the shard then; a committed shard ends its shares.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from batchgen.journal import JournalIndex, is_partials, make_worker_prefix
from batchgen.queue.begun import PaceCurve, choose_moves
from batchgen.queue.events import RowsGiven, ShareEnded, WorkerPool
from batchgen.queue.leases import OpenLease, QueueWorker
from batchgen.queue.orders import DropShare, GiveRows, HelpShare, TakeIn
from batchgen.queue.tail import Split, TailPolicy, WorkerLoad, choose_splits
from batchgen.queue.work_queue import LostLease, WorkQueue
from batchgen.records import Lease, Share
from batchgen.worker.handoff import make_handoff_path

# An owner that had nothing to give is not asked for the same batch again for so long.
REFUSED_S = 10.0


@dataclass(slots=True)
class Sharing:
    """`delete` removes objects of the store that nobody needs any more."""

    queue: WorkQueue
    pool: WorkerPool
    index: JournalIndex
    epoch: int
    n: int
    policy: TailPolicy
    delete: Callable[[list[str]], None]
    _asked: dict[str, tuple[Share, int]] = field(default_factory=dict)
    _running: dict[str, tuple[Share, float]] = field(default_factory=dict)
    _refused: dict[str, float] = field(default_factory=dict)
    _handoffs: dict[int, list[str]] = field(default_factory=dict)
    _look_at: float = 0.0
    _curve: PaceCurve = field(default_factory=PaceCurve)
    _seen: dict[str, tuple[float, float, int]] = field(default_factory=dict)
    _settled_at: float = 0.0

    def split(self, now: float) -> None:
        """When nothing waits, let workers with room help those that have too much."""
        if self.queue.num_waiting or now < self._look_at:
            return
        self._look_at = now + self.policy.look_s
        # Whoever tries suspects gets no company.
        workers = [w for w in self.queue.look_at_workers() if not w.is_apart and not w.is_leaving]
        loads = [self._measure(worker, now) for worker in workers]
        self._note_paces(workers)
        for split in choose_splits(loads, self.policy) or self._choose_moves(workers, loads, now):
            self._ask(split, now)

    def _ask(self, split: Split, now: float) -> None:
        num_requests = split.num_requests
        share = self.queue.lend_share(split.owner_id, split.batch_id, split.helper_id, num_requests, now)
        self._asked[share.lease.batch_id] = share, 0 if split.is_begun else num_requests
        self._handoffs.setdefault(share.lease.shard.number, []).append(make_handoff_path(share.lease.batch_id))
        self.pool.tell(split.owner_id, GiveRows(share, num_requests, split.is_begun))

    def _choose_moves(self, workers: Iterable[QueueWorker], loads: list[WorkerLoad], now: float) -> list[Split]:
        """Not before the last ones show in the loads."""
        if self._asked or now < self._settled_at:
            return []
        done = sum(self._count_done(worker) for worker in workers)
        mean_tokens = sum(worker.total_tokens for worker in workers) / done if done else None
        splits = choose_moves(loads, self._curve, mean_tokens, self.policy)
        if splits:
            self._settled_at = now + self.policy.settle_s
        return splits

    def _note_paces(self, workers: Iterable[QueueWorker]) -> None:
        """From what each made since it was heard of before: rows x seconds, and tokens."""
        for worker in workers:
            worker_id = worker.info.worker_id
            heard_at, integral, tokens = self._seen.get(worker_id, (worker.joined_at, 0.0, 0))
            seconds, rows_s = worker.heard_at - heard_at, worker.integral - integral
            if seconds < self.policy.look_s:
                continue
            self._seen[worker_id] = worker.heard_at, worker.integral, worker.total_tokens
            if worker.total_tokens > tokens and rows_s > 0 and heard_at > worker.joined_at:
                self._curve.note(rows_s / seconds, rows_s / (worker.total_tokens - tokens))

    def note_given(self, event: RowsGiven, now: float) -> None:
        share, share_id = event.share, event.share.lease.batch_id
        is_expected = self._asked.pop(share_id, None) is not None
        if event.num_requests == 0:
            self._refused[share.owner_batch_id] = now + REFUSED_S
            self.queue.end_share(share)
        elif is_expected and self.queue.has_share(share):
            self._running[share_id] = share, now
            refs = (ref for ref in self.index.get(share.lease.shard.number) if is_partials(ref.path))
            begun = replace(share, lease=replace(share.lease, journal=tuple(refs)))
            self.pool.tell(share.lease.worker_id, HelpShare(begun))
        else:  # the helper died, or the shard was committed, while the owner chose
            self.queue.end_share(share)
            self._return(share)

    def note_ended(self, event: ShareEnded) -> bool:
        """False for a share that had ended already, of which nothing new is to be said."""
        self._running.pop(event.share.lease.batch_id, None)
        if not self.queue.end_share(event.share):
            return False
        self._return(event.share)
        return True

    def note_lost(self, worker_id: str, shares: Iterable[Share], now: float, reason: str) -> list[LostLease]:
        """After the queue lost a worker and its journal was found: the attempts at others' shards that it lost. `shares`:
        those that it had."""
        lost = []
        for share in shares:
            running = self._running.pop(share.lease.batch_id, None)
            if running is not None:
                lost.append(LostLease(share.lease, running[1], now, 0, reason))
                self._return(share)
        for share, _ in list(self._asked.values()):
            if share.owner_id == worker_id:
                self.queue.end_share(share)
                del self._asked[share.lease.batch_id]
        return lost

    def note_committed(self, shard_number: int, now: float) -> list[LostLease]:
        """The shares that are of no use any more, as the lost attempts they are."""
        lost = []
        for share, since in list(self._running.values()):
            if share.lease.shard.number == shard_number:
                self._end(share)
                lost.append(LostLease(share.lease, since, now, 0, "committed by another"))
        for share, _ in list(self._asked.values()):
            if share.lease.shard.number == shard_number:
                del self._asked[share.lease.batch_id]
                self.queue.end_share(share)
        self.delete(self._handoffs.pop(shard_number, []))
        return lost

    def list_open(self, now: float) -> list[LostLease]:
        """Running shares as they would be lost now."""
        return [LostLease(share.lease, since, now, 0, "driver ended") for share, since in self._running.values()]

    def _end(self, share: Share) -> None:
        del self._running[share.lease.batch_id]
        self.queue.end_share(share)
        self.pool.tell(share.lease.worker_id, DropShare(share))

    def _return(self, share: Share) -> None:
        """What its helper journaled of the shard, and the rest of its requests, go to whoever holds the shard."""
        holder = self.queue.find_holder(share.lease.shard.number)
        if holder is not None:
            prefix = make_worker_prefix(self.epoch, share.lease.worker_id)
            refs = tuple(ref for ref in self.index.get(share.lease.shard.number) if ref.path.startswith(prefix))
            self.pool.tell(holder.worker_id, TakeIn(holder.batch_id, refs, (share,)))

    # ---- loads -------------------------------------------------------------------------------------------------------

    def _measure(self, worker: QueueWorker, now: float) -> WorkerLoad:
        leases = {batch_id: self._count_unsent(held) for batch_id, held in worker.open.items()}
        divisible = {b: num for b, num in leases.items() if self._is_divisible(worker.open[b].lease, now)}
        done = self._count_done(worker)
        return WorkerLoad(
            worker_id=worker.info.worker_id,
            window=worker.info.window,
            num_inflight=worker.num_inflight,
            num_unsent=sum(leases.values()) + sum(worker.share_unsent.values()),
            leases=tuple(divisible.items()),
            requests_per_s=done / (now - worker.joined_at) if done and now > worker.joined_at else None,
            begun=tuple((b, worker.open[b].num_inflight) for b in divisible) if worker.info.can_move else (),
        )

    def _count_done(self, worker: QueueWorker) -> int:
        return self.n * (worker.num_rows_ended + sum(held.num_rows_done for held in worker.open.values()))

    def _count_unsent(self, held: OpenLease) -> int:
        """Less what its owner was asked to give and has not yet."""
        unsent = self.n * held.lease.shard.num_rows if held.num_unsent is None else held.num_unsent
        asked = (num for share, num in self._asked.values() if share.owner_batch_id == held.lease.batch_id)
        return max(0, unsent - sum(asked))

    def _is_divisible(self, lease: Lease, now: float) -> bool:
        return not lease.is_last_resort and self._refused.get(lease.batch_id, 0.0) <= now
