"""The end of a run: stats, footers' copy, report, manifest, and last of all `_SUCCESS`.

Called for a finished and for a stopped run, by the holder of the lease only. `_SUCCESS` says that every input row is in
the output and that no more than `retry.max_error_rate` of the rows are errors.
"""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from batchgen import manifest
from batchgen.batch_stats import make_stats_table, read_batch_stats, write_batch_stats
from batchgen.batches import BatchStats
from batchgen.driver.control import read_lost_batches, write_status
from batchgen.driver.dispatch import Dispatcher
from batchgen.driver.fence import Fence, Put
from batchgen.driver.hold import Hold
from batchgen.driver.inventory import MANIFEST, REWRITTEN, write_manifest
from batchgen.driver.job import Job
from batchgen.gates.decide import EXIT_CODE, make_gate_report
from batchgen.gates.watch import GateWatch, tell
from batchgen.length_files import write_lengths
from batchgen.manifest import CommittedShard
from batchgen.queue.pulse import Snapshot
from batchgen.report.generations import read_generations
from batchgen.report.page import make_html
from batchgen.report.records import REPORT_HTML, REPORT_JSON, read_records
from batchgen.report.value import make_report, make_row_counts
from batchgen.storage import Storage
from batchgen.worker.seal import seal_json

# What the gates saw and what failed, as `gates` in the report.
GATES = "_batchgen/gates.json"


def finish(
    job: Job,
    dispatcher: Dispatcher | None,
    hold: Hold,
    gates: GateWatch,
    *,
    message: str | None = None,
    is_trial: bool = False,
    last: Snapshot | None = None,
) -> dict[str, Any]:
    """Write everything that is written last; the report. `dispatcher` and `last`, how the run looked at its end, are None
    when nothing was left to do. Raises LeaseLost when the folder is not ours any more."""
    storage = job.storage
    fence = Fence(storage, (*REWRITTEN, MANIFEST, GATES, manifest.SUCCESS), hold.check_lease)
    own = dispatcher.ledger.committed if dispatcher else {}
    committed = {**job.committed, **own}
    batches, unsettled = settle_batches(job, dispatcher, committed, hold.check_lease)
    manifest.write_committed(fence.put, committed.values())
    write_lengths(storage, committed.values())
    wanted = [committed[shard.number] for shard in job.wanted if shard.number in committed]
    is_whole = message is None and len(wanted) == len(job.wanted) and not is_trial
    message = gates.judge_end(own, job.committed, is_whole=is_whole) or message
    failed = tell(gates.failed) if gates.failed else None
    num_generations = job.spec.output.report_rows
    counts = make_row_counts(job.spec, [shard.footer for shard in wanted], job.num_wanted_rows)
    report = make_report(
        job.spec,
        counts,
        make_stats_table(batches.values()),
        read_records(storage),
        epoch=hold.epoch,
        state="gate_failed" if failed else "stopped" if message else "finished",
        message=failed or message or tell_errors(counts, job.spec.retry.max_error_rate),
        made_at=time.time(),
        is_unique_checked=job.is_unique_checked,
        gates=make_gate_report(job.spec.gates, gates.failed, gates.seen),
        generations=read_generations(storage, wanted, job.spec.fingerprint(), num_generations)
        if num_generations
        else (),
    )
    report["exit_code"] = choose_exit_code(report, job.spec.retry.max_error_rate)
    report["output"] = storage.root
    if gates.seen or fence.has(GATES):  # what an earlier run wrote there is not true of this one
        fence.put(GATES, json.dumps(report["gates"]).encode())
    fence.put(REPORT_JSON, json.dumps(report, indent=1, ensure_ascii=False).encode())
    fence.put(REPORT_HTML, make_html(report).encode())
    write_manifest(storage, fence.put, job.spec, committed.values(), report, is_trial=is_trial)
    if last is not None:
        write_status(storage, hold.epoch, report["state"], last, unsettled, failed or message)
    hold.check_lease()
    mark_success(job, fence.put, report, hold.epoch, is_trial=is_trial)
    return report


def settle_batches(
    job: Job, dispatcher: Dispatcher | None, committed: Mapping[int, CommittedShard], check: Callable[[], None]
) -> tuple[dict[str, BatchStats], list[BatchStats]]:
    """(all batches that are known, those of them that batch_stats can't have yet). Writes batch_stats."""
    batches = dict(dispatcher.ledger.batches) if dispatcher else {}
    for shard in committed.values():
        manifest.add_batches(batches, shard.footer.batches)
    manifest.add_batches(batches, read_lost_batches(job.storage))
    unsettled = [batch for batch in batches.values() if not manifest.is_settled(batch, committed)]
    open_ids = {batch.batch_id for batch in unsettled}
    settled = {batch_id: batch for batch_id, batch in batches.items() if batch_id not in open_ids}
    write_batch_stats(job.storage, settled, check)
    manifest.add_batches(batches, read_batch_stats(job.storage))  # older losses are in no file of data/
    return batches, unsettled


def mark_success(job: Job, put: Put, report: dict[str, Any], epoch: int, *, is_trial: bool) -> None:
    """`_SUCCESS` there or not, as the report says. A trial that went well leaves it as it is."""
    if report["exit_code"] != 0 or not report["rows"]["is_complete"]:
        withdraw_success(job.storage)
    elif not is_trial:
        put(manifest.SUCCESS, seal_json({"epoch": epoch, "made_at": time.time()}))


def withdraw_success(storage: Storage) -> None:
    """Not asked for where there is none: a driver that is frozen just then would delete that of its successor."""
    if storage.info(manifest.SUCCESS) is not None:
        storage.delete(manifest.SUCCESS)


def tell_errors(rows: Mapping[str, Any], max_error_rate: float) -> str | None:
    """Why a run that got to its end is no success; None where it is one."""
    if not has_too_many_errors(rows, max_error_rate):
        return None
    return (
        f"{rows['error']:,} of {rows['output']:,} rows are errors, more than retry.max_error_rate "
        f"({max_error_rate:g}) allows: no _SUCCESS, exit code 1; each row's error_message says why; where that is as "
        "it should be, raise the rate and run again"
    )


def has_too_many_errors(rows: Mapping[str, Any], max_error_rate: float) -> bool:
    return rows["error_rate"] is not None and rows["error_rate"] > max_error_rate


def choose_exit_code(report: dict[str, Any], max_error_rate: float) -> int:
    """0 done within the error rate, 1 done with too many errors, 3 stopped and resumable, 4 a gate failed."""
    if report["state"] == "gate_failed":
        return EXIT_CODE
    if report["state"] == "stopped":
        return 3
    return 1 if has_too_many_errors(report["rows"], max_error_rate) else 0
