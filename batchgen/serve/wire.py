"""What goes over the wire, in OpenAI's words: files, batches, their lists, and the bodies of requests about them. Pure.

Objects are what the `openai` package reads; fields that are not known yet are null. A body's unknown fields are refused
by name, because a field that is silently dropped is a promise broken.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
Purpose = Literal["batch", "batch_output", "user_data"]
UploadPurpose = Literal["batch", "user_data"]
BatchEndpoint = Literal["/v1/chat/completions", "/v1/completions"]
TERMINAL: frozenset[BatchStatus] = frozenset({"failed", "completed", "expired", "cancelled"})
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Wire(BaseModel):
    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)


class FileObject(Wire):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: Purpose
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None


class FileDeleted(Wire):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileList(Wire):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Upload(Wire):
    """A file that comes in several requests; `file` is there once it is completed."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None = None


class UploadPart(Wire):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


class BatchError(Wire):
    """`line` counts from 1 in the input file; null where no line is at fault."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(Wire):
    object: Literal["list"] = "list"
    data: list[BatchError] = []


class RequestCounts(Wire):
    total: int = 0
    completed: int = 0
    failed: int = 0


class InputDetails(Wire):
    cached_tokens: int | None = 0


class OutputDetails(Wire):
    reasoning_tokens: int | None = 0


class BatchUsage(Wire):
    """Of the finished rows. `reasoning_tokens` is null where rows reasoned: nobody counts those apart."""

    input_tokens: int = 0
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int = 0
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int = 0


class Batch(Wire):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = None
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    usage: BatchUsage | None = None
    metadata: dict[str, str] | None = None


class BatchList(Wire):
    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Body(BaseModel):
    """What a client sends."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class ExpiresAfter(Body):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


class CreateUpload(Body):
    """`bytes`: of the whole file, which its parts must add up to."""

    bytes: int = Field(ge=1)
    filename: str = Field(min_length=1, max_length=1024)
    mime_type: str = Field(max_length=255)
    purpose: UploadPurpose
    expires_after: ExpiresAfter | None = None


class CompleteUpload(Body):
    """`part_ids`: in the order of the file. `md5`: of the whole, 32 hexadecimal digits."""

    part_ids: Annotated[list[str], Field(min_length=1, max_length=10_000)]
    md5: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{32}$")


MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class CreateBatch(Body):
    """`completion_window`: OpenAI knows 24h only; here a number of s, m, h or d. `input_file_id`: a file's id, or the
    URL of a Parquet dataset below a prefix that the tenant may read."""

    input_file_id: str = Field(min_length=1, max_length=2048)
    endpoint: str = Field(min_length=1, max_length=64)
    completion_window: str = Field(pattern=r"^[1-9][0-9]{0,5}[smhd]$")
    metadata: dict[MetadataKey, MetadataValue] | None = Field(default=None, max_length=16)
    output_expires_after: ExpiresAfter | None = None
    model: str | None = Field(default=None, max_length=200, description="For a Parquet dataset: which model answers.")


class Model(Wire):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "batchgen"


class ModelList(Wire):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(Wire):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Wire):
    error: ErrorDetail


Json = dict[str, Any]


def parse_window(text: str) -> int:
    """Seconds of a completion window that matched its pattern."""
    return int(text[:-1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[text[-1]]
