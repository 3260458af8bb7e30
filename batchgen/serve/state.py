"""The endpoint's state, which lies in the store and nowhere else: who may see which file and batch, and what is open.

    t/TENANT/files/ID.json      a file's facts; it exists when this does
    t/TENANT/content/ID/N       its parts
    t/TENANT/uploads/ID.json    an upload's facts, that of a file in pieces
    t/TENANT/pieces/ID/ID.json  a piece's facts; its parts are t/TENANT/content/ID/ID/N, and stay there
    t/TENANT/batches/ID.json    a batch's facts
    t/TENANT/inputs/ID/TRY/     its rows as Parquet
    t/TENANT/jobs/ID/           its job's output folder
    uploads/TENANT/ID           parts of it come, and its record is not there yet
    open/TENANT/ID              when it was put: a batch that has not ended; made before it and deleted after its end
    once/TENANT/DIGEST.json     which batch a create that may be repeated made

Records are changed by compare-and-swap only. A tenant's folder is the only one that is ever looked into on its behalf.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from batchgen.errors import AlreadyExists, Conflict, NotFound, OutputError
from batchgen.serve.ids import is_batch_id, is_file_id, is_upload_id
from batchgen.serve.records import BatchRecord, FileRecord, Piece
from batchgen.serve.upload_records import UploadRecord
from batchgen.storage import Storage
from batchgen.stores.probe import probe

RecordT = TypeVar("RecordT", bound=BaseModel)
MAX_SWAPS = 50
NUM_READERS = 16


class State:
    """Blocking: called in threads. `now` is given to tests."""

    def __init__(self, url: str, now: Callable[[], float] = time.time) -> None:
        self.storage = Storage(url)
        self.now = now

    def check_store(self) -> None:
        """Raises OutputError where the store can't keep two writers apart: nothing here would hold then."""
        abilities = probe(self.storage)
        if not (abilities.is_exclusive and abilities.can_replace):
            raise OutputError(
                f"store: {self.storage.root} has no conditional writes ({abilities.reason}), without which batches could "
                "be lost or run twice; choose a store that has them"
            )

    # ---- files

    def create_file(self, record: FileRecord) -> None:
        """Of no effect where it is there: a repeated write after a lost reply."""
        self._create(make_file_path(record.tenant, record.id), record)

    def read_file(self, tenant: str, file_id: str) -> FileRecord | None:
        """None where there is none, and where it has expired."""
        record = self.read_file_record(tenant, file_id)
        return None if record is None or record.is_expired(self.now()) else record

    def read_file_record(self, tenant: str, file_id: str) -> FileRecord | None:
        """Expired or not."""
        return self._read(make_file_path(tenant, file_id), FileRecord)

    def begin_upload(self, tenant: str, file_id: str) -> None:
        """Parts without a record come: whoever sweeps finds them by this."""
        self.storage.put(f"uploads/{tenant}/{file_id}", b"")

    def end_upload(self, tenant: str, file_id: str) -> None:
        self.storage.delete(f"uploads/{tenant}/{file_id}")

    def list_uploads(self) -> list[tuple[str, str]]:
        """(tenant, file id) of all that began and did not end."""
        parts = [info.path.split("/") for info in self.storage.list_files("uploads")]
        return [(part[1], part[2]) for part in parts if len(part) == 3 and is_file_id(part[2])]

    def list_file_ids(self, tenant: str) -> list[str]:
        return self._list_ids(f"t/{tenant}/files")

    def read_files(self, tenant: str, ids: Sequence[str]) -> Iterator[FileRecord]:
        """In this order; those that are gone are left out."""
        with ThreadPoolExecutor(NUM_READERS, "records") as threads:
            found = threads.map(lambda id_: self.read_file(tenant, id_), ids)
            yield from (record for record in found if record is not None)

    def delete_file(self, record: FileRecord) -> None:
        """The record first: a file whose parts are half gone is never seen."""
        self.storage.delete(make_file_path(record.tenant, record.id))
        self.storage.delete_many(make_part_path(record.tenant, folder, number) for folder, number, _ in record.parts)

    # ---- uploads in pieces

    def create_upload(self, record: UploadRecord) -> None:
        self._create(make_upload_path(record.tenant, record.id), record)

    def read_upload(self, tenant: str, upload_id: str) -> UploadRecord | None:
        return self._read(make_upload_path(tenant, upload_id), UploadRecord)

    def change_upload(
        self, record: UploadRecord, change: Callable[[UploadRecord], UploadRecord | None]
    ) -> tuple[UploadRecord, bool]:
        """As `change_batch`."""
        return self._change(make_upload_path(record.tenant, record.id), UploadRecord, change)

    def delete_upload(self, record: UploadRecord) -> None:
        self.storage.delete(make_upload_path(record.tenant, record.id))

    def list_upload_ids(self, tenant: str) -> list[str]:
        return [id_ for id_ in self._list_ids(f"t/{tenant}/uploads") if is_upload_id(id_)]

    def create_piece(self, record: UploadRecord, piece_id: str, piece: Piece) -> None:
        """Last: its bytes are there."""
        self._create(make_piece_path(record.tenant, record.id, piece_id), piece)

    def read_piece(self, record: UploadRecord, piece_id: str) -> Piece | None:
        return self._read(make_piece_path(record.tenant, record.id, piece_id), Piece)

    def list_piece_paths(self, record: UploadRecord) -> list[str]:
        return [info.path for info in self.storage.list_files(f"t/{record.tenant}/pieces/{record.id}")]

    # ---- batches

    def create_batch(self, record: BatchRecord) -> bool:
        """Whether it was not there. The sign that it is open comes first: a batch without one would wait for ever."""
        self.storage.put(make_open_path(record.tenant, record.id), str(self.now()).encode())
        return self._create(make_batch_path(record.tenant, record.id), record)

    def read_batch(self, tenant: str, batch_id: str) -> BatchRecord | None:
        return self._read(make_batch_path(tenant, batch_id), BatchRecord)

    def list_batch_ids(self, tenant: str) -> list[str]:
        return self._list_ids(f"t/{tenant}/batches")

    def read_batches(self, tenant: str, ids: Sequence[str]) -> list[BatchRecord]:
        with ThreadPoolExecutor(NUM_READERS, "records") as threads:
            found = threads.map(lambda id_: self.read_batch(tenant, id_), ids)
            return [record for record in found if record is not None]

    def change_batch(
        self, tenant: str, batch_id: str, change: Callable[[BatchRecord], BatchRecord | None]
    ) -> tuple[BatchRecord, bool]:
        """(the record as it stands, was it changed). `change` may be asked again with a newer record. Raises NotFound."""
        return self._change(make_batch_path(tenant, batch_id), BatchRecord, change)

    def list_open(self, tenant: str | None = None) -> list[tuple[str, str]]:
        """(tenant, batch id) of all batches that have not ended, or of some that just have."""
        infos = self.storage.list_files("open" if tenant is None else f"open/{tenant}")
        parts = [info.path.split("/") for info in infos]
        return [(part[1], part[2]) for part in parts if len(part) == 3 and is_batch_id(part[2])]

    def read_opened_at(self, tenant: str, batch_id: str) -> float | None:
        """When the sign was put, last. The id may be older by hours: a create that is sent again takes it over."""
        try:
            return float(self.storage.read_bytes(make_open_path(tenant, batch_id)))
        except (NotFound, ValueError):  # it is gone, or of a version that wrote no time
            return None

    def close_batch(self, tenant: str, batch_id: str) -> None:
        """It has ended, and is no longer looked at."""
        self.storage.delete(make_open_path(tenant, batch_id))

    def job_url(self, tenant: str, batch_id: str) -> str:
        """The output folder of its job."""
        return self.storage.url(f"t/{tenant}/jobs/{batch_id}")

    # ---- how

    def _create(self, path: str, record: BaseModel) -> bool:
        try:
            self.storage.create(path, record.model_dump_json().encode())
        except AlreadyExists:
            return False
        return True

    def _change(
        self, path: str, kind: type[RecordT], change: Callable[[RecordT], RecordT | None]
    ) -> tuple[RecordT, bool]:
        for _ in range(MAX_SWAPS):
            data, version = self.storage.read_versioned(path)
            record = _parse(data, kind, self.storage.url(path))
            changed = change(record)
            if changed is None:
                return record, False
            try:
                self.storage.replace(path, changed.model_dump_json().encode(), version)
            except Conflict:
                continue
            return changed, True
        raise OutputError(f"{self.storage.url(path)}: other writers kept getting in between; start again later")

    def _read(self, path: str, kind: type[RecordT]) -> RecordT | None:
        try:
            return _parse(self.storage.read_bytes(path), kind, self.storage.url(path))
        except NotFound:
            return None

    def _list_ids(self, folder: str) -> list[str]:
        """Oldest first."""
        infos = self.storage.list_files(folder, suffix=".json")
        return sorted(info.path.rpartition("/")[2].removesuffix(".json") for info in infos)


def _parse(data: bytes, kind: type[RecordT], where: str) -> RecordT:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise OutputError(f"{where}: is damaged; restore it from a backup, or delete it") from error


def make_file_path(tenant: str, file_id: str) -> str:
    return f"t/{tenant}/files/{file_id}.json"


def make_content_path(tenant: str, folder: str) -> str:
    return f"t/{tenant}/content/{folder}"


def make_part_path(tenant: str, folder: str, number: int) -> str:
    """`folder`: a file's id, or an upload's and a piece's."""
    return f"{make_content_path(tenant, folder)}/{number:06d}"


def make_upload_path(tenant: str, upload_id: str) -> str:
    return f"t/{tenant}/uploads/{upload_id}.json"


def make_piece_path(tenant: str, upload_id: str, piece_id: str) -> str:
    return f"t/{tenant}/pieces/{upload_id}/{piece_id}.json"


def make_batch_path(tenant: str, batch_id: str) -> str:
    return f"t/{tenant}/batches/{batch_id}.json"


def make_open_path(tenant: str, batch_id: str) -> str:
    return f"open/{tenant}/{batch_id}"


def make_once_path(tenant: str, digest: str) -> str:
    return f"once/{tenant}/{digest}.json"
