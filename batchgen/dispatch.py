"""The one loop that carries decisions out: ask the queue, feed the pool, tell the queue.

It moves descriptors only; rows go between store and workers. It keeps the journal's index, deletes segments that nobody
needs, and collects what every batch did. It ends when all shards are done, or by a RunStopped; then what is finished is
in the journal.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from batchgen import journal
from batchgen.batches import BatchStats
from batchgen.build import build_id
from batchgen.errors import NoWorkers, RunStopped, StorageError
from batchgen.events import (
    EngineRestarted,
    Heartbeat,
    JournalFlushed,
    PoolEvent,
    ShardCommitted,
    ShardFailed,
    ShardReturned,
    WorkerLeaving,
    WorkerLost,
    WorkerPool,
    WorkerStarted,
    WorkerStartFailed,
    WorkerWarned,
)
from batchgen.inquiry import Inquiry
from batchgen.manifest import CommittedShard, add_batches
from batchgen.records import WorkerInfo, make_data_path
from batchgen.scaling import Facts, choose_num_to_start
from batchgen.spec import JobSpec
from batchgen.stats import make_lost_stats
from batchgen.storage import FileInfo, Storage
from batchgen.trial_queue import TrialQueue
from batchgen.work_queue import LostLease

POLL_S = 0.5
MAX_LEASES_PER_TURN = 1000


@dataclass(slots=True)
class Progress:
    """What a view or the status object shows of a run. Rows are input rows, tokens completion tokens."""

    num_rows: int
    num_shards: int
    num_shards_done: int
    num_rows_done: int
    num_rows_error: int
    num_rows_done_before: int
    num_tokens: int
    num_workers: int
    num_starting: int
    num_inflight: int
    window: int
    num_lost: int
    elapsed_s: float


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
    batches: dict[str, BatchStats] = field(default_factory=dict)
    committed: dict[int, CommittedShard] = field(default_factory=dict)
    _starting: dict[str, float] = field(default_factory=dict)
    _workers: dict[str, WorkerInfo] = field(default_factory=dict)
    _beats: dict[str, Heartbeat] = field(default_factory=dict)
    _tokens_before: int = 0
    _num_rows_committed: int = 0
    _num_errors_committed: int = 0
    _num_workers_made: int = 0
    _num_start_failures: int = 0
    _first_start_failure: str = ""
    _num_mute_trials: int = 0
    _startups: list[float] = field(default_factory=list)
    _num_lost: int = 0
    _proven: set[str] = field(default_factory=set)
    _started: float = 0.0
    _ready_worker_s: float = 0.0
    _turned_at: float = 0.0

    def run(self) -> None:
        """Until all shards are committed. Raises RunStopped; after LeaseLost don't drain: others own the folder."""
        self._started = self._turned_at = self.clock()
        while not self.queue.is_done:
            self.check()
            self._scale()
            self._lend()
            for event in self.pool.poll(POLL_S):
                self._handle(event)
            self._give_up_silent()
            self._check_hopeless()
            self.on_progress(self.make_progress())

    def drain(self, timeout_s: float) -> None:
        """After a RunStopped: let workers journal, and take in what they still committed."""
        for event in self.pool.drain(timeout_s):
            if isinstance(event, JournalFlushed | ShardCommitted | WorkerWarned):
                self._handle(event)
            elif isinstance(event, ShardFailed):
                self.on_warning(f"{event.batch_id} on {event.worker_id}: {event.reason}")
        for lost in self.queue.list_open():
            self._note_lost(replace(lost, ended_at=self.clock()), self._workers.get(lost.lease.worker_id))

    def _lend(self) -> None:
        """Not more than so many leases a turn, so that the first fill of a large cluster doesn't hold up the events."""
        for trial in self.inquiry.lend(self.clock(), num_starting=len(self._starting)):
            self.pool.assign(self.inquiry.complete(trial))
        for _ in range(MAX_LEASES_PER_TURN):
            lease = self.queue.lease_next(self.clock())
            if lease is None:
                return
            self.pool.assign(self.inquiry.complete(lease))

    # ---- one turn ----------------------------------------------------------------------------------------------------

    def _scale(self) -> None:
        now = self.clock()
        self._ready_worker_s += len(self._workers) * (now - self._turned_at)
        self._turned_at = now
        if self._num_start_failures >= self.spec.retry.max_start_failures:
            if not self._workers and not self._starting:
                count, reason = self._num_start_failures, self._first_start_failure
                raise NoWorkers(f"{count} workers in a row failed to start: {reason}")
            return
        for _ in range(choose_num_to_start(self._make_facts(), self.spec.cluster)):
            self._num_workers_made += 1
            worker_id = f"worker-{self._num_workers_made:04d}"
            self._starting[worker_id] = now
            self.pool.start_worker(worker_id)

    def _make_facts(self) -> Facts:
        done = self.make_progress()
        fresh = done.num_rows_done - self.num_rows_done_before
        return Facts(
            num_ready=len(self._workers),
            num_starting=len(self._starting),
            num_shards_waiting=self.queue.num_waiting,
            num_rows_left=self.num_rows - done.num_rows_done,
            rows_per_s=fresh / self._ready_worker_s if fresh > 0 and self._ready_worker_s > 0 else None,
            startup_s=sum(self._startups) / len(self._startups) if self._startups else None,
        )

    def _give_up_silent(self) -> None:
        now, limit = self.clock(), self.spec.cluster.start_timeout_s
        for worker_id in [worker_id for worker_id, since in self._starting.items() if now - since > limit]:
            self.pool.kill(worker_id)
            self._lose(
                WorkerLost(
                    worker_id, f"not up after {limit:g} s (cluster.start_timeout_s); has the cluster room for it?"
                )
            )
        for worker_id, reason in self.queue.list_silent(self.clock()):
            self.pool.kill(worker_id)
            self._lose(
                WorkerLost(worker_id, reason, self._beats[worker_id].inflight if worker_id in self._beats else None)
            )

    def _check_hopeless(self) -> None:
        if (found := self.queue.find_hopeless()) is not None:
            number, reason = found
            raise RunStopped(f"shard-{number:09d} failed {self.spec.retry.max_shard_attempts} times: {reason}")

    # ---- events ------------------------------------------------------------------------------------------------------

    def _handle(self, event: PoolEvent) -> None:
        match event:
            case Heartbeat():
                self._beats[event.worker_id] = event
                self._note_proof(event)
                self.queue.renew(event, self.clock())
            case WorkerStarted(info):
                self._greet(info)
            case WorkerStartFailed(worker_id, reason):
                self._count_start_failure(worker_id, reason)
            case WorkerLost():
                self._lose(event)
            case WorkerLeaving(worker_id, reason):
                self.on_warning(f"{worker_id} gets no more: {reason}")
                self.queue.retire(worker_id)
            case EngineRestarted():
                self._note_restart(event)
            case WorkerWarned(worker_id, message):
                self.on_warning(f"{worker_id}: {message}")
            case JournalFlushed(_, refs, replaced):
                free = self.index.add(dict(refs))
                self._delete(free + [path for number, old in replaced for path in self.index.replace(number, old)])
            case ShardReturned(worker_id, batch_id, _):
                self._give_back(worker_id, batch_id, "its rows are journaled")
                self.inquiry.note_returned(worker_id, batch_id)
            case ShardCommitted():
                self._commit(event)
            case ShardFailed():
                self._fail(event)

    def _greet(self, info: WorkerInfo) -> None:
        started = self._starting.pop(info.worker_id, None)
        if started is None:
            return  # was given up while it started
        if info.build != build_id():
            self.pool.kill(info.worker_id)
            raise RunStopped(
                f"{info.worker_id} on {info.node} runs batchgen {info.build}, the driver {build_id()}; "
                "install the same build on all nodes, or submit with --working-dir ."
            )
        self._startups.append(self.clock() - started)
        self._workers[info.worker_id] = info
        self.queue.add_worker(info, self.clock())

    def _count_start_failure(self, worker_id: str, reason: str) -> None:
        self._starting.pop(worker_id, None)
        self._num_start_failures += 1
        self._first_start_failure = self._first_start_failure or reason
        self.on_warning(f"{worker_id} failed to start: {reason}")

    def _count_mute(self, worker_id: str, reason: str, *, is_trial: bool) -> None:
        """A worker that died without a token. While suspects are tried that is what is waited for: twice as often."""
        self._num_mute_trials += is_trial
        if not is_trial or self._num_mute_trials % 2 == 0:
            self._count_start_failure(worker_id, reason)

    def _note_proof(self, beat: Heartbeat) -> None:
        """A worker's first token shows that workers can start: earlier failures count no more."""
        if beat.total_tokens > 0 and beat.worker_id not in self._proven:
            self._proven.add(beat.worker_id)
            self._num_start_failures, self._num_mute_trials, self._first_start_failure = 0, 0, ""

    def _lose(self, lost: WorkerLost) -> None:
        worker_id, reason = lost.worker_id, lost.reason
        if self._starting.pop(worker_id, None) is not None:
            self._count_start_failure(worker_id, reason)
            return
        info = self._workers.pop(worker_id, None)
        if info is None:
            return
        self._num_lost += 1
        self.on_warning(f"{worker_id} was lost: {reason}")
        beat = self._beats.pop(worker_id, None)
        self._tokens_before += beat.total_tokens if beat else 0
        self._find_segments(worker_id)
        is_trial = self.inquiry.is_trying(worker_id)
        self._take_leases(lost, info)
        if (beat is None or beat.total_tokens == 0) and lost.has_rows_to_blame:
            # It came up and made no token: an engine that always dies so must not be started for ever.
            self._count_mute(worker_id, reason, is_trial=is_trial)

    def _take_leases(self, lost: WorkerLost, info: WorkerInfo) -> None:
        """Its shards wait again, those with suspected rows apart."""
        now, is_counted = self.clock(), True
        if lost.has_rows_to_blame:
            held = self.queue.list_leases(lost.worker_id)
            is_counted = not self.inquiry.note_death(lost.worker_id, lost.reason, lost.inflight, held, info.window)
        else:
            self.inquiry.note_innocent(lost.worker_id)
        for ended in self.queue.lose(lost.worker_id, now, lost.reason, is_counted=is_counted):
            self._note_lost(ended, info)

    def _note_restart(self, event: EngineRestarted) -> None:
        worker_id, info = event.worker_id, self._workers.get(event.worker_id)
        if info is None:
            return
        self.on_warning(f"{worker_id}'s engine died and is started anew: {event.reason}")
        held = [lost for lost in self.queue.list_leases(worker_id) if lost.lease.batch_id in event.batch_ids]
        self.inquiry.note_death(worker_id, event.reason, event.inflight, held, info.window)
        for batch_id in event.batch_ids:
            self._give_back(worker_id, batch_id, event.reason)

    def _give_back(self, worker_id: str, batch_id: str, reason: str) -> None:
        if (lost := self.queue.give_back(worker_id, batch_id, self.clock(), reason)) is not None:
            self._note_lost(lost, self._workers.get(worker_id))

    def _find_segments(self, worker_id: str) -> None:
        """A segment may have been written whose news died with the worker."""
        prefix = journal.make_worker_prefix(self.epoch, worker_id)
        paths = [path for path in journal.list_segments(self.storage) if path.startswith(prefix)]
        new = [path for path in paths if not self.index.knows(path)]
        for refs in journal.read_indexes(self.storage, new, self.spec.fingerprint(), self.on_warning):
            self._delete(self.index.add(refs))

    def _note_lost(self, lost: LostLease, info: WorkerInfo | None) -> None:
        now, wall = self.clock(), time.time()
        stats = make_lost_stats(
            lost.lease.batch_id,
            info=info,
            started_at=wall - (now - lost.started_at),
            wall_s=lost.ended_at - lost.started_at,
        )
        add_batches(self.batches, [stats])

    def _commit(self, event: ShardCommitted) -> None:
        self.batches.pop(event.batch_id, None)  # the end of a batch says more than what was noted while it ran
        add_batches(self.batches, [event.stats, *event.footer.batches])
        number = event.footer.shard
        if self.queue.complete(event.worker_id, event.batch_id, number):
            info = FileInfo(make_data_path(number), event.num_bytes, event.version)
            self.committed[number] = CommittedShard(info, event.footer, event.footer_sha256)
            self._num_rows_committed += event.footer.num_rows_ok + event.footer.num_rows_error
            self._num_errors_committed += event.footer.num_rows_error
            self._delete(self.index.complete(number))

    def _fail(self, event: ShardFailed) -> None:
        if event.is_fatal:
            raise RunStopped(event.reason)
        lost = self.queue.fail(event.worker_id, event.batch_id, self.clock(), event.reason)
        if lost is not None:
            self.on_warning(f"{event.batch_id} on {event.worker_id}: {event.reason}")
            self._note_lost(lost, self._workers.get(event.worker_id))
            self.inquiry.note_failed(event.worker_id, event.batch_id)

    def _delete(self, paths: list[str]) -> None:
        """Segments of committed shards. One that stays costs a few bytes until the next run clears it."""
        try:
            self.storage.delete_many(paths)
        except StorageError as error:
            self.on_warning(f"journal segments were not deleted: {error}")

    # ---- what it knows -----------------------------------------------------------------------------------------------

    def make_progress(self) -> Progress:
        n = self.spec.sampling.n
        rows_open, errors_open = self.queue.count_open_rows()
        return Progress(
            num_rows=self.num_rows,
            num_shards=self.queue.num_shards,
            num_shards_done=self.queue.num_done,
            num_rows_done=self.num_rows_done_before + self._num_rows_committed // n + rows_open,
            num_rows_error=self._num_errors_committed + errors_open,
            num_rows_done_before=self.num_rows_done_before,
            num_tokens=self._tokens_before + sum(beat.total_tokens for beat in self._beats.values()),
            num_workers=len(self._workers),
            num_starting=len(self._starting),
            num_inflight=sum(beat.num_inflight for beat in self._beats.values()),
            window=sum(info.window for info in self._workers.values()),
            num_lost=self._num_lost,
            elapsed_s=self.clock() - self._started,
        )
