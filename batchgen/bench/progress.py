"""What watching a run costs of its CPU time: the screen, the status object, the run's record and its live page.

A whole job in this process, Parquet to Parquet, drawn to a terminal of the kind that `batchgen run` draws to, its bytes
thrown away. What is timed is CPU time of the thread that does it, in the run's own calls; the time that timing takes is
counted as watching's. Metrics go through Ray and are not in it.
"""

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from batchgen.bench.saturation import check, write_input
from batchgen.driver import live_page
from batchgen.driver.live_page import LivePage
from batchgen.driver.run import run_job
from batchgen.driver.run_record import RunRecorder
from batchgen.driver.view import RichView
from batchgen.driver.watch import Watch
from batchgen.specs.load import make_spec

# Where the run calls what watches it; the page's own thread last.
WATCHERS: tuple[tuple[type, str], ...] = (
    (Watch, "show"),
    (RunRecorder, "update"),
    (RunRecorder, "close"),
    (LivePage, "update"),
    (LivePage, "_work"),
)


def measure_progress(folder: str, num_rows: int, *, tokens_per_s: float | None, page_s: float) -> dict[str, float]:
    """`tokens_per_s`: of each request, in real time; None: an engine without latency, so that everything else takes as
    little as it can. `page_s`: a live page so often, at most. Shares are of the process's CPU time, and of one core."""
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
    with Path(os.devnull).open("w") as nowhere, counting(page_s) as spent:
        view = RichView(Console(file=nowhere, force_terminal=True, width=120, height=40))
        cpu, wall = time.process_time(), time.perf_counter()
        with view:
            check(run_job(spec, view), num_rows)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    watched = sum(spent.values())
    return {
        "run_s": wall,
        "run_cpu_s": cpu,
        "progress_cpu_s": watched,
        "share_of_cpu": watched / cpu,
        "share_of_a_core": watched / wall,
        "page_cpu_s": spent["LivePage._work"],
    }


@contextmanager
def counting(page_s: float) -> Iterator[dict[str, float]]:
    """CPU seconds by call, while the block runs: the classes' own methods, wrapped."""
    spent: dict[str, float] = {f"{owner.__name__}.{name}": 0.0 for owner, name in WATCHERS}
    real = [(owner, name, getattr(owner, name)) for owner, name in WATCHERS]
    interval_s = live_page.INTERVAL_S
    try:
        live_page.INTERVAL_S = page_s
        for owner, name, method in real:
            setattr(owner, name, _timed(method, f"{owner.__name__}.{name}", spent))
        yield spent
    finally:
        live_page.INTERVAL_S = interval_s
        for owner, name, method in real:
            setattr(owner, name, method)


def _timed(method: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        try:
            return method(*args, **kwargs)
        finally:
            spent[name] += time.thread_time() - started

    return call
