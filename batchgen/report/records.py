"""Records of runs (`driver.run_record`), as their drivers last wrote them. What is damaged is left out: it is no row."""

import json

from batchgen.errors import NotFound
from batchgen.report.figures import RunRecord
from batchgen.storage import Storage
from batchgen.worker.seal import is_json_whole

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
RUNS_FOLDER = "_batchgen/runs"
# What a report takes from each; a record without it is none.
NEEDED = frozenset(
    {"epoch", "state", "message", "began_at", "elapsed_s", "worker_s", "startup_s", "total", "tail", "bin_s", "bins"}
)


def make_record_path(epoch: int) -> str:
    return f"{RUNS_FOLDER}/run-{epoch:06d}.json"


def read_records(storage: Storage) -> list[RunRecord]:
    """Of every run that left one, oldest first."""
    paths = [info.path for info in storage.list_files(RUNS_FOLDER, ".json")]
    return [record for path in paths if (record := _read(storage, path)) is not None]


def _read(storage: Storage, path: str) -> RunRecord | None:
    try:
        data = storage.read_bytes(path)
        value = json.loads(data) if is_json_whole(data) else None
    except (NotFound, ValueError, RecursionError):
        return None
    is_record = isinstance(value, dict) and value.keys() >= NEEDED
    return value if is_record else None
