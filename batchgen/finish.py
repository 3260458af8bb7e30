"""The end of a run: stats, footers' copy, report, manifest, and last of all `_SUCCESS`.

Called for a finished and for a stopped run, by the holder of the lease only. `_SUCCESS` says that every input row is in
the output and that no more than `retry.max_error_rate` of the rows are errors.
"""

import time
from typing import Any

from batchgen import manifest
from batchgen.control import StatusWriter, read_lost_batches
from batchgen.dispatch import Dispatcher
from batchgen.hold import Hold
from batchgen.job import Job
from batchgen.records import BatchStats
from batchgen.report import make_report, write_report


def finish(
    job: Job, dispatcher: Dispatcher | None, hold: Hold, *, message: str | None = None, is_trial: bool = False
) -> dict[str, Any]:
    """Write everything that is written last; the report. `dispatcher` is None when nothing was left to do. Raises
    LeaseLost when the folder is not ours any more."""
    spec, storage, epoch = job.spec, job.storage, hold.epoch
    hold.check_lease()
    committed = {**job.committed, **(dispatcher.committed if dispatcher else {})}
    batches: dict[str, BatchStats] = dict(dispatcher.batches) if dispatcher else {}
    for shard in committed.values():
        manifest.add_batches(batches, shard.footer.batches)
    manifest.add_batches(batches, read_lost_batches(storage))
    manifest.write_batch_stats(storage, epoch, batches)
    manifest.add_batches(batches, manifest.read_batch_stats(storage))  # what earlier runs lost is in no file of data/
    manifest.write_committed(storage, committed.values())
    report = make_report(
        spec,
        list(committed.values()),
        batches.values(),
        epoch=epoch,
        state="stopped" if message else "finished",
        message=message,
        num_input_rows=job.plan.num_rows if spec.input.limit is None else min(spec.input.limit, job.plan.num_rows),
        num_planned_rows=job.plan.num_planned_rows,
        elapsed_s=dispatcher.make_progress().elapsed_s if dispatcher else 0.0,
        is_unique_checked=job.is_unique_checked,
    )
    report["exit_code"] = choose_exit_code(report, spec.retry.max_error_rate)
    report["output"] = storage.root
    write_report(storage, report, spec)
    made = manifest.make_manifest(
        committed.values(),
        fingerprint=spec.fingerprint(),
        epoch=epoch,
        num_rows=job.plan.num_rows,
        n=spec.sampling.n,
    )
    manifest.write_json(storage, "manifest.json", made)
    if dispatcher is not None:
        StatusWriter(storage, epoch, 0.0).update(dispatcher, state=report["state"], message=message)
    hold.check_lease()
    if report["exit_code"] == 0 and report["rows"]["is_complete"] and not is_trial:
        manifest.write_json(storage, manifest.SUCCESS, {"epoch": epoch, "made_at": time.time()})
    return report


def choose_exit_code(report: dict[str, Any], max_error_rate: float) -> int:
    """0 done within the error rate, 1 done with too many errors, 3 stopped and resumable."""
    if report["state"] == "stopped":
        return 3
    rate = report["rows"]["error_rate"]
    return 1 if rate is not None and rate > max_error_rate else 0
