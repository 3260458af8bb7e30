"""What the store keeps of a file and of a batch, and how a batch's state may change. Pure: time is an argument.

    validating -> in_progress -> finalizing -> completed
        |             |  `-> (window over) ----> finalizing -> expired
        |             `----> cancelling -> finalizing? no: -> cancelled
        `-> failed

`BatchRecord.end` says which end a batch is on its way to, while its status says what clients may see. Every change is a
function from one record to the next, and gives None where the record is not in a state for it: whoever lost a race looks
again, and nothing is done twice.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from batchgen.serve.ids import make_digest
from batchgen.serve.wire import (
    TERMINAL,
    Batch,
    BatchError,
    BatchErrors,
    BatchUsage,
    FileObject,
    Purpose,
    RequestCounts,
)
from batchgen.specs.sections import PromptForm

End = Literal["completed", "expired", "cancelled", "failed"]


class Record(BaseModel):
    """A younger version may have added fields: they are left alone, so that two versions may share a store."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class Piece(Record):
    """Some of an upload's bytes, as they came in one request: parts of these sizes (bytes) in a folder of content."""

    folder: str
    part_bytes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return sum(self.part_bytes)


class FileRecord(Record):
    """A file's facts; its content lies in parts of these sizes (bytes), in the pieces that it was uploaded in, or is made
    of the dataset of this batch's job."""

    id: str
    tenant: str
    filename: str
    purpose: Purpose
    created_at: int
    expires_at: int | None
    part_bytes: tuple[int, ...] = ()
    pieces: tuple[Piece, ...] = ()
    dataset_of: str | None = None
    dataset_bytes: int = 0
    dataset_status: Literal["ok", "error"] = "ok"

    @property
    def parts(self) -> list[tuple[str, int, int]]:
        """(folder of content, number in it, bytes) of each part, in order."""
        pieces = self.pieces or (Piece(folder=self.id, part_bytes=self.part_bytes),)
        return [(piece.folder, number, size) for piece in pieces for number, size in enumerate(piece.part_bytes)]

    @property
    def num_bytes(self) -> int:
        return sum(size for _, _, size in self.parts) if self.dataset_of is None else self.dataset_bytes

    def is_expired(self, now_s: float) -> bool:
        return self.expires_at is not None and now_s >= self.expires_at

    def to_wire(self) -> FileObject:
        return FileObject(
            id=self.id,
            bytes=self.num_bytes,
            created_at=self.created_at,
            expires_at=self.expires_at,
            filename=self.filename,
            purpose=self.purpose,
        )


def make_file_record(
    id_: str,
    tenant: str,
    filename: str,
    purpose: Purpose,
    kept_s: int | None,
    now_s: float,
    pieces: tuple[Piece, ...] = (),
) -> FileRecord:
    """Of a file that a client sends. `kept_s`: for how long; None: until it is deleted."""
    created_at = int(now_s)
    return FileRecord(
        id=id_,
        tenant=tenant,
        filename=filename,
        purpose=purpose,
        created_at=created_at,
        expires_at=None if kept_s is None else created_at + kept_s,
        pieces=pieces,
    )


class JobInput(Record):
    """What a batch's job reads: Parquet at `url`, its prompts in this form. `num_rows` is the choices of all lines."""

    url: str
    form: PromptForm
    has_tools: bool
    has_sampling: bool = True
    has_keys: bool = True
    is_own: bool = True
    num_rows: int


class BatchRecord(Record):
    """A batch's facts: what clients see, and what only the conductor knows."""

    batch: Batch
    tenant: str
    model: str | None = None
    output_expires_s: int
    input: JobInput | None = None
    end: End = "completed"

    @property
    def id(self) -> str:
        return self.batch.id

    @property
    def expires_at(self) -> int:
        return self.batch.expires_at or 0

    @property
    def is_over(self) -> bool:
        return self.batch.status in TERMINAL


def begin(record: BatchRecord, job_input: JobInput, model: str, num_requests: int, now_s: float) -> BatchRecord | None:
    """The input is good and lies there as Parquet."""
    if record.batch.status != "validating":
        return None
    counts = RequestCounts(total=num_requests)
    batch = _move(record.batch, status="in_progress", in_progress_at=int(now_s), model=model, request_counts=counts)
    return _set(record, batch=batch, input=job_input, model=model)


def fail(record: BatchRecord, errors: list[BatchError], now_s: float) -> BatchRecord | None:
    """Nothing of it was or will be run."""
    if record.batch.status not in ("validating", "in_progress"):
        return None
    counts = RequestCounts()
    batch = _move(
        record.batch,
        status="failed",
        failed_at=int(now_s),
        errors=BatchErrors(data=errors),
        request_counts=counts,
    )
    return _set(record, batch=batch)


def refuse(record: BatchRecord, errors: list[BatchError], now_s: float) -> BatchRecord | None:
    """Its job can't go on: it is on its way to failed, and what is finished is written."""
    if record.batch.status != "in_progress":
        return None
    batch = _move(record.batch, status="finalizing", finalizing_at=int(now_s), errors=BatchErrors(data=errors))
    return _set(record, batch=batch, end="failed")


def count(record: BatchRecord, completed: int, failed: int) -> BatchRecord | None:
    """Progress: neither figure ever goes back, and both fit the total."""
    known = record.batch.request_counts
    failed = min(max(failed, known.failed), known.total - known.completed)
    completed = min(max(completed, known.completed), known.total - failed)
    if record.is_over or (completed, failed) == (known.completed, known.failed):
        return None
    counts = RequestCounts(total=known.total, completed=completed, failed=failed)
    return _set(record, batch=_move(record.batch, request_counts=counts))


def cancel(record: BatchRecord, now_s: float) -> BatchRecord | None:
    """Asked for by the user: of effect until the results are being written."""
    if record.batch.status not in ("validating", "in_progress"):
        return None
    return _set(record, batch=_move(record.batch, status="cancelling", cancelling_at=int(now_s)), end="cancelled")


def expire(record: BatchRecord, now_s: float) -> BatchRecord | None:
    """The window is over before the rows were done: what is finished is written."""
    if record.batch.status != "in_progress" or now_s < record.expires_at:
        return None
    return _set(record, batch=_move(record.batch, status="finalizing", finalizing_at=int(now_s)), end="expired")


def finalize(record: BatchRecord, now_s: float) -> BatchRecord | None:
    """All rows ended: results are written now."""
    if record.batch.status != "in_progress":
        return None
    return _set(record, batch=_move(record.batch, status="finalizing", finalizing_at=int(now_s)))


def finish(
    record: BatchRecord,
    counts: RequestCounts,
    usage: BatchUsage | None,
    output_file_id: str | None,
    error_file_id: str | None,
    now_s: float,
) -> BatchRecord | None:
    """The results lie there: the batch is over."""
    if record.batch.status not in ("finalizing", "cancelling"):
        return None
    batch = _move(
        record.batch,
        status=record.end,
        request_counts=counts,
        usage=usage,
        output_file_id=output_file_id,
        error_file_id=error_file_id,
        **{f"{record.end}_at": int(now_s)},
    )
    return _set(record, batch=batch)


def make_result_file_id(record: BatchRecord, kind: Literal["output", "error"]) -> str:
    """Always the same one, so that results that are written again after a crash are the same files."""
    return f"file-{record.id.removeprefix('batch_')[:12]}{make_digest(record.tenant, record.id, kind)[:20]}"


def _move(batch: Batch, **fields: object) -> Batch:
    return batch.model_copy(update=fields)


def _set(record: BatchRecord, **fields: object) -> BatchRecord:
    return record.model_copy(update=fields)
