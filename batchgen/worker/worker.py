"""One engine and its open shards. No Ray, no queue: leases in, events out.

Rows of all open shards share one in-flight window, longest expected first where lengths are hinted, else in lease order:
while the last rows of one shard are decoded the next shard's rows are read, tokenised and sent already. A retry waits
outside the window. Finished rows wait as Arrow and go to the journal at every interval; a complete shard is committed off
the event loop while the window stays full. A lease of some rows only (`Lease.only`) ends with them in the journal. When an
engine dies, what it had in flight is told.

Invariants: a shard is committed by its own task only; after `WorkerLost` or `drain` nothing more is sent to the engine;
any unexpected error ends the worker, never a row silently.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace

from batchgen.build import build_id
from batchgen.engines import create_engine, list_refused
from batchgen.engines.base import Engine
from batchgen.errors import BatchgenError, EngineDied, InputChanged, Refusal, StorageError
from batchgen.metrics import Meter
from batchgen.queue.events import (
    EngineRestarted,
    Heartbeat,
    PoolEvent,
    ShardFailed,
    ShardReturned,
    WorkerLost,
    WorkerWarned,
)
from batchgen.queue.orders import DuplicateOrder, Order
from batchgen.queue.suspects import ShardRows
from batchgen.records import Lease, WorkerInfo
from batchgen.reuse.carrier import Carrier
from batchgen.row_ranges import iter_rows
from batchgen.stats import make_lost_stats
from batchgen.worker.continuation import Continuation, make_serving
from batchgen.worker.feeder import Feeder
from batchgen.worker.hint_check import HintCheck
from batchgen.worker.open_shard import OpenShard
from batchgen.worker.pace import Pace
from batchgen.worker.prepare import Preparer
from batchgen.worker.ready import Ready, list_rows
from batchgen.worker.sender import Sender
from batchgen.worker.setup import WorkerSetup as WorkerSetup  # known here to all who make workers
from batchgen.worker.shard_files import ShardFiles, Spent, make_event
from batchgen.worker.shares import Hooks, WorkerShares
from batchgen.worker.spill import Spill
from batchgen.worker.tasks import TaskGroup
from batchgen.worker.window import Window

# Shards written at the same time: one uploads while the next is encoded; more would only take memory.
MAX_COMMITS = 2
# A drain waits this long for commits under way; their rows are journaled before.
COMMIT_S = 4.0


class Worker:
    """See the module. All methods but `__init__` belong to one event loop."""

    def __init__(self, setup: WorkerSetup, engine: Engine, node: str, window: Window | None = None) -> None:
        self._setup, self._engine, self._node, self._shared_window = setup, engine, node, window
        self._spec = setup.spec
        self._files = ShardFiles(setup.storage, setup.spec, setup.passthrough)
        self._shards, self._events = dict[str, OpenShard](), list[PoolEvent]()
        self._shard_tasks, self._other_tasks = TaskGroup(self._die), TaskGroup(self._die)
        self._has_ended, self._last_sent, self.meter = False, (-1, 0), Meter()

    # ---- what the pool calls -----------------------------------------------------------------------------------------

    async def open(self) -> WorkerInfo:
        """Load the engine. Raises EngineDied or SpecError with the reason."""
        started = time.monotonic()
        carrier = Carrier(self._spec) if self._spec.input.reuse_from else None
        opening = [self._engine.open(), *([asyncio.to_thread(carrier.open)] if carrier else ())]
        for error in await asyncio.gather(*opening, return_exceptions=True):  # one that is being opened can't be closed
            if error is not None:
                raise error
        spec, engine, setup, size = self._spec, self._engine, self._setup, self._spec.engine.max_inflight
        preparer = Preparer(spec, engine.tokenizer, engine.max_model_len, list_refused(spec.engine), setup.prior)
        serving, self._hints = make_serving(engine, spec, setup.prior), HintCheck(setup.num_requests, size)
        continued = serving if isinstance(serving, Continuation) and serving.is_resumable else None
        restarted, window, list_shards = self._note_restart, self._shared_window, lambda: [*self._shards.values()]
        self._sender = Sender(serving, size, spec.retry, self._die, restarted, self._hints.note, window)
        self._feeder = Feeder(spec, self._setup.passthrough, preparer, self._sender, self._hints, carrier)
        self._window, self._pace = self._sender.window, Pace(size, time.monotonic())
        self._wake, self._committing = asyncio.Event(), asyncio.Semaphore(MAX_COMMITS)
        epoch, worker_id, partials = setup.epoch, setup.worker_id, None if continued is None else continued.partials
        self._spill = Spill(self._files, epoch, worker_id, list_shards, self._emit, partials, self._feeder.n_told)
        self._other_tasks.spawn(self._feeder.run())
        self._feeder.connect(worker_id, setup.storage, self._emit, self._other_tasks.spawn, self._shards)
        self._other_tasks.spawn(self._spill.flush_often(spec.output.journal_interval_s))
        self.info = WorkerInfo(
            worker_id=worker_id,
            build=build_id(),
            node=self._node,
            engine_kind=engine.kind,
            engine_version=engine.version,
            num_gpus=spec.cluster.gpus_per_worker,
            window=spec.engine.max_inflight,
            startup_s=time.monotonic() - started,
            can_move=continued is not None and spec.cluster.moves != "none",
        )
        hooks = Hooks(self._feeder.feed, self._flush, self._emit, self.meter.note)
        seeded = spec.cluster.moves == "all"
        self._shares = WorkerShares(self.info, self._files, self._sender, self._shards, hooks, continued, seeded)
        return self.info

    def assign(self, lease: Lease) -> None:
        """Begin a shard."""
        n = self._spec.sampling.n
        wanted = [(row, sample) for row in iter_rows(lease.only) for sample in range(n)] if lease.only else None
        self._shards[lease.batch_id] = shard = OpenShard(lease, n, self._files.result_schema, wanted, self.meter.note)
        self._shard_tasks.spawn(self._run_shard(shard))

    def tell(self, order: Order) -> None:
        """Carry out an order about shares of a shard, or duplicates."""
        if isinstance(order, DuplicateOrder):
            self._other_tasks.spawn(self._feeder.obey(order))
        else:
            self._shard_tasks.spawn(self._shares.obey(order))

    async def poll(self, timeout_s: float) -> list[PoolEvent]:
        """Events since the last poll, or the first to come, and always a heartbeat: early where rows go fast."""
        wait_s = self._pace.choose_wait_s(self._sender.num_sent, time.monotonic(), timeout_s)
        if not self._events:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):  # nothing happened: the heartbeat alone is the news
                async with asyncio.timeout(wait_s):  # `wait_for` loses cancellations on 3.11
                    await self._wake.wait()
        events, self._events = self._events, []
        return [*events, self._make_heartbeat()]

    def wake(self) -> None:
        """End a poll that waits."""
        self._wake.set()

    async def drain(self, timeout_s: float) -> list[PoolEvent]:
        """Send nothing more, give rows in flight this long to finish, end commits under way, journal what is finished. The
        journal comes first, too: whoever stops us may not wait (`ray job stop` kills after 3 s)."""
        self._stop()
        self._other_tasks.spawn(self._flush())
        await self._sender.settle(timeout_s)
        await self._flush()
        await self._shard_tasks.wait(COMMIT_S)
        await self._flush()
        events, self._events = self._events, []
        self.wake()  # whoever waits for the drain waits for a poll under way, too
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
            if shard.lease.only:
                await self._try_apart(shard)
                return
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

    async def _try_apart(self, shard: OpenShard) -> None:
        """Suspected rows of a shard: with nothing beside them, into the journal, and back."""
        lease = shard.lease
        with self._window.apart():
            await self._sender.wait_apart()
            slots = frozenset((row, sample) for row in iter_rows(lease.only) for sample in range(self._spec.sampling.n))
            await self._feeder.feed(shard, slots)
            await shard.wait_ended()
        if not shard.is_closed:
            await self._flush()
            self._emit(ShardReturned(self.info.worker_id, lease.batch_id, lease.shard.number))

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
            kept, shard.replaced_epoch = await asyncio.to_thread(self._files.read_kept, lease, self._spec.retry.errors)
            shard.recover(kept, are_copied=True)
        if lease.journal:
            saved, left_out = await asyncio.to_thread(self._files.read_journal, lease, shard.replaced_epoch)
            shard.recover(saved, are_copied=False)
            for message in [*left_out, *await self._shares.load_begun(shard, lease.journal)]:
                self._emit(WorkerWarned(self._setup.worker_id, message))
        shard.quarantine(lease.quarantined)

    async def _flush(self) -> None:
        await self._spill.flush([*self._shards.values()])

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
        inflight = self._sender.died_with
        try:
            await self._sender.settle(0)
            await self._flush()
        finally:  # whatever kept us from saving, the driver must hear of the loss, or it waits for us
            suspects = None if inflight is None else list_rows(inflight)
            self._emit(WorkerLost(self._setup.worker_id, reason, suspects))

    def _note_restart(self, reason: str, inflight: list[Ready]) -> None:
        """The engine died and starts anew: which of its rows killed it is found without the others. Nothing else was in
        flight, so no work is lost that isn't already."""
        if self._has_ended:
            return
        shards = [shard for shard in self._shards.values() if not shard.has_ended]
        for shard in shards:
            shard.close()
        self._other_tasks.spawn(self._give_all_back(reason, list_rows(inflight), shards))

    async def _give_all_back(self, reason: str, inflight: tuple[ShardRows, ...], shards: Sequence[OpenShard]) -> None:
        await self._spill.flush(shards)
        batch_ids = tuple(shard.lease.batch_id for shard in shards)
        self._emit(EngineRestarted(self._setup.worker_id, reason, inflight, batch_ids))

    def _emit(self, event: PoolEvent) -> None:
        self._events.append(event)
        self._wake.set()

    def _make_heartbeat(self) -> Heartbeat:
        sent = (self._sender.num_sent, len(self._sender.inflight))
        is_still, self._last_sent = sent == self._last_sent, sent
        return Heartbeat(
            worker_id=self._setup.worker_id,
            total_tokens=self._engine.total_tokens,
            num_inflight=self._window.num_rows,
            integral=self._window.read_integral(),
            shards=tuple(shard.progress for shard in self._shards.values()),
            inflight=list_rows(self._sender.inflight) if is_still else None,
            are_hints_useful=self._hints.verdict,
        )


async def open_worker(setup: WorkerSetup, node: str) -> Worker:
    """A worker that is up. Raises EngineDied with the reason, whatever kept the engine from starting."""
    try:
        async with contextlib.AsyncExitStack() as stack:
            engine = create_engine(setup.spec)
            stack.push_async_callback(engine.close)  # whatever fails: it may be up already, or by half
            await (worker := Worker(setup, engine, node)).open()
            stack.pop_all()
    except EngineDied:
        raise
    except Refusal as error:  # its own sentence says all
        raise EngineDied(str(error)) from error
    # A vendor may fail with anything; no row was sent yet, so it is this worker's reason alone.
    except Exception as error:
        raise EngineDied(f"{type(error).__name__}: {error}") from error
    return worker
