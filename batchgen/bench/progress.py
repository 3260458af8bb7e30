"""What watching a run costs of its CPU time: the screen, the status object, the run's record and its live page.

A whole job in this process, Parquet to Parquet, drawn to a terminal of the kind that `batchgen run` draws to, its bytes
thrown away. What is timed is CPU time of the thread that does it, in the run's own calls; the time that timing takes is
counted as watching's. Metrics are in it: what the worker counts of its rows, and what driver and worker tell Ray, which is
started for that; the threads in which Ray passes it on are told apart, for they work for Ray's own metrics too.
"""

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from batchgen.bench.saturation import check, write_input
from batchgen.driver import live_page
from batchgen.driver import run as driver_run
from batchgen.driver.live_page import LivePage
from batchgen.driver.run import run_job
from batchgen.driver.run_record import RunRecorder
from batchgen.driver.view import RichView
from batchgen.driver.watch import Watch
from batchgen.metrics import Meter
from batchgen.queue.events import Heartbeat, PoolEvent
from batchgen.spec import ClusterSpec
from batchgen.specs.load import make_spec
from batchgen.worker.worker import Worker, WorkerSetup

# Where the run calls what watches it.
WATCHERS: tuple[tuple[type, str], ...] = (
    (Watch, "show"),
    (RunRecorder, "update"),
    (RunRecorder, "close"),
    (LivePage, "update"),
    (LivePage, "_work"),
    (Meter, "note"),
)


def measure_progress(
    folder: str, num_rows: int, *, tokens_per_s: float | None, page_s: float, has_metrics: bool = True
) -> dict[str, float]:
    """`tokens_per_s`: of each request, in real time; None: an engine without latency, so that everything else takes as
    little as it can. `page_s`: a live page so often, at most. `has_metrics`: they are told to a Ray that is started here.
    Shares are of the process's CPU time, and of one core."""
    write_input(folder, pa.table({"prompt": [f"question number {row}" for row in range(num_rows)]}), 10_000)
    engine: dict[str, Any] = {"kind": "simulated", "mean_tokens": 32, "has_latency": tokens_per_s is not None}
    if tokens_per_s is not None:
        engine["decode_tokens_per_s"] = tokens_per_s
    spec = make_spec(
        {
            "input": {"paths": [f"{folder}/in.parquet"]},
            "prompt": {"column": "prompt", "chat": False},
            "engine": engine,
            "output": {"path": f"{folder}/out", "rows_per_shard": 10_000},
            "cluster": {"pool": "inline"},
        }
    )
    exporting: AbstractContextManager[dict[str, float]] = export_metrics() if has_metrics else nullcontext({})
    with Path(os.devnull).open("w") as nowhere, counting(page_s) as spent, exporting as exported:
        view = RichView(Console(file=nowhere, force_terminal=True, width=120, height=40))
        native, cpu, wall = read_native_cpu_s(), time.process_time(), time.perf_counter()
        with view:
            check(run_job(spec, view), num_rows)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        native = read_native_cpu_s() - native
    spent |= exported
    watched = sum(spent.values())
    return {
        "run_s": wall,
        "run_cpu_s": cpu,
        "progress_cpu_s": watched,
        "share_of_cpu": watched / cpu,
        "share_of_a_core": watched / wall,
        "page_cpu_s": spent["LivePage._work"],
        "note_cpu_s": spent["Meter.note"],
        "worker_metrics_cpu_s": exported.get("Worker.poll", 0.0),
        "native_threads_cpu_s": native,
    }


@contextmanager
def counting(page_s: float) -> Iterator[dict[str, float]]:
    """CPU seconds by call, while the block runs: the classes' own methods, wrapped."""
    spent: dict[str, float] = {f"{owner.__name__}.{name}": 0.0 for owner, name in WATCHERS}
    with ExitStack() as stack:
        stack.enter_context(_replaced(live_page, "INTERVAL_S", page_s))
        for owner, name in WATCHERS:
            timed = _timed(getattr(owner, name), f"{owner.__name__}.{name}", spent)
            stack.enter_context(_replaced(owner, name, timed))
        yield spent


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


def _timed(method: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        try:
            return method(*args, **kwargs)
        finally:
            spent[name] += time.thread_time() - started

    return call


@contextmanager
def export_metrics() -> Iterator[dict[str, float]]:
    """Driver and worker tell a Ray of this process's own what they tell on Ray (`ray_pool.WorkerActor.poll`). CPU seconds
    of the worker's part; the driver's is in `Watch.show`."""
    from batchgen.ray_metrics import RayExporter
    from batchgen.ray_pool import EXPORT_S, connect

    connect(ClusterSpec(address="local"))
    real_poll, exporter = Worker.poll, RayExporter({"run": "bench", "worker": "worker"})
    spent, export_at = {"Worker.poll": 0.0}, 0.0

    def create_publisher(setup: WorkerSetup) -> Any:
        return RayExporter({"run": setup.run_name}).export

    async def poll(worker: Worker, timeout_s: float) -> list[PoolEvent]:
        nonlocal export_at
        worker.meter.is_wanted = True
        events = await real_poll(worker, timeout_s)
        started = time.thread_time()
        if (now := time.monotonic()) >= export_at and isinstance(beat := events[-1], Heartbeat):
            export_at = now + EXPORT_S
            exporter.export(worker.meter.take(beat, worker.info.window))
        spent["Worker.poll"] += time.thread_time() - started
        return events

    with _replaced(driver_run, "create_publisher", create_publisher), _replaced(Worker, "poll", poll):
        yield spent


def read_native_cpu_s() -> float:
    """Of threads of this process that are not Python's: where Ray is loaded, mostly Ray's."""
    ours = {thread.native_id for thread in threading.enumerate()}
    ticks = 0
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) in ours:
            continue
        try:
            fields = (task / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
