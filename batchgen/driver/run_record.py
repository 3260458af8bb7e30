"""What a run was and how it went, for the report: `_batchgen/runs/run-EPOCH.json`, one small object a run.

Rewritten now and then by its own driver alone, so that of a killed run all but the last half minute is known, and left
standing by later runs: a job's GPU-hours are the sum over its runs. No row and no batch is in it. A store that fails now
keeps what it has.
"""

import contextlib
import dataclasses
import functools
import platform
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from batchgen import __version__
from batchgen.driver.dispatch import Dispatcher
from batchgen.errors import StorageError
from batchgen.queue.progress import Progress
from batchgen.queue.roster import Roster
from batchgen.queue.timeline import SPAN_FIELDS, Moment, Timeline
from batchgen.report.records import make_record_path
from batchgen.spec import JobSpec
from batchgen.storage import Storage
from batchgen.worker.seal import seal_json

FORMAT_VERSION = 1
INTERVAL_S = 30.0
# Counting who is busy looks at every worker.
BUSY_INTERVAL_S = 0.5


class RunRecorder:
    """Of one run. `update` at every turn of its loop, `close` at its end."""

    def __init__(self, storage: Storage, spec: JobSpec, epoch: int, length_prior: str | None = None) -> None:
        """`length_prior`: the output folder whose measured lengths are expected."""
        self._storage, self._epoch = storage, epoch
        self._facts = {**make_run_facts(spec), "length_prior": length_prior}
        self._timeline = Timeline(time.monotonic())
        self._began_at = time.time()
        self._record: dict[str, Any] = {}
        self._next = self._next_busy = 0.0
        self._num_busy = 0

    def update(self, dispatcher: Dispatcher, progress: Progress) -> bool:
        """Notes how it is now; True when it was also written down: each time the run is twice as old, then every half
        minute."""
        now = time.monotonic()
        if now >= self._next_busy:
            self._next_busy = now + BUSY_INTERVAL_S
            self._num_busy = sum(worker.is_busy for worker in dispatcher.queue.look_at_workers())
        moment = make_moment(dispatcher, progress, self._num_busy)
        if not self._record:  # what the first turn did counts, too
            before = replace(moment, num_rows=progress.num_rows_done_before, num_errors=0, num_tokens=0)
            self._timeline.turn(before, self._timeline.began)
        self._timeline.turn(moment, now)
        if now < self._next:
            return False
        self._next = now + min(INTERVAL_S, max(1.0, now - self._timeline.began))
        self._record = self._make(dispatcher, now, "running", None)
        self._write()
        return True

    def close(self, dispatcher: Dispatcher, message: str | None) -> dict[str, Any]:
        """The last word, written down; the record."""
        now = time.monotonic()
        self._num_busy = sum(worker.is_busy for worker in dispatcher.queue.look_at_workers())
        self._timeline.turn(make_moment(dispatcher, dispatcher.make_progress(), self._num_busy), now)
        self._record = self._make(dispatcher, now, "stopped" if message else "finished", message)
        self._write()
        return self._record

    @property
    def record(self) -> dict[str, Any]:
        """As last written."""
        return self._record

    def _write(self) -> None:
        with contextlib.suppress(StorageError):  # a report with a gap is no reason to stop a run
            self._storage.put(make_record_path(self._epoch), seal_json(self._record))

    def _make(self, dispatcher: Dispatcher, now: float, state: str, message: str | None) -> dict[str, Any]:
        timeline, roster = self._timeline, dispatcher.roster
        return {
            "format_version": FORMAT_VERSION,
            "epoch": self._epoch,
            "state": state,
            "message": message,
            "began_at": self._began_at,
            "elapsed_s": now - timeline.began,
            **self._facts,
            "num_input_rows": dispatcher.num_rows,
            "num_tokens": timeline.total.tokens,
            "worker_s": roster.count_worker_s(now),
            "startup_s": roster.count_startup_s(now),
            "total": dataclasses.asdict(timeline.total),
            "tail": {"began_s": timeline.tail_began_s, **dataclasses.asdict(timeline.tail)},
            "bin_s": timeline.bin_s,
            "bins": {name: [_round(getattr(span, name)) for span in timeline.bins] for name in SPAN_FIELDS},
            "workers": list_lives(roster, timeline.began),
        }


def make_moment(dispatcher: Dispatcher, progress: Progress, num_busy: int) -> Moment:
    return Moment(
        num_rows=progress.num_rows_done,
        num_errors=progress.num_rows_error,
        num_tokens=progress.num_tokens,
        num_starting=progress.num_starting,
        num_ready=progress.num_workers,
        num_busy=num_busy,
        num_inflight=progress.num_inflight,
        window=progress.window,
        has_waiting=dispatcher.queue.num_waiting > 0,
    )


def make_run_facts(spec: JobSpec) -> dict[str, Any]:
    """What ran, where: versions and cluster. Unknown is null."""
    cluster = spec.cluster
    return {
        "versions": {
            "batchgen": __version__,
            "python": platform.python_version(),
            "pyarrow": _find_version("pyarrow"),
            "ray": _find_version("ray") if cluster.pool == "ray" else None,
        },
        "cluster": {
            "pool": cluster.pool,
            "workers_min": cluster.workers.min,
            "workers_max": cluster.workers.max,
            "gpus_per_worker": cluster.gpus_per_worker,
            "cpus_per_worker": cluster.cpus_per_worker,
            "driver_node": platform.node(),
        },
        "engine": spec.engine.kind,
        "window": spec.engine.max_inflight,
        "gpu_hour_cost": cluster.gpu_hour_cost,
        "spec": spec.model_dump(mode="json"),
    }


@functools.cache  # what a process has loaded stays; the package's files are read anew each time
def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def list_lives(roster: Roster, began: float) -> list[dict[str, Any]]:
    """Seconds are since the run began."""

    def since(at: float | None) -> float | None:
        return None if at is None else _round(at - began)

    return [
        {
            "worker": life.worker_id,
            "node": life.info and life.info.node,
            "engine_version": life.info and life.info.engine_version,
            "window": life.info and life.info.window,
            "began_s": since(life.began),
            "ready_s": since(life.ready),
            "ended_s": since(life.ended),
            "end": life.end,
        }
        for life in roster.lives.values()
    ]


def _round(value: float) -> float:
    return round(value, 3)
