"""Is a job's output folder what its runs wrote, and all of it? Looks at every byte that matters; changes nothing.

Needs no cluster and no engine, and works on a folder whose job is unfinished or being run: what is there must be right,
and what is missing is told. Every file is judged by the strongest word there is: `manifest.json` (every digest) where no
run began since it was written; else what never changes by the manifest, and newer shard files by their own seals.

Memory: the shard files that are read at the same time (`MAX_READ_BYTES`, or the largest one), the plan, and where keys are
the user's and the job says that they are unique, 8 bytes a row, 28 while they are compared (0.3 GB for ten million).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from batchgen.batch_stats import STATS_FOLDER, read_stats_table
from batchgen.driver.inventory import MANIFEST
from batchgen.errors import InputError, OutputError
from batchgen.parquet import read_table
from batchgen.plan import list_changes
from batchgen.preflight.tokenizer_files import digest_tokenizer
from batchgen.spec import JobSpec
from batchgen.specs.inputs import find_inputs
from batchgen.storage import FileInfo, Storage
from batchgen.verify.files import Expected, FileFacts, check_file
from batchgen.verify.folder import NUM_READERS, RERUN, STATS_MEND, Folder, check_journal, read_folder, split_error
from batchgen.verify.rows import AGAIN, Finding, KeyCheck, check_batches, confirm_repeated
from batchgen.write import KEY_FIELDS, list_generated_fields, make_output_schema

MAX_READ_BYTES = 512 * 2**20


@dataclass(slots=True)
class Verdict:
    """`todo`: why the job is not done, each a sentence; `notes`: what is worth knowing and no fault."""

    findings: list[Finding]
    todo: list[str]
    notes: list[str]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 all is right, 1 findings, 3 what is there is right and the job is not done. (2: no job folder, raised.)"""
        return 1 if self.findings else 3 if self.todo else 0

    @property
    def state(self) -> str:
        return {0: "right", 1: "wrong", 3: "unfinished"}[self.exit_code]

    def to_json(self) -> dict[str, Any]:
        found = [{"where": f.where, "what": f.what, "mend": f.mend} for f in self.findings]
        fields = {"state": self.state, "findings": found, "todo": self.todo, "notes": self.notes}
        return {**fields, **self.counts, "exit_code": self.exit_code}


def verify(storage: Storage, *, with_input: bool = False) -> Verdict:
    """Look at the whole folder; at the input's listing too where asked. Raises OutputError for a folder that holds no job,
    StorageError where the store fails. A run that begins meanwhile makes it look again, knowing of that run."""
    folder = read_folder(storage)
    verdict = _look(folder, with_input)
    after = read_folder(storage)
    is_same = (folder.holder and folder.holder.epoch, folder.is_settled) == (
        after.holder and after.holder.epoch,
        after.is_settled,
    )
    return verdict if is_same else _look(after, with_input)


def _look(folder: Folder, with_input: bool) -> Verdict:
    verdict = Verdict(list(folder.findings), [], [])
    infos = _list_data(folder)
    _find_strays(folder, infos, verdict)
    facts = _check_files(folder, infos, verdict)
    _find_missing(folder, infos, verdict)
    _check_totals(folder, facts, verdict)
    _check_stats(folder, facts, verdict)
    _check_keys(folder, facts, verdict)
    findings, notes = check_journal(folder)
    verdict.findings, verdict.notes = verdict.findings + findings, verdict.notes + notes
    if with_input and folder.spec is not None:
        _check_input(folder, folder.spec, verdict)
    _sum_up(folder, facts, verdict)
    return verdict


# ---- data/ -----------------------------------------------------------------------------------------------------------


def _list_data(folder: Folder) -> dict[str, FileInfo]:
    """By path. What the manifest names and the listing lacks is asked for by its name: a network file system's may not show
    yet what another machine wrote seconds ago."""
    infos = {info.path: info for info in folder.storage.list_files("data")}
    unseen = {entry["path"] for entry in folder.manifest.get("files", [])} - infos.keys()
    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="verify") as threads:
        found = [info for info in threads.map(folder.storage.info, sorted(unseen)) if info is not None]
    return infos | {info.path: info for info in found}


def _find_strays(folder: Folder, infos: dict[str, FileInfo], verdict: Verdict) -> None:
    planned = {shard.data_path for shard in folder.shards}
    if not planned and folder.findings:
        return  # the plan is gone or damaged: that is the finding
    for path in sorted(infos.keys() - planned):
        verdict.findings.append(Finding(folder.storage.url(path), "is no shard of this job's plan", "move it away"))


def _check_files(folder: Folder, infos: dict[str, FileInfo], verdict: Verdict) -> list[FileFacts]:
    """Every planned shard file that is there."""
    if folder.spec is None or folder.passthrough is None:
        return []
    expected = _make_expected(folder, folder.spec, folder.passthrough)
    there = [(infos[shard.data_path], shard) for shard in folder.shards if shard.data_path in infos]
    largest = max((info.num_bytes for info, _ in there), default=1)
    num_readers = max(1, min(NUM_READERS, MAX_READ_BYTES // max(1, largest)))
    with ThreadPoolExecutor(num_readers, thread_name_prefix="verify") as threads:
        facts = list(threads.map(lambda pair: check_file(folder.storage, pair[0], pair[1], expected), there))
    for fact in facts:
        url = folder.storage.url(fact.path)
        verdict.findings += [Finding(url, fault, AGAIN) for fault in fact.faults]
    return facts


def _make_expected(folder: Folder, spec: JobSpec, passthrough: pa.Schema) -> Expected:
    ours = {item.name: item.type for item in [*KEY_FIELDS, *list_generated_fields(spec)]}
    names = make_output_schema(spec, passthrough).names
    return Expected(
        fingerprint=folder.facts["fingerprint"],
        n=spec.sampling.n,
        has_own_keys=spec.input.custom_id is not None,
        fields=[(name, ours.get(name)) for name in names],
        entries={entry["path"]: entry for entry in folder.manifest.get("files", [])},
        epoch=folder.epoch,
        is_settled=folder.is_settled,
    )


def _find_missing(folder: Folder, infos: dict[str, FileInfo], verdict: Verdict) -> None:
    """What the manifest names was there; what is planned only is still to be done."""
    named = {entry["path"] for entry in folder.manifest.get("files", [])}
    for path in sorted(named - infos.keys()):
        mend = "restore it from a copy, or run the job again: its rows are then generated again"
        verdict.findings.append(Finding(folder.storage.url(path), "is gone", mend))
    todo = [shard for shard in folder.shards if shard.data_path not in infos and shard.data_path not in named]
    if todo:
        rows = sum(shard.num_rows for shard in todo)
        verdict.todo.append(f"{len(todo):,} of {len(folder.shards):,} shards are not done ({rows:,} input rows)")
    new = {shard.data_path for shard in folder.shards if shard.data_path in infos} - named
    if folder.is_settled and new and folder.manifest["rows"]["is_complete"]:
        url = folder.storage.url(min(new))
        verdict.findings.append(Finding(url, "is not named in manifest.json", RERUN))


def _check_totals(folder: Folder, facts: list[FileFacts], verdict: Verdict) -> None:
    """Input rows x n = output = ok + error, as the manifest counts them: over the first shards, as many as were wanted.
    Not where a file has a finding of its own already."""
    rows = {fact.path: fact.rows for fact in facts if fact.rows is not None and not fact.faults}
    named = {entry["path"] for entry in folder.manifest.get("files", [])}
    if not folder.is_settled or not folder.shards or named - rows.keys():
        return
    said = folder.manifest["rows"]
    position, num_ok, num_error = 0, 0, 0
    for shard in folder.shards:
        if position >= said["input"]:
            break
        position += shard.num_rows
        if shard.data_path in named:  # else it was committed behind the back of the run that wrote the manifest
            check = rows[shard.data_path]
            num_ok, num_error = num_ok + check.num_ok, num_error + check.num_error
    have = {"input": position, "output": num_ok + num_error, "ok": num_ok, "error": num_error}
    wrong = [f"{name} {said[name]} where there are {count}" for name, count in have.items() if said[name] != count]
    if wrong:
        url = folder.storage.url(MANIFEST)
        verdict.findings.append(Finding(url, f"counts rows that are not there: {', '.join(wrong)}", RERUN))


# ---- keys and batches ------------------------------------------------------------------------------------------------


def _check_keys(folder: Folder, facts: list[FileFacts], verdict: Verdict) -> None:
    if folder.spec is None or folder.spec.input.custom_id is None:
        return
    if not folder.facts.get("is_unique_checked"):
        verdict.notes.append("custom_id was not checked to be unique when the job began, so it is not now")
        return
    keys = KeyCheck()
    for fact in facts:
        if fact.rows is not None:
            keys.add(fact.rows.hashes)
            del fact.rows.hashes[:]  # held once is enough
    if suspects := keys.list_suspects():
        whole = [fact for fact in facts if not fact.faults]
        for place, first in confirm_repeated(_read_suspects(folder, whole, suspects)):
            verdict.findings.append(Finding(place, f"has the custom_id of {first}", AGAIN))


def _read_suspects(folder: Folder, facts: list[FileFacts], suspects: set[int]) -> Iterator[tuple[str, str]]:
    """(key, place) of the rows with these hashes."""
    for fact in facts:
        url = folder.storage.url(fact.path)
        with folder.storage.open_read(fact.path) as source:
            rows = read_table(source, columns=["custom_id", "source_row", "sample_index"]).to_pylist()
        for row in rows:
            if row["sample_index"] == 0 and row["custom_id"] is not None and hash(row["custom_id"]) in suspects:
                yield row["custom_id"], f"{url} row {row['source_row']}"


def _check_stats(folder: Folder, facts: list[FileFacts], verdict: Verdict) -> None:
    """Only batches of shards that the last ended run knew: what is newer gets its line when a run ends."""
    if not folder.manifest or any(path.startswith(STATS_FOLDER) for path in folder.damaged):
        return
    try:
        table = read_stats_table(folder.storage)
    except OutputError as error:
        verdict.findings.append(split_error(error, STATS_MEND))
        return
    found: dict[str, tuple[int, int]] = {}
    named = {entry["path"] for entry in folder.manifest["files"]}
    for fact in facts:
        if fact.rows is None or fact.faults or fact.is_newer or fact.path not in named:
            continue
        for batch_id, (ok, tokens) in fact.rows.batches.items():
            known = found.get(batch_id, (0, 0))
            found[batch_id] = (known[0] + ok, known[1] + tokens)
    columns = ["batch_id", "num_rows_ok", "completion_tokens", "num_rows_copied"]
    for fault in check_batches(table.select(columns).to_pylist(), found, is_exact=folder.is_settled):
        verdict.findings.append(Finding(folder.storage.url(STATS_FOLDER), fault, STATS_MEND))


# ---- the input -------------------------------------------------------------------------------------------------------


def _check_input(folder: Folder, spec: JobSpec, verdict: Verdict) -> None:
    """Are the input files and the tokenizer still those that were planned?"""
    mend = "restore it, or start a new output.path: a run of this job would refuse it"
    try:
        found = [(info.path, info.version) for info in find_inputs(spec)]
    except InputError as error:
        found = []
        verdict.notes.append(f"the input can't be listed: {error}")
    missing, changed, new = list_changes(folder.files, found)
    verdict.findings += [Finding(path, "was planned and is gone", mend) for path in missing]
    verdict.findings += [Finding(path, "was changed since it was planned", mend) for path in changed]
    if new:
        verdict.notes.append(f"{len(new):,} new input files are not part of this job")
    planned, current = folder.facts.get("tokenizer_sha256"), digest_tokenizer(spec)
    if planned is not None and current not in (None, planned):
        what = "its tokenizer files are not those that the job began with"
        verdict.findings.append(Finding(spec.model.path, what, "restore them, or start a new output.path"))


# ---- the end ---------------------------------------------------------------------------------------------------------


def _sum_up(folder: Folder, facts: list[FileFacts], verdict: Verdict) -> None:
    if folder.is_held and folder.holder is not None:
        verdict.todo.append(f"a run may be working on it: {folder.holder.describe()}")
    elif not folder.is_settled:
        verdict.todo.append("its last run ended without a word; run the job again")
    elif folder.manifest.get("is_trial"):
        verdict.todo.append("its last run was a trial (--limit); run the job without it")
    num_unsealed = sum(not fact.is_sealed for fact in facts)
    if num_unsealed or folder.unsealed:
        named = ", ".join(folder.unsealed) or "no other file"
        verdict.notes.append(
            f"{num_unsealed:,} shard files and {named} were written by an earlier version, without digests: of these, "
            "only what can be decoded and counted was checked"
        )
    checks = [fact.rows for fact in facts if fact.rows is not None]
    verdict.counts = {
        "shards": len(folder.shards),
        "files": len(facts),
        "rows_ok": sum(check.num_ok for check in checks),
        "rows_error": sum(check.num_error for check in checks),
        "files_without_digest": num_unsealed,
    }
