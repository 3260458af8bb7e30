"""Uploads in pieces, in the store: `upload_records` says what may become of one. Blocking.

A piece's bytes come first, its facts last, so that one that broke off is none. The file is made of the pieces as they lie:
nothing is copied. What no file wants goes when the upload is cancelled, or a day after it expired.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor

from batchgen.serve.errors import bad_request
from batchgen.serve.ids import is_piece_id, make_file_id, make_upload_id
from batchgen.serve.parts import read_content
from batchgen.serve.records import FileRecord, Piece, make_file_record
from batchgen.serve.state import NUM_READERS, State, make_content_path
from batchgen.serve.upload_records import UploadRecord, cancel, complete, make_upload, note_made
from batchgen.serve.wire import CompleteUpload, CreateUpload


def create_upload(state: State, tenant: str, asked: CreateUpload, filename: str, kept_s: int | None) -> UploadRecord:
    record = make_upload(make_upload_id(state.now()), tenant, asked, filename, kept_s, state.now())
    state.create_upload(record)
    return record


def check_open(state: State, record: UploadRecord) -> None:
    """Raises ApiError (400): that stays so, and a 409 would be tried again."""
    if not record.is_open(state.now()):
        status = record.to_wire(state.now()).status
        raise bad_request(f"The upload is {status}.", "upload_id", "upload_not_pending")


def make_piece_folder(record: UploadRecord, piece_id: str) -> str:
    return f"{record.id}/{piece_id}"


def complete_upload(state: State, record: UploadRecord, asked: CompleteUpload) -> UploadRecord:
    """With its file, which is there then. The same once more changes nothing. Raises ApiError (400)."""
    part_ids = tuple(asked.part_ids)
    if record.status == "pending":
        check_open(state, record)
        file_id, pieces = make_file_id(state.now()), read_pieces(state, record, part_ids)
        facts = record.tenant, record.filename, record.purpose, record.kept_s
        file = make_file_record(file_id, *facts, state.now(), pieces)
        check_content(state, record, file, asked.md5)
        record, _ = state.change_upload(record, lambda known: complete(known, part_ids, file, state.now()))
    if record.file is None or record.part_ids != part_ids:  # cancelled, or another was first
        check_open(state, record)
        raise bad_request("The upload is completed with other parts.", "part_ids", "upload_not_pending")
    if not record.is_made:
        state.create_file(record.file)
        record, _ = state.change_upload(record, note_made)
    return record


def read_pieces(state: State, record: UploadRecord, part_ids: tuple[str, ...]) -> tuple[Piece, ...]:
    """In this order. Raises ApiError (400) for one that is not there, or named twice."""
    if len(set(part_ids)) < len(part_ids):
        raise bad_request("part_ids names a part twice", "part_ids", "invalid_value")

    def read(piece_id: str) -> Piece:
        piece = state.read_piece(record, piece_id) if is_piece_id(piece_id) else None
        if piece is None:
            raise bad_request(f"the upload has no part '{piece_id[:80]}'", "part_ids", "part_not_found")
        return piece

    with ThreadPoolExecutor(NUM_READERS, "pieces") as threads:
        return tuple(threads.map(read, part_ids))


def check_content(state: State, record: UploadRecord, file: FileRecord, md5: str | None) -> None:
    """Raises ApiError (400)."""
    if file.num_bytes != record.num_bytes:
        told = f"the parts have {file.num_bytes} bytes, and the upload was to have {record.num_bytes}"
        raise bad_request(told, "part_ids", "bytes_mismatch")
    if md5 is not None:
        seen = hashlib.md5(usedforsecurity=False)
        for data in read_content(state, file):
            seen.update(data)
        if seen.hexdigest() != md5.lower():
            raise bad_request("the parts have another MD5 checksum", "md5", "checksum_mismatch")


def cancel_upload(state: State, record: UploadRecord) -> UploadRecord:
    """Its pieces go. Asking twice is fine. Raises ApiError (400) where it is too late."""
    record, is_changed = state.change_upload(record, lambda known: cancel(known, state.now()))
    if record.status != "cancelled":
        check_open(state, record)
    if is_changed:
        clear_upload(state, record)
    return record


def clear_upload(state: State, record: UploadRecord) -> None:
    """Delete all pieces that no file is made of: its own may have been deleted since, or never made. One that comes at this
    moment is left to the sweep."""
    file = None if record.file is None else state.read_file_record(record.tenant, record.file.id)
    kept = set() if file is None else {piece.folder for piece in file.pieces}
    infos = state.storage.list_files(make_content_path(record.tenant, record.id))
    unwanted = [info.path for info in infos if "/".join(info.path.split("/")[3:5]) not in kept]
    state.storage.delete_many([*unwanted, *state.list_piece_paths(record)])
