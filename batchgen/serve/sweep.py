"""What is no longer wanted is deleted: expired files, parts that a killed upload left, uploads in parts that are long over,
notes of creates long past."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from batchgen.errors import OutputError
from batchgen.serve.ids import read_made_at
from batchgen.serve.once import delete_old_notes
from batchgen.serve.state import State
from batchgen.serve.upload_records import LIFETIME_S
from batchgen.serve.uploads import clear_upload

# An upload may take hours.
ABANDONED_S = 24 * 3600.0


def sweep(state: State, say: Callable[[str], None]) -> None:
    """One pass. What is deleted is gone for everybody already; what is damaged is told of, and holds up nothing else."""
    now = state.now()
    for tenant, file_id in state.list_uploads():
        if now - read_made_at(file_id) > ABANDONED_S:
            with _telling(say):
                _end_upload(state, tenant, file_id)
    for tenant in state.storage.list_folders("t"):
        for file_id in state.list_file_ids(tenant):
            with _telling(say):
                record = state.read_file_record(tenant, file_id)
                if record is not None and record.is_expired(now):
                    state.delete_file(record)
        for upload_id in state.list_upload_ids(tenant):
            if now - read_made_at(upload_id) > LIFETIME_S + ABANDONED_S:
                with _telling(say):
                    _forget_upload(state, tenant, upload_id)
    delete_old_notes(state, say)


def _end_upload(state: State, tenant: str, file_id: str) -> None:
    if state.read_file_record(tenant, file_id) is None:
        infos = state.storage.list_files(f"t/{tenant}/content/{file_id}")
        state.storage.delete_many(info.path for info in infos)
    state.end_upload(tenant, file_id)


def _forget_upload(state: State, tenant: str, upload_id: str) -> None:
    """Its file stays."""
    record = state.read_upload(tenant, upload_id)
    if record is not None:
        clear_upload(state, record)
        state.delete_upload(record)


@contextmanager
def _telling(say: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except OutputError as error:
        say(f"the sweep goes on without it: {error}")
