"""Creating and cancelling a batch: what is checked at once, before anything is queued. Blocking."""

import json

from batchgen.serve import records
from batchgen.serve.dataset import is_allowed, is_dataset
from batchgen.serve.endpoint import Endpoint, Tenant
from batchgen.serve.errors import ApiError, bad_request, not_found, too_many
from batchgen.serve.ids import is_file_id, make_batch_id
from batchgen.serve.once import choose_batch_id, find_batch_id
from batchgen.serve.records import BatchRecord
from batchgen.serve.wire import CHAT, COMPLETIONS, Batch, CreateBatch, parse_window

QUEUE_RETRY_S = 30


def create_batch(
    endpoint: Endpoint, tenant: Tenant, asked: CreateBatch, *, key: str | None, is_repeat: bool
) -> BatchRecord:
    """The batch, new or, where the create was sent before, as it stands now. Raises ApiError."""
    state = endpoint.state
    body = json.dumps(asked.model_dump(mode="json"), sort_keys=True)
    try:
        check_asked(endpoint, tenant, asked)
    except ApiError:  # since the first create, which made it, the input file may have gone
        made = find_batch_id(state, tenant.name, body, key=key) if is_repeat or key is not None else None
        if made is None or (standing := state.read_batch(tenant.name, made)) is None:
            raise
        return standing
    new_id = make_batch_id(state.now())
    batch_id = choose_batch_id(state, tenant.name, body, new_id, key=key, is_repeat=is_repeat)
    if batch_id != new_id and (standing := state.read_batch(tenant.name, batch_id)) is not None:
        return standing
    check_queue(endpoint, tenant)
    record = make_record(endpoint, tenant, asked, batch_id)
    if not state.create_batch(record):
        record = state.read_batch(tenant.name, batch_id) or record
    endpoint.wake()
    return record


def check_asked(endpoint: Endpoint, tenant: Tenant, asked: CreateBatch) -> None:
    if asked.endpoint not in (CHAT, COMPLETIONS):
        told = f"endpoint must be {CHAT} or {COMPLETIONS}"
        raise bad_request(told, "endpoint", "invalid_value")
    window_s, most_s = parse_window(asked.completion_window), endpoint.spec.limits.max_window_s
    if window_s > most_s:
        raise bad_request(f"completion_window may be {int(most_s)}s at most", "completion_window", "invalid_value")
    if is_dataset(asked.input_file_id):
        check_dataset(endpoint, tenant, asked)
        return
    if asked.model is not None:
        raise bad_request(
            "model goes with a Parquet dataset; each line of a file names its own", "model", "invalid_value"
        )
    file = endpoint.state.read_file(tenant.name, asked.input_file_id) if is_file_id(asked.input_file_id) else None
    if file is None:
        raise not_found("File object", asked.input_file_id, "input_file_id")
    if file.purpose != "batch":
        raise bad_request("the input file's purpose must be batch", "input_file_id", "invalid_purpose")


def check_dataset(endpoint: Endpoint, tenant: Tenant, asked: CreateBatch) -> None:
    if not is_allowed(asked.input_file_id, tenant.spec.inputs):
        raise not_found("dataset that you may read", asked.input_file_id, "input_file_id")
    if asked.model is None and len(endpoint.spec.models) > 1:
        raise bad_request("model is required with a Parquet dataset", "model", "missing_required_parameter")
    if asked.model is not None and asked.model not in endpoint.spec.models:
        raise not_found("model", asked.model, "model")


def check_queue(endpoint: Endpoint, tenant: Tenant) -> None:
    most = endpoint.spec.limits.max_open_batches
    if len(endpoint.state.list_open(tenant.name)) >= most:
        told = f"{most} batches have not ended yet, which is all that may wait; try again later."
        raise too_many(told, QUEUE_RETRY_S, "queue_full")


def make_record(endpoint: Endpoint, tenant: Tenant, asked: CreateBatch, batch_id: str) -> BatchRecord:
    created_at = int(endpoint.state.now())
    kept = asked.output_expires_after
    is_own = not is_dataset(asked.input_file_id)
    model = None if is_own else asked.model or next(iter(endpoint.spec.models))
    batch = Batch(
        id=batch_id,
        endpoint=asked.endpoint,
        model=model,
        input_file_id=asked.input_file_id,
        completion_window=asked.completion_window,
        status="validating",
        created_at=created_at,
        expires_at=created_at + parse_window(asked.completion_window),
        metadata=asked.metadata,
    )
    expires_s = int(endpoint.spec.limits.file_expires_s) if kept is None else kept.seconds
    return BatchRecord(batch=batch, tenant=tenant.name, model=model, output_expires_s=expires_s)


def cancel_batch(endpoint: Endpoint, tenant: Tenant, record: BatchRecord) -> BatchRecord:
    """The batch as it stands then. Raises ApiError (409) where it is too late; asking twice is fine."""
    now = endpoint.state.now()
    known, is_changed = endpoint.state.change_batch(tenant.name, record.id, lambda each: records.cancel(each, now))
    if not is_changed and known.batch.status not in ("cancelling", "cancelled"):
        status = known.batch.status
        told = f"The batch is {status}: only one that is validating or in progress can be cancelled."
        raise ApiError(409, told, code="batch_not_cancellable")
    if not is_changed and known.is_over:
        raise ApiError(409, "The batch is cancelled already.", code="batch_not_cancellable")
    endpoint.wake()
    return known
