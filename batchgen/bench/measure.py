"""One run of one way: start its process, let the server say what it saw, check every row of its output.

What is measured: `window_s`, from the first row's start at the server to the last one's end, and with it the saturation;
`before_s` and `after_s`, the rest of the job's own time, cluster joined and libraries loaded before it begins; CPU time of
the way's process and of the cluster together. A way that fails or runs out of time is a result too, with its reason.
"""

import json
import os
import shutil
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchgen.bench.inputs import ID_COLUMNS
from batchgen.bench.oracle import find_saturation
from batchgen.bench.processes import MARK, CpuMeter, run_child
from batchgen.bench.runs import Run
from batchgen.bench.ways import Way
from batchgen.bench.workload import Workload, count_right
from batchgen.parquet import read_table

IDLE_POLLS, IDLE_POLL_S = 300, 0.1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a way runs. `python`: of its environment, or why there is none. `ray_address`, `s3`: where it needs one."""

    scripts: Path
    folder: Path
    input: Path
    url: str
    cores: frozenset[int]
    env: Mapping[str, str]
    python: str = sys.executable
    ray_address: str | None = None
    bucket: str | None = None


def measure(way: Way, key: str, work: Workload, place: Place) -> Run:
    """Run it once."""
    run = Run(way.name, way.kind, key, work.num_rows, load=os.getloadavg()[0])
    output, report = place.folder / "out", place.folder / "report.json"
    shutil.rmtree(output, ignore_errors=True)
    report.unlink(missing_ok=True)
    settings = {
        **way.settings,
        "input": str(place.input),
        "output": str(output),
        "report": str(report),
        "url": place.url,
        "ray_address": place.ray_address,
        "bucket": place.bucket,
    }
    command = [place.python, str(place.scripts / way.script), json.dumps(settings)]
    wait_for_idle(place.url)
    log = place.folder / f"{way.name.replace(' ', '-')}.log"
    with CpuMeter(place.env[MARK]) as meter:
        failure = run_child(command, set(place.cores), {**place.env, **way.env}, log, way.timeout_s)
    run = replace(run, cpu_s={name: round(used, 2) for name, used in meter.read().items() if used > 0})
    stats = read_json(f"{place.url}/stats?reset=1")
    if way.kind == "served":
        run = add_served(run, work, stats)
    if failure is not None:
        return replace(run, failure=failure)
    return add_output(add_report(run, json.loads(report.read_text()), stats), output)


def wait_for_idle(url: str) -> None:
    """Until the server has dropped what a killed way left; its figures begin anew. Raises RuntimeError."""
    for _ in range(IDLE_POLLS):
        if read_json(f"{url}/stats?reset=1")["num_open"] == 0:
            return
        time.sleep(IDLE_POLL_S)
    raise RuntimeError("the server is still busy with rows that nobody waits for")


def add_served(run: Run, work: Workload, stats: Mapping[str, Any]) -> Run:
    """What the server saw. A way that was stopped half way has no saturation: its tail is missing."""
    run = replace(run, max_inflight=stats["max_inflight"], num_again=stats["num_again"])
    if stats["rows"] < work.num_rows:
        return run
    window_s = stats["last_at"] - stats["first_at"]
    return replace(run, window_s=window_s, saturation=find_saturation([stats["service_s"]], work.slots, window_s))


def add_report(run: Run, report: Mapping[str, Any], stats: Mapping[str, Any]) -> Run:
    """What the way says of itself, and how its job lies around what the server saw."""
    began_at, ended_at = report["began_at"], report["ended_at"]
    run = replace(run, job_s=ended_at - began_at, versions=report["versions"])
    if run.window_s is None:
        return run
    return replace(run, before_s=stats["first_at"] - began_at, after_s=ended_at - stats["last_at"])


def add_output(run: Run, output: Path) -> Run:
    """Every row, once, with its own text (served), or at all (zero)."""
    data = output / "data"  # batchgen's folder holds more than its rows
    files = sorted((data if data.is_dir() else output).rglob("*.parquet"))
    if not files:
        return replace(run, num_right=0, failure="it wrote no output")
    table = pa.concat_tables([read_table(str(path)) for path in files], promote_options="permissive")
    ids = table[next(name for name in ID_COLUMNS if name in table.column_names)].to_pylist()
    if run.kind == "zero":
        num_right = len(set(ids)) if len(ids) == run.num_rows else 0
    else:
        num_right = count_right(list(zip(ids, table["text"].to_pylist(), strict=True)), run.num_rows)
    failure = None if num_right == run.num_rows else f"{run.num_rows - num_right} rows are missing or wrong"
    return replace(run, num_right=num_right, failure=failure)


def read_json(url: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as response:
        return json.load(response)
