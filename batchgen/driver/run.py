"""One run of a job, put together: open it, hold its folder, dispatch what is left, finish. No branch on a vendor here.

A run refuses before any worker starts (`Refusal`), or ends with a report: finished, or stopped and resumable. Running
it again goes on where it stopped; when nothing is left it says so without starting anything.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

from batchgen.driver.control import StatusWriter
from batchgen.driver.dispatch import Dispatcher
from batchgen.driver.finish import finish, withdraw_success
from batchgen.driver.foresee import foresee
from batchgen.driver.hold import Hold, hold_folder
from batchgen.driver.job import Job, check_renders, freeze, limit_rows, load_journal, open_job, reopen
from batchgen.driver.live_page import LivePage
from batchgen.driver.pools import create_pool, create_publisher
from batchgen.driver.run_record import RunRecorder
from batchgen.driver.signals import stop_on_signal
from batchgen.driver.view import View
from batchgen.driver.watch import Watch
from batchgen.errors import LeaseLost, OutputError, RunStopped, StorageError
from batchgen.gates.watch import GateWatch
from batchgen.logs import Note, in_run, log_event
from batchgen.metrics import Point
from batchgen.names import make_run_name
from batchgen.queue.events import WorkerPool
from batchgen.queue.inquiry import Inquiry
from batchgen.queue.progress import Progress
from batchgen.queue.trial_queue import TrialQueue
from batchgen.spec import JobSpec
from batchgen.storage import Storage
from batchgen.worker.worker import WorkerSetup


def run_job(
    spec: JobSpec,
    view: View,
    *,
    limit: int | None = None,
    create_pool: Callable[[WorkerSetup], WorkerPool] = lambda setup: create_pool(setup),  # whatever it is when called
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run the job until it is done or stopped; the report. `limit`: only the first rows, as a trial that the full run
    keeps. `create_pool`: in place of the spec's own; `check` is called at every turn and may raise RunStopped. Raises
    Refusal before anything was started, LeaseLost when another driver took the folder over."""
    job = open_job(limit_rows(spec, limit), Storage(spec.output.path))
    if job.is_new:
        check_renders(job)
    with hold_folder(job, view.say, view.warn) as (hold, storage), in_run(job=spec.fingerprint()[:8], epoch=hold.epoch):
        job = reopen(job, storage)
        todo = job.todo
        log_event("run_started", output=storage.root, rows=job.num_wanted_rows, shards=len(todo))
        for warning in job.warnings:
            view.warn(warning)
        if not todo:
            view.say("nothing left to do: every planned row is committed")
            load_journal(job, view.warn)  # a driver that died behind its last commit left segments, and no run follows
            gates = GateWatch(job.spec, storage, job.wanted, view.say)
            return tell_end(finish(job, None, hold, gates, is_trial=limit is not None))
        withdraw_success(storage)
        freeze(job)
        view.say(foresee(job).describe())
        again = {queued.shard.number for queued in todo if queued.replaces is not None}
        gates = GateWatch(job.spec, storage, job.wanted, view.say, again)
        share = sum(queued.shard.num_rows for queued in todo) * spec.sampling.n // spec.cluster.workers.max
        setup = WorkerSetup("", job.spec, hold.epoch, storage, job.passthrough, job.prior, share)
        with closing(create_pool(setup)) as pool, stop_on_signal() as check_signal:

            def check_all() -> None:
                check_signal()
                check()

            recorder = RunRecorder(storage, job.spec, hold.epoch, job.prior.source if job.prior else None)
            watch = make_watch(job, hold, view, create_publisher(setup))
            with closing(LivePage(job, hold, recorder, gates)) as page:
                dispatcher = make_dispatcher(job, hold, pool, view, check_all, recorder, gates, watch, page)
                message = dispatch(dispatcher, view)
            recorder.close(dispatcher, message)
            last = watch.sum_up(dispatcher)
        report = finish(job, dispatcher, hold, gates, message=message, is_trial=limit is not None, last=last)
        watch.tell_end(report["state"])
        return tell_end(report)


def tell_end(report: dict[str, Any]) -> dict[str, Any]:
    """The log's last word, also of a run that found nothing to do; the report."""
    told = {name: report[name] for name in ("state", "exit_code", "rows", "run", "output")}
    log_event("run_ended", report["message"] or "", **told)
    return report


def make_watch(job: Job, hold: Hold, view: View, publish: Callable[[Iterable[Point]], None]) -> Watch:
    """Who is told how the run goes."""
    interval_s = job.spec.cluster.log_interval_s
    status = StatusWriter(job.storage, hold.epoch, interval_s)
    before = make_run_name(job.spec.fingerprint(), hold.epoch - 1) if hold.epoch > 1 else None
    return Watch(view, status, look_s=interval_s, publish=publish, run_before=before)


def make_dispatcher(
    job: Job,
    hold: Hold,
    pool: WorkerPool,
    view: View,
    check_signal: Callable[[], None],
    recorder: RunRecorder,
    gates: GateWatch,
    watch: Watch,
    page: LivePage,
) -> Dispatcher:
    """The loop and everything it works with."""
    spec, todo = job.spec, job.todo

    def check() -> None:
        hold.check()
        check_signal()
        gates.check(dispatcher.ledger.committed, job.committed)

    def show(progress: Progress) -> None:
        watch.show(dispatcher, progress)
        recorder.update(dispatcher, progress)
        page.update(dispatcher)

    queue = TrialQueue(
        todo,
        epoch=hold.epoch,
        retry=spec.retry,
        cluster=spec.cluster,
        n=spec.sampling.n,
        follows_hints=not job.is_in_order,
    )
    index = load_journal(job, view.warn)
    inquiry = Inquiry(job.storage, spec, queue, index, view.warn)
    inquiry.load(queued.shard.number for queued in todo)
    dispatcher = Dispatcher(
        spec=spec,
        storage=job.storage,
        queue=queue,
        pool=pool,
        epoch=hold.epoch,
        index=index,
        inquiry=inquiry,
        num_rows=job.num_wanted_rows,
        num_rows_done_before=job.num_wanted_rows - sum(queued.shard.num_rows for queued in todo),
        check=check,
        on_progress=show,
        on_warning=view.warn,
    )
    return dispatcher


def dispatch(dispatcher: Dispatcher, view: View) -> str | None:
    """Until all is done (None) or the run must stop (why). A lost lease is raised: the folder is others' to write."""
    try:
        dispatcher.run()
    except LeaseLost:
        raise
    except (RunStopped, StorageError, OutputError) as stop:  # a file of the output may be damaged while the run goes on
        view.warn(Note(f"stopping: {stop}", "run_stopping"))
        dispatcher.drain(dispatcher.spec.cluster.drain_s)
        return str(stop)
    return None
