"""One run of one batch's job, as `batchgen run` does it, under the eyes of the batch's record.

The run stops when the batch is cancelled, when its window is over, when the claim on it is lost, or when the conductor
stops; what was finished is in the journal then. Knows nothing of which pool the rows go to.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from batchgen.driver.hold import Hold
from batchgen.driver.lease import make_cancel_path
from batchgen.driver.run import run_job
from batchgen.errors import Cancelled, OutputError, RunStopped, StorageError
from batchgen.manifest import SPEC
from batchgen.queue.progress import Progress
from batchgen.replay import read_spec
from batchgen.serve.batch_spec import make_batch_spec
from batchgen.serve.closing import ClosingPool, make_closing_spec
from batchgen.serve.door import BulkJob, CreateBulkPool
from batchgen.serve.records import BatchRecord, count
from batchgen.serve.spec import EndpointSpec, ServedModel
from batchgen.serve.state import State
from batchgen.spec import JobSpec
from batchgen.specs.engine import SimulatedEngineSpec
from batchgen.storage import Storage

LOOK_S = 1.0
COUNT_S = 2.0


class BatchRun:
    """`is_stopping`: the conductor wants to end. Both `View` and stop check of `run_job`."""

    def __init__(
        self,
        state: State,
        record: BatchRecord,
        hold: Hold,
        is_stopping: Callable[[], bool],
        warn: Callable[[str], None],
    ) -> None:
        self._state, self._record, self._hold = state, record, hold
        self._is_stopping, self._warn = is_stopping, warn
        self._next_look = self._next_count = 0.0

    def run(self, spec: EndpointSpec, create_pool: CreateBulkPool) -> dict[str, Any]:
        """The report: finished, or stopped and resumable."""
        record = self._record
        bulk = BulkJob(record.id, record.tenant, record.model or "", float(record.expires_at))
        job = make_job_spec(spec, self._state, record)
        return run_job(job, self, create_pool=lambda setup: create_pool(setup, bulk), check=self.check)

    def close(self, spec: EndpointSpec) -> None:
        """Every row that is missing becomes an error. Raises RunStopped where that was cut short."""
        job = make_closing_spec(find_job_spec(spec, self._state, self._record))
        report = run_job(job, self, create_pool=ClosingPool, check=self._hold.check_lease)
        if report["state"] != "finished":
            raise RunStopped(str(report["message"]))

    def check(self) -> None:
        """Raises RunStopped."""
        self._hold.check_lease()
        if self._is_stopping():
            raise Cancelled("the conductor stops")
        if self._state.now() >= self._record.expires_at:
            raise Cancelled("the batch's window is over")
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_S
            with suppress(StorageError):  # looked at again in a second; a store that stays away loses the lease
                record = self._state.read_batch(self._record.tenant, self._record.id)
                if record is None or record.batch.status != "in_progress":
                    raise Cancelled("the batch was cancelled")
                self._record = record

    # ---- what the run says

    def say(self, message: str) -> None:
        del message

    def warn(self, message: str) -> None:
        self._warn(f"{self._record.id}: {message}")

    def show(self, progress: Progress) -> None:
        """Counts of requests, of rows where a request is several: that is known at the end only."""
        if time.monotonic() < self._next_count or self._record.input is None:
            return
        self._next_count = time.monotonic() + COUNT_S
        share = self._record.batch.request_counts.total / max(1, self._record.input.num_rows)
        failed = int(progress.num_rows_error * share)
        completed = int((progress.num_rows_done - progress.num_rows_error) * share)
        with suppress(StorageError):  # the next count says it
            self._state.change_batch(
                self._record.tenant, self._record.id, lambda record: count(record, completed, failed)
            )


def make_job_spec(spec: EndpointSpec, state: State, record: BatchRecord) -> JobSpec:
    """The batch's job. Raises OutputError for a model that is no longer served."""
    if record.model not in spec.models:
        raise OutputError(
            f"the model {record.model} is not served any more; serve it again, so that its batches can go on"
        )
    return _make_spec(spec.models[record.model], state, record)


def has_begun(state: State, record: BatchRecord) -> bool:
    """Was a run of its job ever started?"""
    return Storage(state.job_url(record.tenant, record.id)).info(SPEC) is not None


def find_job_spec(spec: EndpointSpec, state: State, record: BatchRecord) -> JobSpec:
    """Of the job as it was begun, whatever is served by now: for what needs no engine any more. One that was never begun
    of a model that is gone is closed in the name of an engine that is nobody's."""
    if has_begun(state, record):
        return read_spec(Storage(state.job_url(record.tenant, record.id)), ())
    nobody = ServedModel(engine=SimulatedEngineSpec(kind="simulated"))
    return _make_spec(spec.models.get(record.model or "", nobody), state, record)


def _make_spec(served: ServedModel, state: State, record: BatchRecord) -> JobSpec:
    assert record.input is not None
    rows = record.input
    own = {} if rows.is_own else {"custom_id": "custom_id" if rows.has_keys else None, "passthrough": ()}
    return make_batch_spec(
        served,
        rows.form,
        input_url=rows.url,
        out_url=state.job_url(record.tenant, record.id),
        has_tools=rows.has_tools,
        has_sampling=rows.has_sampling,
        **own,  # type: ignore[arg-type]
    )


def is_cancelled_elsewhere(state: State, record: BatchRecord, report: dict[str, Any]) -> bool:
    """Did somebody say `batchgen cancel` to the job itself?"""
    storage = Storage(state.job_url(record.tenant, record.id))
    return storage.info(make_cancel_path(int(report["epoch"]))) is not None
