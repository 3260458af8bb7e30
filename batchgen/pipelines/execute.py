"""One attempt at one partition of a run, from its order to its outcome: the jobs of its stages, one after the other.

At most one process works on a partition: it holds its lease, and another one waits for it and then finds the outcome. Jobs
resume, so an attempt goes on where the last one stopped; a job that is done says so at once. Failures that batchgen raises
on purpose become the attempt's outcome; anything else ends the process without a word, and the scheduler says so.
"""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from batchgen.driver.hold import Hold
from batchgen.driver.lease import DriverLease, acquire
from batchgen.errors import BatchgenError, InputError, LeaseHeld, LeaseLost, SpecError
from batchgen.manifest import SUCCESS
from batchgen.pipelines.calendar import parse_key
from batchgen.pipelines.decide import Outcome
from batchgen.pipelines.filters import write_filtered
from batchgen.pipelines.graph import StageJob, make_jobs
from batchgen.pipelines.limits import with_limits
from batchgen.pipelines.orders import (
    Order,
    make_run_folder,
    make_started_path,
    open_folder,
    read_outcome,
    write_outcome,
)
from batchgen.pipelines.priors import with_length_prior
from batchgen.spec import JobSpec
from batchgen.specs.load import make_spec
from batchgen.storage import Storage

LEASE_TTL_S = 30.0
# The report of a job that its own final checks or its canary failed; the same command fails again.
GATE_FAILED = 4
RunJob = Callable[[JobSpec], dict[str, Any]]


class JobFailed(BatchgenError):
    """A job of the run did not end well. `can_retry`: may the same order do better?"""

    def __init__(self, message: str, can_retry: bool) -> None:
        super().__init__(message, can_retry)
        self.message, self.can_retry = message, can_retry

    def __str__(self) -> str:
        return self.message


def execute(order: Order, run_job: RunJob, say: Callable[[str], None]) -> Outcome:
    """Carry the order out, or wait for whoever does. Raises LeaseLost, StorageError: another attempt must look at it."""
    folder = open_folder(order.spec)
    lease = wait_for_lease(Storage(folder.url(make_run_folder(order.key, order.partition))), say)
    hold = Hold(lease, lambda: False)
    try:
        known = read_outcome(folder, order.key, order.partition, order.attempt)
        if known is not None:
            say(f"run {order.key} {order.partition}: attempt {order.attempt} has ended already")
            return known
        started = make_started_path(order.key, order.partition, order.attempt)
        folder.put(started, json.dumps({"at": time.time()}).encode())
        outcome = Attempt(order, run_job, hold.check_lease, say).run()
        hold.check_lease()
        write_outcome(folder, order.key, order.partition, order.attempt, outcome)
        return outcome
    finally:
        hold.release()


def wait_for_lease(storage: Storage, say: Callable[[str], None]) -> DriverLease:
    """However long another process has it: it works on the same partition, and its outcome is ours."""
    while True:
        try:
            return acquire(storage, LEASE_TTL_S, on_wait=say)
        except LeaseHeld as held:
            say(str(held))


class Attempt:
    """The jobs of one order, one after the other. `check`: raises LeaseLost when the run is not ours any more."""

    def __init__(self, order: Order, run_job: RunJob, check: Callable[[], None], say: Callable[[str], None]) -> None:
        self._order, self._run_job, self._check, self._say = order, run_job, check, say
        self._gpu_hours = 0.0

    def run(self) -> Outcome:
        order = self._order
        outputs: dict[str, Any] = {}
        try:
            for job in make_jobs(order.spec, parse_key(order.key), order.previous, only=order.partition):
                self._check()
                outputs[job.name] = self._do(job)
        except LeaseLost:
            raise
        except BatchgenError as error:
            can_retry = error.can_retry if isinstance(error, JobFailed) else not isinstance(error, SpecError)
            return Outcome(False, str(error), can_retry, self._gpu_hours)
        return Outcome(True, gpu_hours=self._gpu_hours, outputs=outputs)

    def _do(self, job: StageJob) -> dict[str, Any]:
        """What the pointer says of its output. Raises JobFailed and what a job raises."""
        read = job.stage.input
        tree = with_length_prior(job.tree, self._order.length_priors.get(job.name))
        spec = make_spec(self._limit(tree), source=f"stage {job.name}")
        if read is not None and job.filter is not None and job.source is not None and not is_done(spec):
            num_rows = self._filter(job, read.stage, job.filter, job.source, spec.output.path)
            self._say(f"{job.name}: {num_rows:,} rows of {read.stage} go on")
        self._say(f"{job.name}: {spec.output.path}")
        report = self._run_job(spec)
        self._gpu_hours += report["run"]["gpu_hours"] or 0.0
        code = report["exit_code"]
        if code != 0:
            message = report.get("message") or f"{report['rows']['error']:,} of its rows are errors, too many"
            raise JobFailed(f"{job.name}: {message}", can_retry=code != GATE_FAILED)
        if not is_done(spec):
            raise JobFailed(f"{job.name}: it ended without _SUCCESS in {spec.output.path}", can_retry=True)
        rows = report["rows"]
        found = {"path": Storage(spec.output.path).root, "rows_ok": rows["ok"], "rows_error": rows["error"]}
        return {**found, "partition": dict(job.partition)} if job.partition else found

    def _filter(self, job: StageJob, stage: str, expression: str, source: str, output: str) -> int:
        """How many rows go on. Raises JobFailed where none do, or the expression fails: the same rows fail again."""
        try:
            return write_filtered(expression, stage, source, output)
        except InputError as error:
            raise JobFailed(f"{job.name}: {error}", can_retry=False) from error

    def _limit(self, tree: dict[str, Any]) -> dict[str, Any]:
        """The job with what is left of the run's time and GPU-hours. Raises JobFailed where nothing is."""
        spec = self._order.spec
        left = None
        if self._order.max_gpu_hours is not None:
            left = self._order.max_gpu_hours - self._gpu_hours
            if left <= 0:
                raise JobFailed(f"its {self._order.max_gpu_hours:g} GPU-hours are spent", can_retry=True)
        until = None
        if spec.deadline is not None:
            until = datetime.fromtimestamp(self._order.began_at + spec.deadline, UTC).isoformat()
        return with_limits(tree, until, left)


def is_done(spec: JobSpec) -> bool:
    return Storage(spec.output.path).info(SUCCESS) is not None
