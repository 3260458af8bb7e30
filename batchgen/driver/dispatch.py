"""The one loop that carries decisions out: ask the queue, feed the pool, tell the queue.

It moves descriptors only; rows go between store and workers. It keeps the journal's index, deletes segments that nobody
needs, and collects what every batch did. It ends when all shards are done, or by a RunStopped; then what is finished is
in the journal.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from batchgen import journal
from batchgen.build import build_id, tell_other_build
from batchgen.errors import RunStopped, StorageError
from batchgen.logs import Note, note_batch, note_restart
from batchgen.queue.claims import Claims
from batchgen.queue.events import (
    ClaimsMade,
    EngineRestarted,
    Heartbeat,
    JournalFlushed,
    PoolEvent,
    RowsGiven,
    ShardCommitted,
    ShardFailed,
    ShardReturned,
    ShareEnded,
    WorkerLeaving,
    WorkerLost,
    WorkerPool,
    WorkerStarted,
    WorkerStartFailed,
    WorkerWarned,
)
from batchgen.queue.inquiry import Inquiry
from batchgen.queue.ledger import Ledger
from batchgen.queue.progress import Progress
from batchgen.queue.roster import Roster
from batchgen.queue.sharing import Sharing
from batchgen.queue.staffing import Staffing
from batchgen.queue.tail import TailPolicy
from batchgen.queue.trial_queue import TrialQueue
from batchgen.queue.work_queue import LostLease
from batchgen.records import WorkerInfo
from batchgen.spec import JobSpec
from batchgen.storage import Storage

__all__ = ["Dispatcher", "Progress"]

POLL_S = 0.5
MAX_LEASES_PER_TURN = 1000


@dataclass(slots=True)
class Dispatcher:
    """One run's loop. `check` is called at every turn and raises RunStopped when the run must end: the folder is not ours
    any more, or somebody asked for it."""

    spec: JobSpec
    storage: Storage
    queue: TrialQueue
    pool: WorkerPool
    epoch: int
    index: journal.JournalIndex
    inquiry: Inquiry
    num_rows: int
    num_rows_done_before: int
    check: Callable[[], None]
    on_progress: Callable[[Progress], None]
    on_warning: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    tail: TailPolicy = field(default_factory=TailPolicy)
    ledger: Ledger = field(default_factory=Ledger)
    roster: Roster = field(init=False)
    sharing: Sharing = field(init=False)
    claims: Claims = field(init=False)
    staffing: Staffing = field(init=False)
    _started: float = 0.0

    def __post_init__(self) -> None:
        self.roster = Roster(self.spec.cluster.gpus_per_worker)
        self.staffing = Staffing(self.spec, self.queue, self.pool, self.roster, self.tail, self.on_warning)
        n, known = self.spec.sampling.n, (self.queue, self.pool, self.index, self.epoch)
        self.sharing, self.claims = Sharing(*known, n, self.tail, self._delete), Claims(*known)

    def run(self) -> None:
        """Until all shards are committed. Raises RunStopped; after LeaseLost don't drain: others own the folder."""
        self._started = self.clock()
        while not self.queue.is_done:
            self.check()
            self._scale()
            self._lend()
            for event in self.pool.poll(POLL_S):
                self._handle(event)
            self._give_up_silent()
            self._check_hopeless()
            self.on_progress(self.make_progress())
        self.drain(0.0)  # else the news of a flush under way would reach nobody, and its segment stay

    def drain(self, timeout_s: float) -> None:
        """At the end, or after a RunStopped: let workers journal, and take in what they still committed."""
        for event in self.pool.drain(timeout_s):
            if isinstance(event, JournalFlushed | ShardCommitted | WorkerWarned):
                self._handle(event)
            elif isinstance(event, ShardFailed):
                self.on_warning(note_batch(event.batch_id, event.worker_id, event.reason))
        for lost in self.list_open():
            self._note_lost(replace(lost, ended_at=self.clock()))

    def list_open(self) -> list[LostLease]:
        """Open leases and shares as they would be lost now: what a resumed run needs to know of them."""
        return [*self.queue.list_open(), *self.sharing.list_open(self.clock())]

    def _lend(self) -> None:
        """Not more than so many leases a turn, so that the first fill of a large cluster doesn't hold up the events."""
        for trial in self.inquiry.lend(self.clock(), num_starting=len(self.roster.starting)):
            self.pool.assign(self.inquiry.complete(trial))
        for _ in range(MAX_LEASES_PER_TURN):
            lease = self.queue.lease_next(self.clock())
            if lease is None:
                break
            self.pool.assign(self.inquiry.complete(lease))
        self.sharing.split(self.clock())

    # ---- one turn ----------------------------------------------------------------------------------------------------

    def _scale(self) -> None:
        now, progress = self.clock(), self.make_progress()
        self.staffing.start(progress, now)
        for worker_id in self.staffing.list_idle(now):
            self.pool.kill(worker_id)
            self.roster.release(worker_id, now)
            self.ledger.tally.forget(worker_id)
            self.queue.lose(worker_id, now, "released")
            self._find_segments(worker_id)

    def _give_up_silent(self) -> None:
        now, limit = self.clock(), self.spec.cluster.start_timeout_s
        for worker_id in self.roster.list_overdue(now, limit):
            self.pool.kill(worker_id)
            told = f"not up after {limit:g} s (cluster.start_timeout_s); has the cluster room for it?"
            self._lose(WorkerLost(worker_id, told))
        for worker_id, reason in self.queue.list_silent(self.clock()):
            self.pool.kill(worker_id)
            self._lose(WorkerLost(worker_id, reason, self.ledger.tally.get_inflight(worker_id)))

    def _check_hopeless(self) -> None:
        if (found := self.queue.find_hopeless()) is not None:
            number, reason = found
            raise RunStopped(f"shard-{number:09d} failed {self.spec.retry.max_shard_attempts} times: {reason}")

    # ---- events ------------------------------------------------------------------------------------------------------

    def _handle(self, event: PoolEvent) -> None:
        match event:
            case Heartbeat():
                self.ledger.tally.hear(event)
                self.roster.note_proof(event)
                self.queue.renew(event, self.clock())
            case WorkerStarted(info):
                self._greet(info)
            case WorkerStartFailed(worker_id, reason):
                self._count_start_failure(worker_id, reason)
            case WorkerLost():
                self._lose(event)
            case WorkerLeaving(worker_id, reason):
                self.on_warning(Note(f"{worker_id} gets no more: {reason}", "worker_leaving", worker=worker_id))
                self.queue.retire(worker_id)
            case EngineRestarted():
                self._note_restart(event)
            case WorkerWarned(worker_id, message):
                self.on_warning(Note(f"{worker_id}: {message}", "worker_warned", worker=worker_id))
            case JournalFlushed(_, refs, replaced):
                self._delete(self.index.add_flush(refs, replaced))
                self.claims.note_flushed(event)
            case ShardCommitted():
                self._commit(event)
            case ShardFailed():
                self._fail(event)
            case ShardReturned(worker_id, batch_id, _):
                self._give_back(worker_id, batch_id, "its rows are journaled")
                self.inquiry.note_returned(worker_id, batch_id)
            case RowsGiven():
                self.sharing.note_given(event, self.clock())
            case ShareEnded():
                self._end_share(event)
            case ClaimsMade():
                self.claims.decide(event)

    def _greet(self, info: WorkerInfo) -> None:
        if info.worker_id in self.roster.starting and info.build != build_id():
            self.pool.kill(info.worker_id)
            raise RunStopped(f"{info.worker_id} on {info.node} {tell_other_build(info.build)}")
        if self.roster.greet(info, self.clock()):
            self.queue.add_worker(info, self.clock())

    def _count_start_failure(self, worker_id: str, reason: str) -> None:
        self.roster.count_start_failure(worker_id, self.clock(), reason)
        self.on_warning(Note(f"{worker_id} failed to start: {reason}", "worker_failed_to_start", worker=worker_id))

    def _lose(self, gone: WorkerLost) -> None:
        worker_id, reason = gone.worker_id, gone.reason
        if worker_id in self.roster.starting:
            self._count_start_failure(worker_id, reason)
            return
        info = self.roster.remove(worker_id, self.clock())
        if info is None:
            return
        self.roster.num_lost += 1
        self.on_warning(Note(f"{worker_id} was lost: {reason}", "worker_lost", worker=worker_id, node=info.node))
        beat = self.ledger.tally.forget(worker_id)
        shares = self.queue.list_shares(worker_id)
        self._find_segments(worker_id)
        is_trial = self.inquiry.is_trying(worker_id)
        is_looked_into = self.inquiry.note_loss(gone, info.window)
        lost = self.queue.lose(worker_id, self.clock(), reason, is_counted=not is_looked_into)
        for one in [*lost, *self.sharing.note_lost(worker_id, shares, self.clock(), reason)]:
            self._note_lost(one, info)
        is_mute = gone.has_rows_to_blame and (beat is None or beat.total_tokens == 0)
        if is_mute and self.roster.is_failure(is_trial=is_trial):
            # It came up and made no token: an engine that always dies so must not be started for ever.
            self._count_start_failure(worker_id, reason)

    def _note_restart(self, event: EngineRestarted) -> None:
        if (info := self.roster.workers.get(event.worker_id)) is not None:
            self.on_warning(note_restart(event.worker_id, event.reason))
            self.inquiry.note_restart(event, info.window)
            for batch_id in event.batch_ids:
                self._give_back(event.worker_id, batch_id, event.reason)

    def _give_back(self, worker_id: str, batch_id: str, reason: str) -> None:
        if (lost := self.queue.give_back(worker_id, batch_id, self.clock(), reason)) is not None:
            self._note_lost(lost)

    def _find_segments(self, worker_id: str) -> None:
        prefix, fingerprint = journal.make_worker_prefix(self.epoch, worker_id), self.spec.fingerprint()
        self._delete(journal.find_segments(self.storage, self.index, prefix, fingerprint, self.on_warning))

    def _note_lost(self, lost: LostLease, info: WorkerInfo | None = None) -> None:
        self.ledger.note_lost(lost, info or self.roster.workers.get(lost.lease.worker_id), self.clock())
        self.claims.note_ended(lost.lease.shard.number)

    def _commit(self, event: ShardCommitted) -> None:
        self.ledger.note_end(event)
        number = event.footer.shard
        if self.queue.complete(event.worker_id, event.batch_id, number):
            self.ledger.commit(event)
            self.claims.note_committed(number)
            for lost in self.sharing.note_committed(number, self.clock()):
                self._note_lost(lost)
            self._delete(self.index.complete(number))
            self.inquiry.note_committed(number)
        self.inquiry.note_returned(event.worker_id, event.batch_id)  # it may have found the file instead of rows to try

    def _fail(self, event: ShardFailed) -> None:
        if event.is_fatal:
            raise RunStopped(event.reason)
        if (lost := self.queue.fail(event.worker_id, event.batch_id, self.clock(), event.reason)) is not None:
            self.on_warning(note_batch(event.batch_id, event.worker_id, event.reason))
            self._note_lost(lost)
            self.inquiry.note_failed(event.worker_id, event.batch_id)

    def _end_share(self, event: ShareEnded) -> None:
        if self.sharing.note_ended(event) and event.reason is not None:
            self.on_warning(note_batch(event.share.lease.batch_id, event.worker_id, event.reason))
        if event.stats is not None:
            self.ledger.note_batches([event.stats])

    def _delete(self, paths: list[str]) -> None:
        """Segments of committed shards. One that stays costs a few bytes until the next run clears it."""
        try:
            if paths:
                self.storage.delete_many(paths)
        except StorageError as error:
            self.on_warning(f"journal segments were not deleted: {error}")

    # ---- what it knows -----------------------------------------------------------------------------------------------

    def count_gpu_hours(self) -> float | None:
        """Of all workers so far; None where they reserve no GPU."""
        return self.roster.count_gpu_s(self.clock()) / 3600 if self.spec.cluster.gpus_per_worker else None

    def make_progress(self) -> Progress:
        n = self.spec.sampling.n
        rows_open, errors_open = self.queue.count_open_rows()
        return Progress(
            num_rows=self.num_rows,
            num_shards=self.queue.num_shards,
            num_shards_done=self.queue.num_done,
            num_rows_done=self.num_rows_done_before + self.ledger.tally.num_results // n + rows_open,
            num_rows_error=self.ledger.tally.num_errors + errors_open,
            num_rows_done_before=self.num_rows_done_before,
            num_tokens=self.ledger.tally.num_tokens,
            num_workers=len(self.roster.workers),
            num_starting=len(self.roster.starting),
            num_inflight=self.ledger.tally.num_inflight,
            window=self.roster.window,
            num_lost=self.roster.num_lost,
            elapsed_s=self.clock() - self._started,
        )
