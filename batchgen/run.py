"""One run of a job, put together: open it, hold its folder, dispatch what is left, finish. No branch on a vendor here.

A run refuses before any worker starts (`Refusal`), or ends with a report: finished, or stopped and resumable. Running
it again goes on where it stopped; when nothing is left it says so without starting anything.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from batchgen import journal, manifest
from batchgen.control import StatusWriter, is_cancel_requested
from batchgen.dispatch import Dispatcher, Progress, WorkerPool
from batchgen.errors import LeaseLost, RunStopped
from batchgen.finish import finish
from batchgen.hold import hold_folder
from batchgen.job import Job, freeze, limit_rows, open_job, reopen
from batchgen.spec import JobSpec
from batchgen.storage import Storage
from batchgen.work_queue import WorkQueue
from batchgen.worker import WorkerSetup


class View(Protocol):
    """Whoever watches a run."""

    def say(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...

    def show(self, progress: Progress) -> None: ...


def run_job(spec: JobSpec, view: View, *, limit: int | None = None) -> dict[str, Any]:
    """Run the job until it is done or stopped; the report. `limit`: only the first rows, as a trial that the full run
    keeps. Raises Refusal before anything was started, LeaseLost when another driver took the folder over."""
    job = open_job(limit_rows(spec, limit), Storage(spec.output.path))
    with hold_folder(job, view.say, view.warn) as (lease, storage):
        job = reopen(job, storage)
        for warning in job.warnings:
            view.warn(warning)
        freeze(job)
        if not job.todo:
            view.say("nothing left to do: every planned row is committed")
            return finish(job, None, lease.epoch, is_trial=limit is not None)
        storage.delete(manifest.SUCCESS)
        dispatcher = make_dispatcher(job, lease, view)
        try:
            message = _dispatch(dispatcher, view)
        finally:
            dispatcher.pool.close()
        return finish(job, dispatcher, lease.epoch, message=message, is_trial=limit is not None)


def make_dispatcher(job: Job, lease: Any, view: View) -> Dispatcher:
    """The loop and everything it works with."""
    spec, storage, todo = job.spec, job.storage, job.todo
    status = StatusWriter(storage, lease.epoch, spec.cluster.log_interval_s)

    def on_progress(progress: Progress) -> None:
        view.show(progress)
        status.update(dispatcher)

    dispatcher = Dispatcher(
        spec=spec,
        storage=storage,
        queue=WorkQueue(todo, epoch=lease.epoch, retry=spec.retry, cluster=spec.cluster),
        pool=create_pool(WorkerSetup("", spec, lease.epoch, storage, job.passthrough)),
        lease=lease,
        index=load_journal(job),
        num_rows=job.num_wanted_rows,
        num_rows_done_before=job.num_wanted_rows - sum(queued.shard.num_rows for queued in todo),
        is_cancelled=lambda: is_cancel_requested(storage, lease.epoch),
        should_stop=lambda: False,
        on_progress=on_progress,
        on_warning=view.warn,
    )
    return dispatcher


def create_pool(setup: WorkerSetup) -> WorkerPool:
    """Workers where the spec wants them. Ray is imported only when it is used."""
    if setup.spec.cluster.pool == "inline":
        from batchgen.inline_pool import InlinePool

        return InlinePool(setup)
    from batchgen.ray_pool import RayPool

    return RayPool(setup)


def load_journal(job: Job) -> journal.JournalIndex:
    """What earlier runs journaled; segments whose shards are all committed are deleted here."""
    index = journal.JournalIndex()
    for number in job.committed.keys() - {queued.shard.number for queued in job.todo}:
        index.complete(number)
    paths = journal.list_segments(job.storage)
    for refs in journal.read_indexes(job.storage, paths, job.spec.fingerprint()):
        job.storage.delete_many(index.add(refs))
    return index


def _dispatch(dispatcher: Dispatcher, view: View) -> str | None:
    """None when all is done, else why it stopped."""
    with stop_on_signal() as should_stop:
        dispatcher.should_stop = should_stop
        try:
            dispatcher.run()
        except LeaseLost:
            raise
        except RunStopped as stop:
            view.warn(f"stopping: {stop}")
            dispatcher.drain(dispatcher.spec.cluster.drain_s)
            return str(stop)
    return None


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM ask for a drain; a second SIGINT is an ordinary KeyboardInterrupt."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, _: object) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
