"""`report.html` while a run goes on: whoever opens it in the morning sees how far it came, even of a driver that died.

The page is made and written by a thread of its own, out of what the loop hands it at one instant: the loop copies two
dictionaries and goes on lending, however many batches there are and however slow the store is (9.4 s of making at 10^7
rows). Written through a fence, so that a driver that wakes up too late spoils no successor's page; `report.json` waits for
the run's end. The next page waits for PATIENCE times what this one took. A store that fails keeps the page it has.
"""

import math
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from batchgen import manifest
from batchgen.batch_stats import make_stats_table
from batchgen.batches import BatchStats
from batchgen.driver.dispatch import Dispatcher
from batchgen.driver.fence import Fence
from batchgen.driver.hold import Hold
from batchgen.driver.job import Job
from batchgen.driver.run_record import RunRecorder
from batchgen.errors import LeaseLost, StorageError
from batchgen.gates.decide import make_gate_report
from batchgen.gates.watch import GateWatch
from batchgen.logs import name_fault
from batchgen.manifest import CommittedShard
from batchgen.report.page import make_html
from batchgen.report.records import REPORT_HTML, read_records
from batchgen.report.value import make_report, make_row_counts

INTERVAL_S = 60.0
# A page costs at most one part in so many of the driver's time.
PATIENCE = 300.0


@dataclass(frozen=True, slots=True)
class Instant:
    """The run as it was when a page was asked for. What it refers to is never changed, only replaced."""

    record: Mapping[str, Any]
    committed: Mapping[int, CommittedShard]
    batches: dict[str, BatchStats]
    gates: dict[str, Any]


class LivePage:
    """Of one run. `update` at every turn of its loop; after `close` it writes nothing any more."""

    def __init__(self, job: Job, hold: Hold, recorder: RunRecorder, gates: GateWatch) -> None:
        self._job, self._hold, self._recorder, self._gates = job, hold, recorder, gates
        self._fence: Fence | None = None
        # When the next page is due: never while one is under way, nor after a fault.
        self._next = time.monotonic() + INTERVAL_S
        self._fault: Exception | None = None
        # Held while a page is written: the run's last words must come after it.
        self._writing = threading.Lock()
        self._is_over = False

    def update(self, dispatcher: Dispatcher) -> None:
        """Has a page made, if it is time and none is under way. Raises LeaseLost where a thread found the folder to be
        another run's."""
        fault, self._fault = self._fault, None
        if isinstance(fault, LeaseLost):
            raise fault
        if fault is not None:
            self._next = math.inf
            dispatcher.on_warning(f"report.html is not kept up until the run ends: {name_fault(fault)}")
        if time.monotonic() < self._next or not self._recorder.record:
            return
        self._next = math.inf
        threading.Thread(target=self._work, args=(self._look(dispatcher),), name="live-page", daemon=True).start()

    def close(self) -> None:
        """Waits for a page that is being written, not for one that is still being made: that one is dropped."""
        with self._writing:
            self._is_over = True

    def _look(self, dispatcher: Dispatcher) -> Instant:
        return Instant(
            self._recorder.record,
            {**self._job.committed, **dispatcher.ledger.committed},
            dict(dispatcher.ledger.batches),
            make_gate_report(self._job.spec.gates, self._gates.failed, dict(self._gates.seen)),
        )

    # ---- in the thread -----------------------------------------------------------------------------------------------

    def _work(self, instant: Instant) -> None:
        fault: Exception | None = None
        started = time.monotonic()
        try:
            with suppress(StorageError):  # what the page before said still stands, and the next one tries again
                self._write(self._make(instant).encode())
        # A thread has nobody above it: the loop tells it. A page that can't be drawn is no reason to end a run.
        except Exception as error:  # noqa: BLE001
            fault = error
        now = time.monotonic()
        self._next = now + max(INTERVAL_S, PATIENCE * (now - started))
        self._fault = fault

    def _write(self, page: bytes) -> None:
        with self._writing:
            if self._is_over:
                return
            if self._fence is None:
                self._fence = Fence(self._job.storage, (REPORT_HTML,), self._hold.check_lease)
            self._fence.put(REPORT_HTML, page)

    def _make(self, instant: Instant) -> str:
        job, record, committed, batches = self._job, instant.record, instant.committed, instant.batches
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
            gates=instant.gates,
        )
        return make_html(report)
