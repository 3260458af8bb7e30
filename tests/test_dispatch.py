"""The driver's loop by itself: what it does where nothing happens."""

from pathlib import Path

import pytest
from makers import make_job_spec, make_shard, make_worker_info

from batchgen.build import build_id
from batchgen.driver.dispatch import Dispatcher
from batchgen.errors import RunStopped
from batchgen.journal import JournalIndex
from batchgen.queue.events import Heartbeat, PoolEvent, WorkerStarted
from batchgen.queue.inquiry import Inquiry
from batchgen.queue.orders import Order
from batchgen.queue.staffing import MAX_IDLE_S
from batchgen.queue.trial_queue import TrialQueue
from batchgen.queue.work_queue import QueuedShard
from batchgen.records import Lease
from batchgen.storage import Storage


class StillPool:
    """A WorkerPool of workers that come up and say that they live. Each poll takes its time, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.assigned: list[Lease] = []
        self._new: list[str] = []
        self._up: list[str] = []

    def start_worker(self, worker_id: str) -> None:
        self._new.append(worker_id)

    def assign(self, lease: Lease) -> None:
        self.assigned.append(lease)

    def tell(self, worker_id: str, order: Order) -> None: ...

    def kill(self, worker_id: str) -> None: ...

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        self.now += timeout_s
        started = [WorkerStarted(make_worker_info(worker_id, build=build_id())) for worker_id in self._new]
        self._up, self._new = self._up + self._new, []
        return [*started, *(Heartbeat(worker_id, 0, 0, 0.0, ()) for worker_id in self._up)]

    def drain(self, timeout_s: float) -> list[PoolEvent]:
        del timeout_s
        return []

    def close(self) -> None: ...


def test_a_run_that_lends_nothing_any_more_stops_and_says_so(tmp_path: Path) -> None:
    """Whatever the reason: here a shard waits apart for a trial that nobody asks for. Workers would be kept up for ever."""
    spec = make_job_spec(output={"path": str(tmp_path)}, cluster={"workers": {"min": 2, "max": 2}})
    queue = TrialQueue([QueuedShard(make_shard(0))], epoch=1, retry=spec.retry, cluster=spec.cluster)
    queue.hold({0})
    pool, storage, index = StillPool(), Storage(spec.output.path), JournalIndex()
    dispatcher = Dispatcher(
        spec=spec,
        storage=storage,
        queue=queue,
        pool=pool,
        epoch=1,
        index=index,
        inquiry=Inquiry(storage, spec, queue, index, print),
        num_rows=10,
        num_rows_done_before=0,
        check=lambda: None,
        on_progress=lambda _: None,
        on_warning=print,
        clock=lambda: pool.now,
    )
    with pytest.raises(RunStopped, match=r"anything to do for 120 s though 1 shards are left; start it again"):
        dispatcher.run()
    assert pool.assigned == []
    assert MAX_IDLE_S <= pool.now < MAX_IDLE_S + 5
