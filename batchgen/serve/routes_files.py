"""`/v1/files`: upload, list, retrieve, content, delete."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import islice
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse
from starlette.responses import Response

from batchgen.serve.dataset import iter_dataset_lines
from batchgen.serve.endpoint import Endpoint
from batchgen.serve.errors import ApiError, bad_request, not_found, too_many
from batchgen.serve.ids import is_file_id
from batchgen.serve.paging import list_after
from batchgen.serve.parts import read_content
from batchgen.serve.ranges import Unsatisfiable, parse_range
from batchgen.serve.records import FileRecord
from batchgen.serve.upload import PURPOSES, receive_file
from batchgen.serve.wire import FileDeleted, FileList, FileObject

MAX_PAGE = 10_000
UPLOAD_RETRY_S = 5
FORM: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": [*PURPOSES]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
    "additionalProperties": False,
}
UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}}
BYTES = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


class UploadPlaces:
    """So many bodies come at a time: Serve's proxy queues without a bound what comes faster than it is stored."""

    def __init__(self, num_places: int) -> None:
        self._num_places, self._free = num_places, asyncio.Semaphore(num_places)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Raises ApiError (429)."""
        if self._free.locked():
            told = f"{self._num_places} files are being uploaded; try again soon."
            raise too_many(told, UPLOAD_RETRY_S, "too_many_uploads")
        async with self._free:
            yield


def create_files_router(endpoint: Endpoint, places: UploadPlaces) -> APIRouter:
    router, state = APIRouter(prefix="/v1/files", tags=["files"]), endpoint.state

    def find(request: Request, file_id: str) -> FileRecord:
        record = state.read_file(request.state.tenant.name, file_id) if is_file_id(file_id) else None
        if record is None:
            raise not_found("File object", file_id, "file_id")
        return record

    @router.post("", openapi_extra=UPLOAD)
    async def upload(request: Request) -> FileObject:
        """Stream a file into the store."""
        kind, limits = request.headers.get("content-type", ""), endpoint.spec.limits
        async with places.one():
            record = await receive_file(state, request.state.tenant.name, kind, request.stream(), limits)
        return record.to_wire()

    @router.get("")
    def list_files(
        request: Request,
        after: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
        order: Literal["asc", "desc"] = "desc",
        purpose: Annotated[str | None, Query(max_length=64)] = None,
    ) -> FileList:
        if after is not None and not is_file_id(after):
            raise bad_request("after must be a file's id", "after", "invalid_value")
        tenant = request.state.tenant.name
        ids = list_after(state.list_file_ids(tenant), after, order)
        found = (record for record in read_files(endpoint, tenant, ids) if purpose in (None, record.purpose))
        page = list(islice(found, limit + 1))
        data = [record.to_wire() for record in page[:limit]]
        ends = (data[0].id, data[-1].id) if data else (None, None)
        return FileList(data=data, first_id=ends[0], last_id=ends[1], has_more=len(page) > limit)

    @router.get("/{file_id}")
    def retrieve(request: Request, file_id: str) -> FileObject:
        return find(request, file_id).to_wire()

    @router.delete("/{file_id}")
    def delete(request: Request, file_id: str) -> FileDeleted:
        """A batch that has begun has what it needs of it."""
        record = find(request, file_id)
        state.delete_file(record)
        return FileDeleted(id=record.id)

    @router.get("/{file_id}/content", response_class=Response, responses={200: BYTES, 206: BYTES})
    def content(
        request: Request, file_id: str, range_: Annotated[str | None, Header(alias="Range", max_length=128)] = None
    ) -> Response:
        return make_content(endpoint, find(request, file_id), range_)

    return router


def read_files(endpoint: Endpoint, tenant: str, ids: list[str]) -> Iterator[FileRecord]:
    """Some at a time: a page is mostly shorter than all there is."""
    for first in range(0, len(ids), 100):
        yield from endpoint.state.read_files(tenant, ids[first : first + 100])


def make_content(endpoint: Endpoint, record: FileRecord, range_: str | None) -> Response:
    """The bytes, or one range of them, a part at a time."""
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(record.filename)}"}
    kind = "application/octet-stream"
    if record.dataset_of is not None:
        return StreamingResponse(iter_dataset_lines(endpoint.spec, endpoint.state, record), 200, headers, kind)
    try:
        part = parse_range(range_, record.num_bytes)
    except Unsatisfiable:
        raise ApiError(416, f"The file has {record.num_bytes} bytes.", param="Range", code="invalid_range") from None
    start, end = part or (0, record.num_bytes)
    headers |= {"accept-ranges": "bytes", "content-length": str(end - start)}
    if part is not None:
        headers["content-range"] = f"bytes {start}-{end - 1}/{record.num_bytes}"
    body = read_content(endpoint.state, record, start, end)
    return StreamingResponse(body, 200 if part is None else 206, headers, kind)
