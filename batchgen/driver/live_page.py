"""`report.html` while a run goes on: whoever opens it in the morning sees how far it came, even of a driver that died.

Written through a fence, so that a driver that wakes up too late spoils no successor's page; `report.json` waits for the
run's end. Making a page takes longer the more batches there are, so the next one waits for PATIENCE times that.
"""

import time

from batchgen import manifest
from batchgen.batch_stats import make_stats_table
from batchgen.batches import BatchStats
from batchgen.driver.dispatch import Dispatcher
from batchgen.driver.fence import Fence
from batchgen.driver.hold import Hold
from batchgen.driver.job import Job
from batchgen.driver.run_record import RunRecorder
from batchgen.report.page import make_html
from batchgen.report.records import REPORT_HTML, read_records
from batchgen.report.value import make_report, make_row_counts

INTERVAL_S = 60.0
# A page costs at most one part in so many of the driver's time.
PATIENCE = 300.0


class LivePage:
    """Of one run. `update` at every turn of its loop."""

    def __init__(self, job: Job, hold: Hold, recorder: RunRecorder) -> None:
        self._job, self._hold, self._recorder = job, hold, recorder
        self._fence: Fence | None = None
        self._next = time.monotonic() + INTERVAL_S

    def update(self, dispatcher: Dispatcher) -> None:
        """Raises LeaseLost where the folder is another run's, and StorageError."""
        started = time.monotonic()
        if started < self._next or not self._recorder.record:
            return
        page = self._make(dispatcher)
        if self._fence is None:
            self._fence = Fence(self._job.storage, (REPORT_HTML,), self._hold.check_lease)
        self._fence.put(REPORT_HTML, page.encode())
        now = time.monotonic()
        self._next = now + max(INTERVAL_S, PATIENCE * (now - started))

    def _make(self, dispatcher: Dispatcher) -> str:
        job, record = self._job, self._recorder.record
        committed = {**job.committed, **dispatcher.ledger.committed}
        batches: dict[str, BatchStats] = dict(dispatcher.ledger.batches)
        for shard in committed.values():
            manifest.add_batches(batches, shard.footer.batches)
        wanted = [committed[shard.number].footer for shard in job.wanted if shard.number in committed]
        earlier = [found for found in read_records(job.storage) if found["epoch"] != record["epoch"]]
        report = make_report(
            job.spec,
            make_row_counts(job.spec, wanted, job.num_wanted_rows),
            make_stats_table(batches.values()),
            [*earlier, record],
            epoch=record["epoch"],
            state="running",
            message=None,
            made_at=time.time(),
            is_unique_checked=job.is_unique_checked,
        )
        return make_html(report)
