"""`/v1/uploads`: a file in parts, each a request of its own, so that no server on the way holds more than one of them."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from batchgen.serve.endpoint import Endpoint
from batchgen.serve.errors import not_found
from batchgen.serve.ids import is_upload_id, make_piece_id
from batchgen.serve.routes_files import UploadPlaces
from batchgen.serve.upload import choose_kept_s, clean_name, make_too_large, receive_piece
from batchgen.serve.upload_records import UploadRecord
from batchgen.serve.uploads import cancel_upload, check_open, complete_upload, create_upload, make_piece_folder
from batchgen.serve.wire import CompleteUpload, CreateUpload, Upload, UploadPart

FORM: dict[str, Any] = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "format": "binary", "minLength": 1}},
    "additionalProperties": False,
}
PART = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}}


def create_uploads_router(endpoint: Endpoint, places: UploadPlaces) -> APIRouter:
    router, state, limits = APIRouter(prefix="/v1/uploads", tags=["uploads"]), endpoint.state, endpoint.spec.limits

    def find(request: Request, upload_id: str) -> UploadRecord:
        tenant = request.state.tenant.name
        record = state.read_upload(tenant, upload_id) if is_upload_id(upload_id) else None
        if record is None:
            raise not_found("Upload object", upload_id, "upload_id")
        return record

    @router.post("")
    def create(request: Request, asked: CreateUpload) -> Upload:
        """Say what is to come."""
        if asked.bytes > limits.max_file_bytes:
            raise make_too_large(limits.max_file_bytes, "bytes")
        expires_s = None if asked.expires_after is None else asked.expires_after.seconds
        kept_s = choose_kept_s(expires_s, asked.purpose, limits)
        made = create_upload(state, request.state.tenant.name, asked, clean_name(asked.filename), kept_s)
        return made.to_wire(state.now())

    @router.post("/{upload_id}/parts", openapi_extra=PART)
    async def add_part(request: Request, upload_id: str) -> UploadPart:
        """Stream one part into the store."""
        async with places.one():
            record = await asyncio.to_thread(find, request, upload_id)
            check_open(state, record)
            piece_id, most = make_piece_id(state.now()), min(limits.max_part_bytes, record.num_bytes)
            folder, kind = make_piece_folder(record, piece_id), request.headers.get("content-type", "")
            piece = await receive_piece(state, record.tenant, folder, kind, request.stream(), most)
            await asyncio.to_thread(state.create_piece, record, piece_id, piece)
        return UploadPart(id=piece_id, created_at=int(state.now()), upload_id=record.id)

    @router.post("/{upload_id}/complete")
    def complete(request: Request, upload_id: str, asked: CompleteUpload) -> Upload:
        """Make the file of these parts, in this order."""
        return complete_upload(state, find(request, upload_id), asked).to_wire(state.now())

    @router.post("/{upload_id}/cancel")
    def cancel(request: Request, upload_id: str) -> Upload:
        return cancel_upload(state, find(request, upload_id)).to_wire(state.now())

    return router
