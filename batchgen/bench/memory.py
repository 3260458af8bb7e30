"""Resident memory of a run over time: a whole job in processes of its own, looked at from outside.

The job is a million short rows, Parquet to Parquet, through one worker on a local Ray, whose engine answers at once. Peaks
of the run's quarters are compared: memory that grows with the rows shows in the last one. Linux only (/proc).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_FILE = 100_000
LOOK_S = 0.5
# Before that the workers start; their imports are no growth.
MIN_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Look:
    """Rows committed so far, and MiB of the driver and of all its workers."""

    at_s: float
    num_rows: int
    driver_mib: float
    worker_mib: float


def write_input(folder: Path, num_rows: int) -> None:
    folder.mkdir()
    for first in range(0, num_rows, ROWS_PER_FILE):
        rows = range(first, min(first + ROWS_PER_FILE, num_rows))
        prompts = [f"question number {row}: what is the sum of {row} and {2 * row}?" for row in rows]
        pq.write_table(pa.table({"prompt": prompts}), folder / f"part-{first:09d}.parquet", row_group_size=10_000)


def write_spec(folder: Path, rows_per_shard: int | None) -> Path:
    spec = {
        "input": {"paths": str(folder / "in")},
        "prompt": {"column": "prompt"},
        "engine": {"kind": "simulated", "has_latency": False, "mean_tokens": 100},
        "output": {"path": str(folder / "out"), "rows_per_shard": rows_per_shard},
        "cluster": {"address": "local", "workers": {"min": 1, "max": 1}},
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    return folder / "spec.json"


def read_mib(pid: int) -> float:
    """0 for a process that is gone."""
    try:
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return int(fields.get("VmRSS", "0 kB").split()[0]) / 1024


def list_workers(mark: int) -> list[int]:
    """The run's actors: they inherit the mark in its environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_worker = (folder / "cmdline").read_bytes().startswith(b"ray::WorkerActor")
            if is_worker and f"BATCHGEN_BENCH={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def watch(process: "subprocess.Popen[bytes]", mark: int, out: Path, num_rows: int) -> list[Look]:
    started, looks, shown, rows_of = time.monotonic(), [], 0.0, dict[str, int]()
    while process.poll() is None:
        for path in out.glob("data/*.parquet"):
            if path.name not in rows_of:
                rows_of[path.name] = pq.read_metadata(path).num_rows
        worker_mib = sum(read_mib(pid) for pid in list_workers(mark))
        looks.append(Look(time.monotonic() - started, sum(rows_of.values()), read_mib(process.pid), worker_mib))
        if looks[-1].num_rows >= shown:
            last = looks[-1]
            memory = f"driver {last.driver_mib:6.0f} MiB  worker {last.worker_mib:6.0f} MiB"
            print(f"{last.at_s:7.1f} s {last.num_rows:9,d} rows  {memory}", flush=True)
            shown = last.num_rows + num_rows / 20
        time.sleep(LOOK_S)
    return looks


def find_peaks(looks: Sequence[Look], num_rows: int) -> dict[str, list[float]]:
    """The highest figure of each quarter of the rows."""
    peaks = {}
    for name in ("driver_mib", "worker_mib"):
        peaks[name] = [
            round(max((getattr(look, name) for look in looks if low < look.num_rows / num_rows <= high), default=0.0))
            for low, high in ((MIN_SHARE, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
        ]
    return peaks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows-per-shard", type=int, default=None, help="Default: as the plan chooses.")
    parser.add_argument("--folder", help="Where input and output go; a temporary folder when absent.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_input(folder / "in", args.rows)
        spec, mark = write_spec(folder, args.rows_per_shard), time.time_ns()
        env = {**os.environ, "BATCHGEN_BENCH": str(mark)}
        command = [sys.executable, "-m", "batchgen.cli", "run", str(spec), "--json"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
            looks = watch(process, mark, folder / "out", args.rows)
        if process.returncode != 0:
            print((folder / "log").read_text()[-2000:])
            return 1
    figures = {"rows": args.rows, "seconds": round(looks[-1].at_s), **find_peaks(looks, args.rows)}
    print(json.dumps(figures))
    return 0
