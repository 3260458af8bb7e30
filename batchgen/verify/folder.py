"""What an output folder says of itself: spec, plan, manifest, report, `_SUCCESS`, the driver's lease; and what of it is
wrong. Reads everything but the rows and the journal; a file that is known to be damaged is not parsed.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from batchgen import journal, manifest
from batchgen.batch_stats import STATS_FOLDER
from batchgen.driver.control import find_lock, read_status
from batchgen.driver.inventory import MANIFEST, REWRITTEN
from batchgen.driver.lease import Holder, is_dead_here, read_holder
from batchgen.errors import BatchgenError, Damaged, NotFound, OutputError
from batchgen.manifest import PLAN_FOLDER, SPEC, SUCCESS
from batchgen.records import InputFile, Shard
from batchgen.report.records import REPORT_JSON
from batchgen.spec import JobSpec
from batchgen.specs.saved import read_saved_spec
from batchgen.storage import Storage
from batchgen.verify.damage import OF_DAMAGE
from batchgen.verify.rows import RESTORE, Finding, check_plan
from batchgen.worker.partial_rows import SCHEMA as PARTIALS_SCHEMA
from batchgen.worker.seal import digest, is_json_whole
from batchgen.write import make_result_schema

NUM_READERS = 8
MAX_NAMED = 5
RERUN = "run the job again: it is written anew when the run ends"
MENDS = {SPEC: RESTORE, MANIFEST: RERUN, SUCCESS: RERUN}
STATS_MEND = f"{RESTORE}, or delete it and run the job again: what the shard files say of their batches is written anew"


@dataclass(slots=True)
class Folder:
    """`manifest` and the like are empty where they are absent or damaged. `is_settled`: no run began since the manifest
    was written, so that everything must be as it says. `unsealed`: what an earlier version wrote, without a digest."""

    storage: Storage
    findings: list[Finding] = field(default_factory=list)
    unsealed: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    spec: JobSpec | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    files: list[InputFile] = field(default_factory=list)
    passthrough: pa.Schema | None = None
    shards: list[Shard] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    holder: Holder | None = None
    is_settled: bool = False

    @property
    def epoch(self) -> int:
        """The manifest's; 0 where there is none."""
        return int(self.manifest.get("epoch", 0))

    @property
    def is_held(self) -> bool:
        """May a run be working on it? A holder on another machine is believed until it says that it ended."""
        return self.holder is not None and not self.holder.has_ended and not is_dead_here(self.holder)

    def find(self, path: str, what: str, mend: str) -> None:
        self.findings.append(Finding(self.storage.url(path), what, mend))


def read_folder(storage: Storage) -> Folder:
    """Raises OutputError for a folder that holds no job, StorageError where the store fails."""
    folder = Folder(storage)
    # The lease first: a run that begins later shows as a newer epoch when it is looked at again.
    folder.holder = _read_holder(folder)
    facts = _read_sealed(folder, SPEC)
    said = _read_sealed(folder, MANIFEST)
    success = _read_sealed(folder, SUCCESS)
    has_plan = bool(storage.list_files(PLAN_FOLDER))
    if not (facts or said or success or folder.damaged or has_plan or storage.list_files("data")):
        raise OutputError(f"{storage.root}: holds no job of batchgen; give the output.path of one")
    folder.facts, folder.manifest = facts or {}, said or {}
    folder.is_settled = said is not None and not folder.is_held and (folder.holder is None or not _is_newer(folder))
    _check_spec(folder)
    _check_manifest(folder, has_report=storage.info(REPORT_JSON) is not None, has_success=success is not None)
    _check_sums(folder)
    _read_plan(folder)
    if folder.is_settled:
        _check_success(folder, success)
        _check_report(folder)
    return folder


def _is_newer(folder: Folder) -> bool:
    return folder.holder is not None and folder.holder.epoch > folder.epoch


def _read_holder(folder: Folder) -> Holder | None:
    try:
        read_status(folder.storage)
    except OutputError as error:
        folder.findings.append(split_error(error, "delete it, if no run is working on the folder"))
    try:
        return read_holder(find_lock(folder.storage))
    except OutputError as error:
        folder.findings.append(split_error(error, "delete it, if no run is working on the folder"))
        return None


def split_error(error: BatchgenError, mend: str) -> Finding:
    """An error of the folder's own files is 'where: what; mend'."""
    where, _, rest = str(error).rpartition(": ")
    return Finding(where, rest.partition("; ")[0], mend)


def _read_sealed(folder: Folder, path: str) -> dict[str, Any] | None:
    try:
        raw = folder.storage.read_bytes(path)
    except NotFound:
        return None
    try:
        is_whole = is_json_whole(raw)
    except (ValueError, RecursionError):
        is_whole = False
    if is_whole is False:
        folder.damaged.add(path)
        folder.find(path, "was changed since it was written", MENDS[path])
        return None
    if is_whole is None:
        folder.unsealed.append(path)
    return dict(json.loads(raw))


def _check_spec(folder: Folder) -> None:
    """The frozen spec must be one that this version reads, and make the fingerprint that every file bears."""
    facts = folder.facts
    if not facts:
        if SPEC not in folder.damaged:
            folder.find(SPEC, "is gone", RESTORE)
        return
    try:
        made = hashlib.sha256(json.dumps(facts["fingerprint_fields"], sort_keys=True).encode()).hexdigest()[:32]
        folder.spec = read_saved_spec(facts)
    except (KeyError, TypeError, ValidationError):
        folder.find(SPEC, "is no spec that this version of batchgen reads", RESTORE)
        return
    # What an earlier version left unsealed is compared field by field; of a sealed one a newer version may know more.
    is_same = SPEC not in folder.unsealed or folder.spec.fingerprint_fields() == facts["fingerprint_fields"]
    if made != facts.get("fingerprint") or not is_same:
        folder.find(SPEC, "does not make the fingerprint that it names", RESTORE)


def _check_manifest(folder: Folder, *, has_report: bool, has_success: bool) -> None:
    """It is there once a run has ended, and of this job."""
    if not folder.manifest:
        if (has_report or has_success) and MANIFEST not in folder.damaged:
            folder.find(MANIFEST, "is gone, or its run ended before it was written", RERUN)
        return
    if folder.facts and folder.manifest.get("fingerprint") != folder.facts.get("fingerprint"):
        folder.find(MANIFEST, "belongs to another job (fingerprint)", RESTORE)


def _check_sums(folder: Folder) -> None:
    """Everything but the shard files against the sums in the manifest; and nothing beside what it names."""
    sums: Mapping[str, str] = folder.manifest.get("checksums", {})
    for path, known in sums.items():
        if path in folder.damaged or (path in REWRITTEN and not folder.is_settled):
            continue
        mend = MENDS.get(path) or _choose_mend(path)
        try:
            is_whole = digest(folder.storage.read_bytes(path)) == known
        except NotFound:
            if path != manifest.COMMITTED:  # a copy, which may be deleted at any time
                folder.find(path, "is gone", mend)
            continue
        if not is_whole:
            folder.damaged.add(path)
            # Its own seal is right, and so is the manifest's.
            is_foreign = path == SPEC and SPEC not in folder.unsealed
            what = "was changed since it was written"
            folder.find(path, "and manifest.json are not of one folder" if is_foreign else what, mend)
    for info in [*folder.storage.list_files(STATS_FOLDER), *folder.storage.list_files(PLAN_FOLDER)]:
        is_known = info.path in sums if folder.is_settled and sums else info.path.endswith(".parquet")
        if not is_known:
            folder.damaged.add(info.path)
            folder.find(info.path, "was not written by any run of this job", "move it away")


def _choose_mend(path: str) -> str:
    if path.startswith(STATS_FOLDER):
        return STATS_MEND
    return "delete it: it is only a copy" if path == manifest.COMMITTED else RERUN if path in REWRITTEN else RESTORE


def _read_plan(folder: Folder) -> None:
    if any(path.startswith(PLAN_FOLDER) for path in folder.damaged):
        return
    try:
        saved = manifest.read_plan(folder.storage)
    except OutputError as error:
        folder.findings.append(split_error(error, RESTORE))
        return
    except NotFound:
        saved = None
    if saved is None:
        folder.find(PLAN_FOLDER, "holds no plan", f"{RESTORE}, or run the job if none has planned it yet")
        return
    folder.files, folder.passthrough, folder.shards = saved
    for fault in check_plan(folder.files, folder.shards):
        folder.find(PLAN_FOLDER, fault, RESTORE)


def _check_success(folder: Folder, success: dict[str, Any] | None) -> None:
    """There when the last run was a full one that went well, and then of that run."""
    said = folder.manifest
    if "exit_code" not in said or SUCCESS in folder.damaged:
        return
    is_due = said["exit_code"] == 0 and said["rows"]["is_complete"] and not said["is_trial"]
    if is_due and success is None:
        folder.find(SUCCESS, "is gone, or its run ended before it was written", "run the job again: it writes it")
    elif success is not None and not said["is_trial"] and (not is_due or success.get("epoch") != folder.epoch):
        folder.find(SUCCESS, "is not of the last run", "run the job again: it writes or removes it")


def _check_report(folder: Folder) -> None:
    if REPORT_JSON in folder.damaged:
        return
    try:
        report = manifest.read_json(folder.storage, REPORT_JSON) or {}
        is_same = all(report.get(name) == folder.manifest[name] for name in ("rows", "fingerprint", "epoch"))
    except (OutputError, *OF_DAMAGE):
        is_same = False
    if not is_same:
        folder.find(REPORT_JSON, "does not say what manifest.json says", RERUN)


# ---- the journal -----------------------------------------------------------------------------------------------------


def check_journal(folder: Folder) -> tuple[list[Finding], list[str]]:
    """(findings, notes). Segments of shards that are done are harmless; damaged ones would stop the next run."""
    if folder.spec is None:
        return [], []
    storage, schema, fingerprint = folder.storage, make_result_schema(folder.spec), folder.facts["fingerprint"]
    paths = journal.list_segments(storage)

    def read(path: str) -> str | None:
        try:
            refs = journal.read_index(storage, path, fingerprint)
            for ref in refs.values():
                journal.read_ref(storage, ref, PARTIALS_SCHEMA if journal.is_partials(path) else schema)
        except NotFound:
            return None  # its shards were committed meanwhile
        except Damaged as error:
            return split_error(error, "").what
        return None

    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="verify") as threads:
        faults = dict(zip(paths, threads.map(read, paths), strict=True))
    mend = "delete it: its rows are generated again"
    findings = [Finding(storage.url(path), fault, mend) for path, fault in faults.items() if fault]
    more = f" and {len(paths) - MAX_NAMED} more" if len(paths) > MAX_NAMED else ""
    named = f"journal segments left for the next run: {', '.join(paths[:MAX_NAMED])}{more}"
    return findings, [named] if paths else []
