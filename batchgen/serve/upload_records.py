"""What the store keeps of an upload that comes in pieces, and how it may change. Pure: time is an argument.

    pending -> completed     its file is named in it from then on, and is made right after
        `----> cancelled
        `----> expired       by the clock alone

Changes are as those of batches (`records`): None where the record is not in a state for it.
"""

from typing import Literal

from batchgen.serve.records import FileRecord, Record
from batchgen.serve.wire import CreateUpload, Upload, UploadPurpose

# OpenAI's own.
LIFETIME_S = 3600


class UploadRecord(Record):
    """`file`: as it is, or will be; `is_made`: it was, and may be deleted by now. `kept_s`: how long it is kept."""

    id: str
    tenant: str
    filename: str
    purpose: UploadPurpose
    num_bytes: int
    created_at: int
    kept_s: int | None
    status: Literal["pending", "completed", "cancelled"] = "pending"
    part_ids: tuple[str, ...] = ()
    file: FileRecord | None = None
    is_made: bool = False

    @property
    def expires_at(self) -> int:
        return self.created_at + LIFETIME_S

    def is_open(self, now_s: float) -> bool:
        """May pieces come?"""
        return self.status == "pending" and now_s < self.expires_at

    def to_wire(self, now_s: float) -> Upload:
        is_expired = self.status == "pending" and not self.is_open(now_s)
        return Upload(
            id=self.id,
            bytes=self.num_bytes,
            created_at=self.created_at,
            expires_at=self.expires_at,
            filename=self.filename,
            purpose=self.purpose,
            status="expired" if is_expired else self.status,
            file=None if self.file is None else self.file.to_wire(),
        )


def make_upload(
    id_: str, tenant: str, asked: CreateUpload, filename: str, kept_s: int | None, now_s: float
) -> UploadRecord:
    return UploadRecord(
        id=id_,
        tenant=tenant,
        filename=filename,
        purpose=asked.purpose,
        num_bytes=asked.bytes,
        created_at=int(now_s),
        kept_s=kept_s,
    )


def complete(record: UploadRecord, part_ids: tuple[str, ...], file: FileRecord, now_s: float) -> UploadRecord | None:
    """From here on it is this file, of these pieces in this order."""
    if not record.is_open(now_s):
        return None
    return record.model_copy(update={"status": "completed", "part_ids": part_ids, "file": file})


def note_made(record: UploadRecord) -> UploadRecord | None:
    """Its file is there, and is not made again once it is deleted."""
    return None if record.is_made else record.model_copy(update={"is_made": True})


def cancel(record: UploadRecord, now_s: float) -> UploadRecord | None:
    return record.model_copy(update={"status": "cancelled"}) if record.is_open(now_s) else None
