"""A report of any output folder as it is now: of a job that finished, stopped, still runs, or was killed.

Reads what is written about rows, never rows: the spec, batch_stats, records of runs and, of shards that no run has
finished with yet, their footers. (Unless some generations are asked for: `generations`.) Writes nothing.
"""

import time
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from batchgen import manifest
from batchgen.batch_stats import make_stats_table, read_stats_table
from batchgen.driver.control import find_lock
from batchgen.driver.lease import read_live_holder
from batchgen.errors import OutputError
from batchgen.report.figures import RunRecord
from batchgen.report.generations import read_generations
from batchgen.report.records import REPORT_JSON, read_records
from batchgen.report.value import make_report, make_row_counts
from batchgen.spec import JobSpec
from batchgen.storage import Storage
from batchgen.verify.damage import RESTORE


def read_report(storage: Storage, *, num_generations: int = 0) -> dict[str, Any]:
    """As of now. Raises OutputError where no run has worked on the folder."""
    return _make(storage, *_read_said(storage), num_generations)


def find_report(storage: Storage) -> dict[str, Any]:
    """The report that the last run left; made anew where a later run has not ended yet, or left none."""
    saved, records = _read_said(storage)
    return saved if saved is not None else _make(storage, saved, records, 0)


def _read_said(storage: Storage) -> tuple[dict[str, Any] | None, list[RunRecord]]:
    """(the report that the last run left, None where it has not ended or left none; records of all runs)."""
    records, saved = read_records(storage), manifest.read_json(storage, REPORT_JSON)
    last = records[-1]["epoch"] if records else 0
    return (saved if saved is not None and saved.get("epoch", 0) >= last else None), records


def _make(
    storage: Storage, saved: dict[str, Any] | None, records: list[RunRecord], num_generations: int
) -> dict[str, Any]:
    facts = manifest.read_json(storage, manifest.SPEC)
    if facts is None:
        raise OutputError(f"{storage.root}: holds no job of batchgen; give the output.path of one")
    record = records[-1] if records else None
    spec = _read_spec(storage, saved or record or facts, facts)
    committed = {} if saved and not num_generations else manifest.load_committed(storage, spec.fingerprint())
    found = make_report(
        spec,
        saved["rows"] if saved else _count_rows(storage, spec, committed, record),
        read_stats_table(storage) if saved else read_all_batches(storage, committed),
        records,
        made_at=time.time(),
        is_unique_checked=facts.get("is_unique_checked"),
        generations=read_generations(storage, committed.values(), spec.fingerprint(), num_generations)
        if num_generations
        else (),
        gates=saved.get("gates") if saved else None,
        **_find_state(storage, saved, record),
    )
    ended = {"exit_code": saved["exit_code"]} if saved and "exit_code" in saved else {}  # what only a run's end knows
    return found | ended | {"output": storage.root}


def _find_state(storage: Storage, saved: RunRecord | None, record: RunRecord | None) -> dict[str, Any]:
    """Of a run that did not end with a word, or never came to one, it is asked whether somebody still holds the folder."""
    said = saved or record or {"epoch": 0, "state": "running", "message": None}
    state, message = said["state"], said["message"]
    if state == "running" and read_live_holder(find_lock(storage)) is None:
        state, message = "killed", "it ended without a word; start it again, and it goes on"
    return {"epoch": said["epoch"], "state": state, "message": message}


def _count_rows(
    storage: Storage, spec: JobSpec, committed: dict[int, manifest.CommittedShard], record: RunRecord | None
) -> dict[str, Any]:
    """Against what the last run was asked for; all that is planned where it left no word of it."""
    footers = [shard.footer for shard in committed.values()]
    if record is not None and "num_input_rows" in record:
        return make_row_counts(spec, footers, int(record["num_input_rows"]))
    plan = manifest.read_plan(storage)
    return make_row_counts(spec, footers, sum(shard.num_rows for shard in plan[2]) if plan is not None else 0)


def _read_spec(storage: Storage, said: RunRecord, frozen: RunRecord) -> JobSpec:
    """As the last run had it: what doesn't make the data may change from run to run."""
    try:
        return JobSpec.model_validate(said["spec"] if "spec" in said else frozen["spec"])
    except (KeyError, ValidationError) as error:
        raise OutputError(
            f"{storage.url(manifest.SPEC)}: is no spec that this version of batchgen reads; {RESTORE}"
        ) from error


def read_batches(storage: Storage) -> pa.Table:
    """All that are known, of a run that goes on too. Raises OutputError where no run has worked on the folder."""
    facts = manifest.read_json(storage, manifest.SPEC)
    if facts is None:
        raise OutputError(f"{storage.root}: holds no job of batchgen; give the output.path of one")
    return read_all_batches(storage, manifest.load_committed(storage, facts["fingerprint"]))


def read_all_batches(storage: Storage, committed: dict[int, manifest.CommittedShard]) -> pa.Table:
    """Those of batch_stats, and of the shards committed since it was written."""
    table = read_stats_table(storage)
    footers = (batch for shard in committed.values() for batch in shard.footer.batches)
    newer = make_stats_table({batch.batch_id: batch for batch in footers}.values())
    is_known = pc.is_in(newer["batch_id"], value_set=table["batch_id"].combine_chunks())
    return pa.concat_tables([table, newer.filter(pc.invert(is_known))])
