"""The conductor: takes batches from the store, earliest deadline first, and brings each one step further until it is over.

A step begins with a claim and ends with a change of the batch's record, and may be repeated: killed at any instant, the
next conductor finds the batch as it was and does the step again. A run is a step as well, and goes on where it stopped.
Any number of conductors may share a store. No Ray: rows go to the pool that `create_pool` makes.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from batchgen.driver.hold import Hold
from batchgen.driver.pools import create_pool as create_own_pool
from batchgen.errors import BatchgenError, LeaseHeld, LeaseLost, OutputError, StorageError
from batchgen.logs import name_fault
from batchgen.queue.events import WorkerPool
from batchgen.serve.batch_run import BatchRun
from batchgen.serve.claims import Claims
from batchgen.serve.door import BulkJob, CreateBulkPool
from batchgen.serve.records import BatchRecord
from batchgen.serve.spec import EndpointSpec
from batchgen.serve.state import State
from batchgen.serve.steps import Steps
from batchgen.serve.sweep import sweep
from batchgen.worker.worker import WorkerSetup

log = logging.getLogger("batchgen.serve")
POLL_S = 1.0
CLAIM_TTL_S = 30.0
SWEEP_S = 600.0
MAX_BACKOFF_S = 60.0
MAX_DOUBLINGS = 10
# Tries of a validation that ends in a fault of our own: the same file would end in it for ever.
MAX_FAULTS = 3
NUM_SHORT = 2
# At once, of the records of open batches: one after the other they take longer than a look lasts.
NUM_READERS = 16


def create_inline_pool(setup: WorkerSetup, bulk: BulkJob) -> WorkerPool:
    """What the spec's own `cluster.pool` says."""
    del bulk
    return create_own_pool(setup)


@dataclass(slots=True)
class _Trouble:
    num_failures: int = 0
    not_before: float = 0.0


class Conductor:
    """`start` and `stop` once each. `wake`: a batch was created, so don't wait for the next look."""

    def __init__(
        self,
        spec: EndpointSpec,
        state: State,
        create_pool: CreateBulkPool = create_inline_pool,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        self._spec, self._state, self._say = spec, state, say
        self._steps = Steps(spec, state, say)
        self._create_pool = create_pool
        self._claims = Claims(state, CLAIM_TTL_S)
        self._long = ThreadPoolExecutor(spec.limits.max_running, "batch")
        self._short = ThreadPoolExecutor(NUM_SHORT, "batch-step")
        self._readers = ThreadPoolExecutor(NUM_READERS, "records")
        self._busy: dict[str, Future[None]] = {}
        self._running: set[str] = set()
        self._trouble: dict[str, _Trouble] = {}
        self._is_stopping, self._news = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="conductor", daemon=True)
        self._next_sweep = 0.0

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._news.set()

    def stop(self) -> None:
        """Runs drain as on SIGTERM; their batches go on when a conductor is there again."""
        self._is_stopping.set()
        self.wake()
        self._thread.join()
        self._readers.shutdown()
        self._short.shutdown()
        self._long.shutdown()

    # ---- which batches

    def _loop(self) -> None:
        while not self._is_stopping.is_set():
            try:
                self.turn()
            except StorageError as error:
                self._say(f"the store failed, which is tried again: {error}")
            except BatchgenError as error:  # something in the store is damaged: said, and looked at again
                self._say(str(error))
            # Nobody would notice that this thread is gone, and every batch would wait for ever.
            except Exception as error:
                self._say(f"a look at the open batches failed, and is tried again: {name_fault(error)}")
                log.debug("a look at the open batches", exc_info=True)
            self._news.wait(POLL_S)
            self._news.clear()

    def turn(self) -> None:
        """Look at all open batches once, and begin what there is room for."""
        self._busy = {batch_id: work for batch_id, work in self._busy.items() if not work.done()}
        self._running &= self._busy.keys()
        waiting = [record for record in self._readers.map(self._look, self._state.list_open()) if record is not None]
        for record in sorted(waiting, key=lambda record: (record.expires_at, record.id)):
            if not self._is_stopping.is_set():
                self._begin(record)
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + SWEEP_S
            self._short.submit(self._sweep)

    def _look(self, place: tuple[str, str]) -> BatchRecord | None:
        """The batch, where there is something to do for it now."""
        tenant, batch_id = place
        if batch_id in self._busy or self._trouble.get(batch_id, _Trouble()).not_before > time.monotonic():
            return None
        try:
            record = self._state.read_batch(tenant, batch_id)
        except OutputError as error:  # a damaged record must not hold up the others
            self._back_off(batch_id, str(error))
            return None
        if record is None or record.is_over:
            self._steps.forget(tenant, batch_id, record, self._claims)
            return None
        return record

    def _begin(self, record: BatchRecord) -> None:
        is_long = record.batch.status == "in_progress" and self._state.now() < record.expires_at
        if is_long and len(self._running) >= self._spec.limits.max_running:
            return
        try:
            if not self._claims.is_free(record.id):
                return
        except OutputError as error:  # nor a damaged claim
            self._back_off(record.id, str(error))
            return
        lane = self._long if is_long else self._short
        self._busy[record.id] = lane.submit(self._work, record.tenant, record.id)
        if is_long:
            self._running.add(record.id)

    def _sweep(self) -> None:
        """Beside the steps: of ten thousand files it takes minutes."""
        try:
            sweep(self._state, self._say)
        except BatchgenError as error:
            self._say(f"the sweep is tried again later: {error}")

    # ---- one step of one batch

    def _work(self, tenant: str, batch_id: str) -> None:
        try:
            with self._claims.hold(batch_id) as hold:
                self._step(tenant, batch_id, hold)
        except (LeaseHeld, LeaseLost):
            pass  # another conductor has it
        except BatchgenError as error:
            self._back_off(batch_id, str(error))
        # A batch must not take the others down, whatever is wrong with it; no step loses anything by being repeated.
        except Exception as error:
            log.debug("%s", batch_id, exc_info=True)
            self._back_off(batch_id, name_fault(error))
        self.wake()

    def _step(self, tenant: str, batch_id: str, hold: Hold) -> None:
        record = self._state.read_batch(tenant, batch_id)
        if record is None or record.is_over:
            return
        run = BatchRun(self._state, record, hold, self._is_stopping.is_set, self._say)
        if record.batch.status == "validating":
            self._validate(record)
        elif record.batch.status == "in_progress" and self._state.now() < record.expires_at:
            if (reason := self._steps.run(record, run, self._create_pool)) is not None:
                self._back_off(batch_id, reason)
                return
        elif record.batch.status == "in_progress":
            self._steps.expire(record)
        else:
            self._steps.finish(record, run)
        self._trouble.pop(batch_id, None)

    def _validate(self, record: BatchRecord) -> None:
        try:
            self._steps.validate(record)
        except BatchgenError:
            raise
        # A fault of ours that an input brings about would come again for ever: after some times the batch fails.
        except Exception as error:
            if self._trouble.get(record.id, _Trouble()).num_failures + 1 < MAX_FAULTS:
                raise
            self._say(f"{record.id}: given up: {name_fault(error)}")
            self._steps.give_up(record)

    def _back_off(self, batch_id: str, reason: str) -> None:
        trouble = self._trouble.setdefault(batch_id, _Trouble())
        wait_s = min(MAX_BACKOFF_S, 2.0**trouble.num_failures)
        trouble.num_failures = min(trouble.num_failures + 1, MAX_DOUBLINGS)
        trouble.not_before = time.monotonic() + wait_s
        if not self._is_stopping.is_set():
            self._say(f"{batch_id}: stopped, and goes on in {wait_s:g} s: {reason}")
