"""Which worker gets which shard, for how long, and when it is enough. Pure: time is an argument, nothing is awaited.

Invariants: a shard is waiting, leased to one worker, or done, never two of these; a completed shard is never lent again;
an answer for a lease that is no longer held (a zombie's) changes nothing. Longest expected shards go first, while what
workers say of the hints bears them out; a neighbour of a worker's last shard is preferred among equals. A worker that is
not heard of, or that makes no token and finishes no row, loses its leases. A shard lost too often is lent once more as a
last resort: no generation, its missing rows become error rows. Knows nothing of rows, files or Ray.

At the end of a run part of a lent shard may be a `Share` of another worker: its owner holds the lease all the same, and
a share changes nothing of the above. A decision costs O(log n) in shards and workers.
"""

from collections.abc import Iterable
from dataclasses import replace

from batchgen.queue.backlog import BACKOFF_S, MAX_BACKOFF_S, NEIGHBOUR_SHARE, Backlog, QueuedShard
from batchgen.queue.events import Heartbeat
from batchgen.queue.hint_votes import HintVotes
from batchgen.queue.lazy_heap import LazyHeap
from batchgen.queue.leases import LostLease, OpenLease, QueueWorker
from batchgen.records import Lease, Share, WorkerInfo
from batchgen.row_ranges import RowRanges
from batchgen.spec import ClusterSpec, RetrySpec

__all__ = ["BACKOFF_S", "MAX_BACKOFF_S", "NEIGHBOUR_SHARE", "LostLease", "QueuedShard", "WorkQueue"]

# A worker holds leases for this many windows of unfinished rows: one in flight, half a one read and tokenised ahead.
WINDOWS_AHEAD = 1.5
# With hints that are followed it holds more, so that it can send the longest of many rows first.
HINTED_WINDOWS_AHEAD = 8.0
MIN_OPEN_SHARDS = 2
MAX_OPEN_SHARDS = 1024


class WorkQueue:
    """Shards in, leases out, facts back in. `n`: requests a row. `follows_hints`: before any worker has said what they are
    worth (`lengths.must_go_in_order`)."""

    def __init__(
        self,
        shards: Iterable[QueuedShard],
        *,
        epoch: int,
        retry: RetrySpec,
        cluster: ClusterSpec,
        n: int = 1,
        follows_hints: bool = True,
    ) -> None:
        self._cluster, self._n = cluster, n
        self._backlog = Backlog(shards, epoch=epoch, retry=retry, follows_costs=follows_hints)
        self._votes = HintVotes(is_followed=follows_hints)
        self._workers: dict[str, QueueWorker] = {}
        self._hungry: LazyHeap[str, tuple[float, str]] = LazyHeap()
        self._deadlines: LazyHeap[str, float] = LazyHeap()
        self._held: dict[int, OpenLease] = {}
        self._rows_open, self._errors_open = 0, 0

    # ---- facts in ----------------------------------------------------------------------------------------------------

    def add_worker(self, info: WorkerInfo, now: float) -> None:
        self._workers[info.worker_id] = worker = QueueWorker(info, joined_at=now, heard_at=now, progress_at=now)
        self._place(worker)

    def renew(self, beat: Heartbeat, now: float) -> None:
        """A worker was heard of. Its leases' stall clock restarts only when it made a token or finished a row; so does that
        of the owners it helps, who may have nothing left to do but wait for it."""
        worker = self._workers.get(beat.worker_id)
        if worker is None:
            return
        worker.heard_at, worker.num_inflight = now, beat.num_inflight
        worker.total_tokens, worker.integral = beat.total_tokens, beat.integral
        for shard in beat.shards:
            if (held := worker.open.get(shard.batch_id)) is not None:
                self._count_open(held, -1)
                held.num_rows_done, held.num_rows_error = shard.num_rows_done, shard.num_rows_error
                held.num_unsent, held.num_inflight = shard.num_unsent, shard.num_inflight
                held.num_rows_waiting = shard.num_waiting // self._n
                self._count_open(held, +1)
            elif shard.batch_id in worker.shares:
                worker.share_unsent[shard.batch_id] = shard.num_unsent
        worker.count()
        progress = (beat.total_tokens, sum(held.num_rows_done for held in worker.open.values()))
        if progress != worker.progress or (beat.num_inflight == 0 and (not worker.is_busy or beat.only_waits)):
            worker.progress, worker.progress_at = progress, now
            for share in worker.shares.values():
                if (owner := self._workers.get(share.owner_id)) is not None:
                    owner.progress_at = now
        self._votes.hear(beat.worker_id, beat.are_hints_useful)
        self._backlog.follow_costs(self._votes.is_followed)
        self._place(worker)

    def complete(self, worker_id: str, batch_id: str, shard_number: int) -> bool:
        """The shard's file exists, whoever made it. False when that was known already."""
        if (worker := self._workers.get(worker_id)) is not None and (held := self._close(worker, batch_id)) is not None:
            worker.num_rows_ended += held.lease.shard.num_rows
        if (other := self._held.get(shard_number)) is not None and not self._backlog.is_done(shard_number):
            self._count_open(other, -1)  # what another one has of it would count twice
        return self._backlog.complete(shard_number)

    def fail(self, worker_id: str, batch_id: str, now: float, reason: str) -> LostLease | None:
        """The lease ended without a commit, its worker lives: lent again after a pause. None for a zombie's."""
        worker = self._workers.get(worker_id)
        held = self._close(worker, batch_id) if worker is not None else None
        if held is None:
            return None
        self._backlog.note_failure(held.lease.shard.number, now, reason)
        return LostLease(held.lease, held.started_at, now, held.num_rows_done, reason)

    def lose(self, worker_id: str, now: float, reason: str, *, is_counted: bool = True) -> list[LostLease]:
        """The worker is gone: its shards wait again at once. (What it has of others' shards: `list_shares`, before.)
        `is_counted`: towards the last resort."""
        worker = self._workers.pop(worker_id, None)
        if worker is None:
            return []
        self._votes.forget(worker_id)
        self._hungry.discard(worker_id)
        self._deadlines.discard(worker_id)
        lost = []
        for batch_id in list(worker.open):
            held = self._drop(worker, batch_id)
            if is_counted:
                self._backlog.note_loss(held.lease.shard.number, held.num_rows_done, reason)
            else:
                self._backlog.note_return(held.lease.shard.number, reason)
            lost.append(LostLease(held.lease, held.started_at, now, held.num_rows_done, reason))
        return lost

    def _close(self, worker: QueueWorker, batch_id: str) -> OpenLease | None:
        if batch_id not in worker.open:
            return None
        held = self._drop(worker, batch_id)
        worker.count()
        self._place(worker)
        return held

    def _drop(self, worker: QueueWorker, batch_id: str) -> OpenLease:
        held = worker.open.pop(batch_id)
        self._count_open(held, -1)
        del self._held[held.lease.shard.number]
        return held

    def _count_open(self, held: OpenLease, sign: int) -> None:
        if not self._backlog.is_done(held.lease.shard.number):
            self._rows_open += sign * held.num_rows_done
            self._errors_open += sign * held.num_rows_error

    def _place(self, worker: QueueWorker) -> None:
        """Keep the worker's rank among the hungry, and the time at which it is looked at for silence."""
        worker_id = worker.info.worker_id
        if self._wants_more(worker):
            self._hungry.set(worker_id, (worker.load, worker_id))
        else:
            self._hungry.discard(worker_id)
        self._deadlines.set(worker_id, self._choose_deadline(worker))

    def _choose_deadline(self, worker: QueueWorker) -> float:
        heard = worker.heard_at + self._cluster.worker_timeout_s
        return min(heard, worker.progress_at + self._cluster.stall_timeout_s) if worker.is_busy else heard

    # ---- decisions out -----------------------------------------------------------------------------------------------

    def lease_next(self, now: float) -> Lease | None:
        """One lease for the worker that needs it most, or None. Call until None."""
        if (hungriest := self._hungry.peek()) is None:
            return None
        worker = self._workers[hungriest[1]]
        number = self._backlog.pick(worker.last_shard + 1, now)
        return None if number is None else self._lend(worker, number, now)

    def _wants_more(self, worker: QueueWorker) -> bool:
        num_open = len(worker.open)
        if num_open >= MAX_OPEN_SHARDS or worker.is_apart or worker.is_leaving:
            return False
        num_rows, windows_ahead = worker.num_unfinished, WINDOWS_AHEAD
        if self._backlog.is_hinted and self._votes.is_followed:
            # Beside what it was lent in order: the longest row of all may be elsewhere, and it must begin soon.
            num_open, num_rows = num_open - worker.num_open_in_order, num_rows - worker.num_in_order
            windows_ahead = HINTED_WINDOWS_AHEAD
        return num_open < MIN_OPEN_SHARDS or self._n * num_rows < windows_ahead * worker.info.window

    def _lend(self, worker: QueueWorker, number: int, now: float, only: RowRanges = ()) -> Lease:
        lease, work = self._backlog.take(number, worker.info.worker_id), self._backlog.get_work(number)
        lease = replace(lease, only=only, is_last_resort=False) if only else lease
        if not worker.is_busy:
            worker.progress_at = now
        is_in_order = not self._backlog.follows_costs
        self._held[number] = worker.open[lease.batch_id] = OpenLease(lease, work, now, is_in_order)
        worker.last_shard = number
        worker.num_unfinished += lease.shard.num_rows
        worker.num_in_order += lease.shard.num_rows if is_in_order else 0
        worker.num_open_in_order += is_in_order
        worker.load += work
        self._place(worker)
        return lease

    def list_silent(self, now: float) -> list[tuple[str, str]]:
        """(worker, reason) of workers to give up: not heard of, or busy without a sign of progress."""
        silent, due = [], []
        while (first := self._deadlines.peek()) is not None and first[0] <= now:
            worker = self._workers[first[1]]
            self._deadlines.discard(first[1])
            due.append(worker)
            if (reason := self._find_fault(worker, now)) is not None:
                silent.append((first[1], reason))
        for worker in due:
            self._deadlines.set(worker.info.worker_id, self._choose_deadline(worker))
        return silent

    def _find_fault(self, worker: QueueWorker, now: float) -> str | None:
        if now - worker.heard_at > self._cluster.worker_timeout_s:
            return f"not heard of for {self._cluster.worker_timeout_s:g} s"
        if worker.is_busy and now - worker.progress_at > self._cluster.stall_timeout_s:
            return f"no token and no row for {self._cluster.stall_timeout_s:g} s"
        return None

    def find_hopeless(self) -> tuple[int, str] | None:
        """A shard whose lease failed too often on live workers (its store or input is at fault), with the reason."""
        return self._backlog.find_hopeless()

    # ---- shares of lent shards ---------------------------------------------------------------------------------------

    def lend_share(self, owner_id: str, batch_id: str, helper_id: str, num_requests: int, now: float) -> Share:
        """Part of what the owner holds under this batch goes to a helper, as an attempt of its own."""
        held, helper = self._workers[owner_id].open[batch_id], self._workers[helper_id]
        share = Share(self._backlog.make_lease(held.lease.shard.number, helper_id), owner_id, batch_id)
        if not helper.is_busy:
            helper.progress_at = now
        helper.shares[share.lease.batch_id] = share
        helper.share_unsent[share.lease.batch_id] = num_requests
        self._place(helper)
        return share

    def end_share(self, share: Share) -> bool:
        """The helper has done with it, or never got it. False when that was known already."""
        helper = self._workers.get(share.lease.worker_id)
        if helper is None or helper.shares.pop(share.lease.batch_id, None) is None:
            return False
        helper.share_unsent.pop(share.lease.batch_id)
        self._place(helper)
        return True

    def has_share(self, share: Share) -> bool:
        helper = self._workers.get(share.lease.worker_id)
        return helper is not None and share.lease.batch_id in helper.shares

    def list_shares(self, worker_id: str) -> list[Share]:
        """What a worker has of others' shards."""
        worker = self._workers.get(worker_id)
        return list(worker.shares.values()) if worker is not None else []

    def find_holder(self, shard_number: int) -> Lease | None:
        """The lease under which somebody works on a shard now."""
        held = self._held.get(shard_number)
        return held.lease if held is not None else None

    # ---- what it knows -----------------------------------------------------------------------------------------------

    def is_shard_done(self, number: int) -> bool:
        return self._backlog.is_done(number)

    @property
    def is_done(self) -> bool:
        return self._backlog.num_done == self._backlog.num_shards

    @property
    def has_leases(self) -> bool:
        return bool(self._held)

    @property
    def num_waiting(self) -> int:
        return self._backlog.num_waiting

    @property
    def num_shards(self) -> int:
        return self._backlog.num_shards

    @property
    def num_done(self) -> int:
        return self._backlog.num_done

    def count_open_rows(self) -> tuple[int, int]:
        """(done, of these errors) rows of leases that are open now; not of shards that another worker has committed."""
        return self._rows_open, self._errors_open

    def list_open(self) -> list[LostLease]:
        """Open leases as they would be lost now: what a resumed run needs to know of them."""
        return [
            LostLease(o.lease, o.started_at, o.started_at, o.num_rows_done, "driver ended") for o in self._held.values()
        ]

    def list_workers(self) -> list[WorkerInfo]:
        return [worker.info for worker in self._workers.values()]

    def look_at_workers(self) -> Iterable[QueueWorker]:
        """For policies that need more than a sum. Read only."""
        return self._workers.values()
