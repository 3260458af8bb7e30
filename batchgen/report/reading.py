"""A report of any output folder as it is now: of a job that finished, stopped, still runs, or was killed.

Reads what is written about rows, never rows: the spec, batch_stats, records of runs and, of shards that no run has
finished with yet, their footers. (Unless some generations are asked for: `samples`.) Writes nothing.
"""

import time
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from batchgen import manifest
from batchgen.batch_stats import make_stats_table, read_stats_table
from batchgen.errors import OutputError
from batchgen.report.records import REPORT_JSON, read_records
from batchgen.report.samples import read_samples
from batchgen.report.value import make_report, make_row_counts
from batchgen.spec import JobSpec
from batchgen.storage import Storage
from batchgen.verify.damage import RESTORE


def read_report(storage: Storage, *, num_samples: int = 0) -> dict[str, Any]:
    """As of now. Raises OutputError where no run has worked on the folder."""
    facts = manifest.read_json(storage, manifest.SPEC)
    if facts is None:
        raise OutputError(f"{storage.root}: holds no job of batchgen; give the output.path of one")
    spec = _read_spec(storage, facts)
    records = read_records(storage)
    saved = manifest.read_json(storage, REPORT_JSON) or {}
    last = max((record["epoch"] for record in records), default=0)
    is_ended = saved.get("epoch", -1) >= last
    committed = {} if is_ended and not num_samples else manifest.load_committed(storage, spec.fingerprint())
    rows = (
        saved["rows"]
        if is_ended
        else make_row_counts(spec, [shard.footer for shard in committed.values()], _count_input(storage, saved))
    )
    record = next((found for found in records if found["epoch"] == last), None)
    found = make_report(
        spec,
        rows,
        read_stats_table(storage) if is_ended else read_all_batches(storage, committed),
        records,
        epoch=max(last, saved.get("epoch", 0)),
        state=saved["state"] if is_ended else record["state"] if record else "running",
        message=saved.get("message") if is_ended else record["message"] if record else None,
        made_at=time.time(),
        is_unique_checked=facts.get("is_unique_checked"),
        samples=read_samples(storage, committed.values(), spec.fingerprint(), num_samples) if num_samples else (),
    )
    kept = {name: saved[name] for name in ("exit_code",) if is_ended and name in saved}
    return found | kept | {"output": storage.root}


def _read_spec(storage: Storage, facts: dict[str, Any]) -> JobSpec:
    try:
        return JobSpec.model_validate(facts["spec"])
    except (KeyError, ValidationError) as error:
        raise OutputError(
            f"{storage.url(manifest.SPEC)}: is no spec that this version of batchgen reads; {RESTORE}"
        ) from error


def _count_input(storage: Storage, saved: dict[str, Any]) -> int:
    """Rows that the plan covers. (A trial's limit is not known here: what is planned counts.)"""
    plan = manifest.read_plan(storage)
    known = saved.get("rows", {}).get("input", 0)
    return sum(shard.num_rows for shard in plan[2]) if plan is not None else int(known)


def read_all_batches(storage: Storage, committed: dict[int, manifest.CommittedShard]) -> pa.Table:
    """Those of batch_stats, and of the shards committed since it was written."""
    table = read_stats_table(storage)
    footers = (batch for shard in committed.values() for batch in shard.footer.batches)
    newer = make_stats_table({batch.batch_id: batch for batch in footers}.values())
    is_known = pc.is_in(newer["batch_id"], value_set=table["batch_id"].combine_chunks())
    return pa.concat_tables([table, newer.filter(pc.invert(is_known))])


def find_report(storage: Storage) -> dict[str, Any]:
    """The report that the last run left; made anew where a later run has not ended yet, or left none."""
    saved = manifest.read_json(storage, REPORT_JSON)
    last = max((record["epoch"] for record in read_records(storage)), default=0)
    if saved is not None and saved.get("epoch", 0) >= last:
        return saved
    return read_report(storage)
