"""The work queue, and the part of it that lends suspected rows apart from all others (`suspects`, `inquiry`). Pure.

A shard that is held waits apart: no lease of it but for some of its rows, to a worker that has nothing else and gets
nothing else until it has given them back. Where no worker is idle one is kept free.
"""

from collections.abc import Iterable

from batchgen.queue.leases import OpenLease, QueueWorker
from batchgen.queue.suspects import ShardRows
from batchgen.queue.work_queue import LostLease, WorkQueue
from batchgen.records import Lease


class TrialQueue(WorkQueue):
    """See the module."""

    _reserved: str | None = None

    # ---- facts in ----------------------------------------------------------------------------------------------------

    def hold(self, numbers: Iterable[int]) -> None:
        """These shards, and no others, are lent by `lend_rows` only."""
        self._backlog.hold(numbers)

    def give_back(self, worker_id: str, batch_id: str, now: float, reason: str) -> LostLease | None:
        """The lease ended without a commit and for no fault of its shard, which waits again. None for a zombie's."""
        worker = self._workers.get(worker_id)
        held = self._close(worker, batch_id) if worker is not None else None
        if held is None:
            return None
        self._backlog.note_return(held.lease.shard.number, reason)
        return LostLease(held.lease, held.started_at, now, held.num_rows_done, reason)

    def retire(self, worker_id: str) -> None:
        """The worker gets no more leases."""
        if (worker := self._workers.get(worker_id)) is not None:
            worker.is_leaving = True
            self._place(worker)

    def _close(self, worker: QueueWorker, batch_id: str) -> OpenLease | None:
        """However the last lease of a trial ended, its worker is one among the others again. (A zombie may have committed
        the shard whose rows it tries: then there is no more to try, and nothing to give back.)"""
        held = super()._close(worker, batch_id)
        if held is not None and worker.is_apart and not worker.open:
            worker.is_apart = False
            self._place(worker)
        return held

    # ---- decisions out -----------------------------------------------------------------------------------------------

    def find_idle(self) -> str | None:
        """A worker that has nothing to do."""
        idle = (
            worker_id for worker_id, worker in self._workers.items() if not worker.is_busy and not worker.is_leaving
        )
        return min(idle, default=None)

    def can_lend_rows(self, numbers: Iterable[int]) -> bool:
        """Does none of these held shards lie with a worker?"""
        return all(self._backlog.waits_apart(number) for number in numbers)

    def lend_rows(self, worker_id: str, rows: Iterable[ShardRows], now: float) -> list[Lease]:
        """These rows of held shards to one idle worker, which gets nothing else until it has given them back."""
        worker = self._workers[worker_id]
        worker.is_apart = True
        return [self._lend(worker, number, now, only=ranges) for number, ranges in rows]

    def reserve(self, *, is_wanted: bool) -> None:
        """Where one is wanted, the worker with the fewest rows left gets no more until it is idle."""
        before, self._reserved = self._reserved, None
        if is_wanted:
            ready = [worker for worker in self._workers.values() if not worker.is_apart and not worker.is_leaving]
            first = min(ready, key=lambda w: (w.num_unfinished, w.info.worker_id), default=None)
            self._reserved = before if before in self._workers else first.info.worker_id if first is not None else None
        for worker_id in {before, self._reserved} - {None}:
            if before != self._reserved and (worker := self._workers.get(str(worker_id))) is not None:
                self._place(worker)

    def _wants_more(self, worker: QueueWorker) -> bool:
        return worker.info.worker_id != self._reserved and super()._wants_more(worker)

    # ---- what it knows -----------------------------------------------------------------------------------------------

    def has_done(self, number: int) -> bool:
        """Is this shard's file there?"""
        return self._backlog.is_done(number)

    def list_leases(self, worker_id: str) -> list[LostLease]:
        """A worker's open leases, as they would be lost now."""
        worker = self._workers.get(worker_id)
        held = worker.open.values() if worker is not None else ()
        return [LostLease(o.lease, o.started_at, o.started_at, o.num_rows_done, "driver ended") for o in held]
