"""One engine and its open shards. No Ray, no queue: leases in, events out.

Rows of all open shards share one in-flight window, longest expected first where lengths are hinted, else in lease order:
while the last rows of one shard are decoded the next shard's rows are read, tokenised and sent already. A retry waits
outside the window. Finished rows wait as Arrow and go to the journal at every interval; a complete shard is committed off
the event loop while the window stays full.

Invariants: a shard is committed by its own task only; after `WorkerLost` or `drain` nothing more is sent to the engine;
any unexpected error ends the worker, never a row silently.
"""

import asyncio
import contextlib
import time
from dataclasses import replace

from batchgen.build import build_id
from batchgen.continuation import make_serving
from batchgen.engines import create_engine, list_refused
from batchgen.engines.base import Engine
from batchgen.errors import BatchgenError, EngineDied, InputChanged, Refusal, StorageError
from batchgen.events import Heartbeat, JournalFlushed, PoolEvent, ShardFailed, WorkerLost, WorkerWarned
from batchgen.feeder import Feeder
from batchgen.hint_check import HintCheck
from batchgen.journal import make_segment_path
from batchgen.open_shard import OpenShard
from batchgen.orders import Order
from batchgen.prepare import Preparer
from batchgen.records import Lease, WorkerInfo
from batchgen.sender import Sender
from batchgen.shard_files import ShardFiles, Spent, make_event
from batchgen.stats import make_lost_stats
from batchgen.tasks import TaskGroup
from batchgen.worker_setup import WorkerSetup as WorkerSetup  # known here to all who make workers
from batchgen.worker_shares import Hooks, WorkerShares, join_rows

# Shards written at the same time: one uploads while the next is encoded; more would only take memory.
MAX_COMMITS = 2


class Worker:
    """See the module. All methods but `__init__` belong to one event loop."""

    def __init__(self, setup: WorkerSetup, engine: Engine, node: str) -> None:
        self._setup, self._engine, self._node = setup, engine, node
        self._spec = setup.spec
        self._files = ShardFiles(setup.storage, setup.spec, setup.passthrough)
        self._shards: dict[str, OpenShard] = {}
        self._events: list[PoolEvent] = []
        self._shard_tasks = TaskGroup(self._die)
        self._other_tasks = TaskGroup(self._die)
        self._num_segments = 0
        self._has_ended = False

    # ---- what the pool calls -----------------------------------------------------------------------------------------

    async def open(self) -> WorkerInfo:
        """Load the engine. Raises EngineDied or SpecError with the reason."""
        started = time.monotonic()
        await self._engine.open()
        spec, engine, prior = self._spec, self._engine, self._setup.prior
        preparer = Preparer(spec, engine.tokenizer, engine.max_model_len, list_refused(spec.engine.kind), prior)
        serving, hints = make_serving(engine, spec, prior), HintCheck()
        self._sender = Sender(serving, spec.engine.max_inflight, spec.retry, self._die, hints.note)
        self._feeder = Feeder(spec, self._setup.passthrough, preparer, self._sender, hints)
        self._window = self._sender.window
        self._wake, self._flushing = asyncio.Event(), asyncio.Lock()
        self._committing = asyncio.Semaphore(MAX_COMMITS)
        self._other_tasks.spawn(self._feeder.run())
        self._other_tasks.spawn(self._flush_often())
        self.info = WorkerInfo(
            worker_id=self._setup.worker_id,
            build=build_id(),
            node=self._node,
            engine_kind=self._engine.kind,
            engine_version=self._engine.version,
            num_gpus=spec.cluster.gpus_per_worker,
            window=spec.engine.max_inflight,
            startup_s=time.monotonic() - started,
        )
        hooks = Hooks(self._feeder.feed, self._flush, self._emit)
        self._shares = WorkerShares(self.info, self._files, self._sender, self._shards, hooks)
        return self.info

    def assign(self, lease: Lease) -> None:
        """Begin a shard."""
        shard = OpenShard(lease, self._spec.sampling.n, self._files.result_schema)
        self._shards[lease.batch_id] = shard
        self._shard_tasks.spawn(self._run_shard(shard))

    def tell(self, order: Order) -> None:
        """Carry out an order about shares of a shard."""
        self._shard_tasks.spawn(self._shares.obey(order))

    async def poll(self, timeout_s: float) -> list[PoolEvent]:
        """Events since the last poll, at once or when the first comes, and always a heartbeat."""
        if not self._events:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):  # nothing happened: the heartbeat alone is the news
                await asyncio.wait_for(self._wake.wait(), timeout_s)
        events, self._events = self._events, []
        return [*events, self._make_heartbeat()]

    def wake(self) -> None:
        """End a poll that waits."""
        self._wake.set()

    async def drain(self, timeout_s: float) -> list[PoolEvent]:
        """Send nothing more, give rows in flight this long to finish, end commits under way, journal what is finished."""
        self._stop()
        await self._sender.settle(timeout_s)
        await self._shard_tasks.wait()
        await self._flush()
        events, self._events = self._events, []
        return events

    async def close(self) -> None:
        """End all tasks and the engine. Unjournaled rows are lost: drain first."""
        self._stop()
        await self._sender.close()
        await self._other_tasks.cancel()
        await self._shard_tasks.cancel()
        await self._engine.close()

    # ---- one shard ---------------------------------------------------------------------------------------------------

    async def _run_shard(self, shard: OpenShard) -> None:
        started_at, started, integral = time.time(), time.monotonic(), self._window.read_integral()
        try:
            if (standing := await asyncio.to_thread(self._files.find_committed, shard.lease)) is not None:
                stats = replace(
                    make_lost_stats(shard.lease.batch_id, info=self.info, started_at=started_at, wall_s=0.0),
                    outcome="superseded",
                )
                self._emit(make_event(self.info.worker_id, stats, standing))
                return
            await self._recover(shard)
            shard.is_recovered = True
            await self._feeder.feed(shard)
            await shard.wait_ended()
            if shard.is_closed:
                return
            wall_s = time.monotonic() - started
            mean = (self._window.read_integral() - integral) / wall_s if wall_s > 0 else None
            async with self._committing:
                event = await asyncio.to_thread(self._files.commit, shard, self.info, Spent(started_at, wall_s, mean))
            self._emit(event)
        except (StorageError, Refusal) as error:
            await self._give_back(shard, error)
        finally:
            shard.close()
            if not self._has_ended:  # else its finished rows still go to the journal
                self._shards.pop(shard.lease.batch_id, None)

    async def _give_back(self, shard: OpenShard, error: BatchgenError) -> None:
        """The store or the input failed, or rows show that the job can't work as asked (the model has no chat template):
        the lease ends here, its finished rows are journaled for the next one."""
        await self._flush()
        is_fatal = isinstance(error, InputChanged | Refusal)
        lease = shard.lease
        self._emit(ShardFailed(self.info.worker_id, lease.batch_id, lease.shard.number, str(error), is_fatal))

    async def _recover(self, shard: OpenShard) -> None:
        lease = shard.lease
        if lease.replaces is not None:
            kept, shard.replaced_attempt = await asyncio.to_thread(
                self._files.read_kept, lease, self._spec.retry.errors
            )
            shard.recover(kept, are_copied=True)
        if lease.journal:
            saved = await asyncio.to_thread(self._files.read_journal, lease, shard.replaced_attempt)
            shard.recover(saved, are_copied=False)

    # ---- the journal -------------------------------------------------------------------------------------------------

    async def _flush_often(self) -> None:
        while True:
            await asyncio.sleep(self._spec.output.journal_interval_s)
            await self._flush()

    async def _flush(self) -> None:
        """Journal what is finished and not committed. A store that fails now is tried again at the next interval."""
        async with self._flushing:
            taken = {shard: taken for shard in self._shards.values() if (taken := shard.take_unflushed())}
            if not taken:
                return
            self._num_segments += 1
            path = make_segment_path(self._setup.epoch, self._setup.worker_id, self._num_segments)
            rows = join_rows((shard.lease.shard.number, table) for shard, (table, _) in taken.items())
            try:
                refs = await asyncio.to_thread(self._files.write_segment, path, rows)
            except StorageError as error:
                self._emit(WorkerWarned(self._setup.worker_id, f"finished rows are not journaled yet: {error}"))
                return
            for shard, (_, mark) in taken.items():
                shard.set_flushed(mark)
            self._emit(JournalFlushed(self._setup.worker_id, tuple(refs.items())))

    # ---- ends --------------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        self._has_ended = True
        self._sender.stop()
        for shard in self._shards.values():
            shard.close()

    def _die(self, reason: str) -> None:
        """The engine (or we) can't go on: save what is finished, then say so."""
        if not self._has_ended:
            self._stop()
            self._other_tasks.spawn(self._report_death(reason))

    async def _report_death(self, reason: str) -> None:
        try:
            await self._sender.settle(0)
            await self._flush()
        finally:  # whatever kept us from saving, the driver must hear of the loss, or it waits for us
            self._emit(WorkerLost(self._setup.worker_id, reason))

    def _emit(self, event: PoolEvent) -> None:
        self._events.append(event)
        self._wake.set()

    def _make_heartbeat(self) -> Heartbeat:
        return Heartbeat(
            worker_id=self._setup.worker_id,
            total_tokens=self._engine.total_tokens,
            num_inflight=self._window.num_rows,
            integral=self._window.read_integral(),
            shards=tuple(shard.progress for shard in self._shards.values()),
        )


async def open_worker(setup: WorkerSetup, node: str) -> Worker:
    """A worker that is up. Raises EngineDied with the reason, whatever kept the engine from starting."""
    try:
        engine = create_engine(setup.spec)
        try:
            worker = Worker(setup, engine, node)
            await worker.open()
        except Refusal:
            await engine.close()  # it may be up already, and its tokenizer not fit for the job
            raise
    except EngineDied:
        raise
    except Refusal as error:  # its own sentence says all
        raise EngineDied(str(error)) from error
    # A vendor may fail with anything; no row was sent yet, so it is this worker's reason alone.
    except Exception as error:
        raise EngineDied(f"{type(error).__name__}: {error}") from error
    return worker
