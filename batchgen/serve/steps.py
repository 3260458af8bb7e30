"""The steps of a batch's life, each from one state to the next. Blocking; each may be repeated after a crash."""

from collections.abc import Callable
from functools import cached_property

from batchgen.engines import create_tokenizer
from batchgen.errors import Damaged, InputChanged, LeaseHeld, Refusal, StorageError
from batchgen.serve import records
from batchgen.serve.abilities import find_abilities
from batchgen.serve.batch_run import BatchRun, find_job_spec, has_begun, is_cancelled_elsewhere, make_job_spec
from batchgen.serve.batch_spec import make_served_spec
from batchgen.serve.body_sampling import Abilities
from batchgen.serve.claims import Claims
from batchgen.serve.convert import convert
from batchgen.serve.dataset import check_links, find_dataset, is_dataset, write_dataset_results
from batchgen.serve.door import CreateBulkPool
from batchgen.serve.ids import read_made_at
from batchgen.serve.parts import read_content
from batchgen.serve.records import BatchRecord
from batchgen.serve.results import Results, write_results
from batchgen.serve.spec import EndpointSpec, TenantSpec
from batchgen.serve.state import State
from batchgen.serve.wire import BatchError, BatchUsage, RequestCounts
from batchgen.storage import list_inputs

# A sign without a batch for so long is of a create that never came to its record.
FORGET_S = 3600.0


def is_passing(error: Refusal) -> bool:
    """Is it no fault of the job: another run is on its folder, or the store was away before the run began?"""
    cause = error.__cause__
    return isinstance(error, LeaseHeld) or (
        isinstance(cause, StorageError) and not isinstance(cause, Damaged | InputChanged)
    )


class Steps:
    """See the module."""

    def __init__(self, spec: EndpointSpec, state: State, say: Callable[[str], None]) -> None:
        self._spec, self._state, self._say = spec, state, say

    @cached_property
    def abilities(self) -> dict[str, Abilities]:
        """Of each model, found when the first batch is validated: tokenizers load for seconds."""
        most = self._spec.limits.max_choices
        return {
            name: find_abilities(served, create_tokenizer(make_served_spec(served)), most)
            for name, served in self._spec.models.items()
        }

    def validate(self, record: BatchRecord) -> None:
        """validating -> in_progress or failed."""
        if is_dataset(record.batch.input_file_id):
            self._validate_dataset(record)
            return
        file = self._state.read_file(record.tenant, record.batch.input_file_id)
        if file is None:
            told = "The input file was deleted, or has expired, before the batch began."
            self._fail(record, [BatchError(code="file_not_found", message=told, param="input_file_id")])
            return
        made = convert(self._state, record, read_content(self._state, file), self.abilities, self._spec.limits)
        if (job_input := made.input) is None:
            self._fail(record, made.errors)
            return
        self._change(
            record, lambda known: records.begin(known, job_input, made.model, made.num_requests, self._state.now())
        )

    def _validate_dataset(self, record: BatchRecord) -> None:
        tenant = self._spec.tenants.get(record.tenant, TenantSpec())
        try:
            job_input = find_dataset(record, tenant.inputs)
        except Refusal as error:
            told = BatchError(code="invalid_dataset", message=str(error), param="input_file_id")
            self._fail(record, [told])
            return
        model, num_rows = record.model or "", job_input.num_rows
        self._change(record, lambda known: records.begin(known, job_input, model, num_rows, self._state.now()))

    def run(self, record: BatchRecord, run: BatchRun, create_pool: CreateBulkPool) -> str | None:
        """in_progress -> finalizing, on its way to failed where the job can't go on; or why to try again later."""
        make_job_spec(self._spec, self._state, record)  # a model that is gone may come back: no reason to fail
        try:
            self._check_links(record)
            report = run.run(self._spec, create_pool)
        except Refusal as error:
            if is_passing(error):
                raise
            self._say(f"{record.id}: refused: {error}")
            message = "The batch can't be run as it is." if record.input and record.input.is_own else str(error)
            told = [BatchError(code="job_refused", message=message)]
            end = records.refuse if has_begun(self._state, record) else records.fail
            self._change(record, lambda known: end(known, told, self._state.now()))
            return None
        if report["state"] == "finished":
            self._change(record, lambda known: records.finalize(known, self._state.now()))
            return None
        if is_cancelled_elsewhere(self._state, record, report):
            self._change(record, lambda known: records.cancel(known, self._state.now()))
            return None
        is_ours = self._state.now() >= record.expires_at or self._is_cancelled(record)
        return None if is_ours else str(report["message"])

    def _check_links(self, record: BatchRecord) -> None:
        """At every run: a link may have been turned since the dataset was looked at, and a rule changed."""
        if record.input is not None and not record.input.is_own:
            tenant = self._spec.tenants.get(record.tenant, TenantSpec())
            check_links(list_inputs(record.input.url), tenant.inputs)

    def _is_cancelled(self, record: BatchRecord) -> bool:
        known = self._state.read_batch(record.tenant, record.id)
        return known is None or known.batch.status != "in_progress"

    def expire(self, record: BatchRecord) -> None:
        """in_progress -> finalizing, on its way to expired."""
        self._change(record, lambda known: records.expire(known, self._state.now()))

    def finish(self, record: BatchRecord, run: BatchRun) -> None:
        """finalizing or cancelling -> its end, with the results of all that was finished."""
        if record.input is None:
            self._end(record, Results(RequestCounts(), BatchUsage(), None, None))
            return
        if record.end != "completed":
            self._close(record, run)
        if record.input.is_own:
            tokenizer = create_tokenizer(find_job_spec(self._spec, self._state, record))
            made = write_results(self._state, record, None if tokenizer is None else tokenizer.decode)
        else:
            made = write_dataset_results(self._state, record)
        self._end(record, made)

    def _close(self, record: BatchRecord, run: BatchRun) -> None:
        try:
            run.close(self._spec)
        except Refusal as error:
            if is_passing(error):
                raise
            # What the rows were read from is gone or another, say: what was committed is kept, and the rest is failed.
            self._say(f"{record.id}: its rows can't be closed: {error}")

    def _end(self, record: BatchRecord, made: Results) -> None:
        fields = (made.counts, made.usage, made.output_file_id, made.error_file_id)
        self._change(record, lambda known: records.finish(known, *fields, self._state.now()))

    def forget(self, tenant: str, batch_id: str, record: BatchRecord | None, claims: Claims) -> None:
        """The batch is over, or never came to be."""
        if record is not None or self._is_abandoned(tenant, batch_id):
            self._state.close_batch(tenant, batch_id)
            claims.forget(batch_id)

    def _is_abandoned(self, tenant: str, batch_id: str) -> bool:
        """Looks at the sign for old ids only: it is asked every second."""
        oldest = self._state.now() - FORGET_S
        made_at = read_made_at(batch_id)
        return made_at < oldest and (self._state.read_opened_at(tenant, batch_id) or made_at) < oldest

    def give_up(self, record: BatchRecord) -> None:
        """validating -> failed, for no fault that the file can be blamed for."""
        told = "The file could not be checked: a fault of the endpoint's own, which its log names."
        self._fail(record, [BatchError(code="internal_error", message=told)])

    def _fail(self, record: BatchRecord, errors: list[BatchError]) -> None:
        self._change(record, lambda known: records.fail(known, errors, self._state.now()))

    def _change(self, record: BatchRecord, change: Callable[[BatchRecord], BatchRecord | None]) -> None:
        """What another has changed meanwhile (a cancel) stands, and is looked at in the next step."""
        self._state.change_batch(record.tenant, record.id, change)
