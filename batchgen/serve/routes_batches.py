"""`/v1/batches`: create, list, retrieve, cancel; a tenant's own jobs are among them."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request

from batchgen.serve.create import cancel_batch, create_batch
from batchgen.serve.endpoint import Endpoint
from batchgen.serve.errors import bad_request, not_found
from batchgen.serve.ids import is_batch_id
from batchgen.serve.jobs import Jobs
from batchgen.serve.paging import list_after
from batchgen.serve.wire import Batch, BatchList, CreateBatch


def create_batches_router(endpoint: Endpoint) -> APIRouter:
    router, state = APIRouter(prefix="/v1/batches", tags=["batches"]), endpoint.state
    jobs = Jobs(endpoint.spec.jobs)

    @router.post("")
    def create(
        request: Request,
        asked: CreateBatch,
        key: Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)] = None,
        retries: Annotated[str | None, Header(alias="x-stainless-retry-count", max_length=8)] = None,
    ) -> Batch:
        """Create a batch. One that is sent again (by the SDK, or with the same key) makes no second one."""
        is_repeat = retries is not None and retries.isdecimal() and int(retries) > 0
        return create_batch(endpoint, request.state.tenant, asked, key=key, is_repeat=is_repeat).batch

    @router.get("")
    def list_batches(
        request: Request,
        after: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> BatchList:
        """Newest first."""
        if after is not None and not is_batch_id(after):
            raise bad_request("after must be a batch's id", "after", "invalid_value")
        tenant = request.state.tenant.name
        own_jobs = {job.id: job for job in jobs.list(tenant)}
        ids = list_after(sorted([*state.list_batch_ids(tenant), *own_jobs]), after, "desc")
        page = ids[: limit + 1]
        known = {record.id: record.batch for record in state.read_batches(tenant, page[:limit])}
        known |= {id_: own_jobs[id_].read() for id_ in page[:limit] if id_ in own_jobs}
        data = [known[id_] for id_ in page[:limit] if id_ in known]
        ends = (data[0].id, data[-1].id) if data else (None, None)
        return BatchList(data=data, first_id=ends[0], last_id=ends[1], has_more=len(page) > limit)

    @router.get("/{batch_id}")
    def retrieve(request: Request, batch_id: str) -> Batch:
        tenant = request.state.tenant.name
        if is_batch_id(batch_id):
            if (record := state.read_batch(tenant, batch_id)) is not None:
                return record.batch
            if (job := jobs.find(tenant, batch_id)) is not None:
                return job.read()
        raise not_found("batch", batch_id, "batch_id")

    @router.post("/{batch_id}/cancel")
    def cancel(request: Request, batch_id: str) -> Batch:
        """Finished rows are kept."""
        tenant = request.state.tenant
        if is_batch_id(batch_id):
            if (record := state.read_batch(tenant.name, batch_id)) is not None:
                return cancel_batch(endpoint, tenant, record).batch
            if (job := jobs.find(tenant.name, batch_id)) is not None:
                return job.cancel()
        raise not_found("batch", batch_id, "batch_id")

    return router
