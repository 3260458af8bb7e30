"""Helpers for tests of whole jobs: a prompt dataset, a spec, a run here or as a process of its own, a check of its output.

The checks read the output as a stranger would, with pyarrow and s3fs alone; of ours they use file names and words only.
"""

import contextlib
import copy
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import s3fs
from typer.testing import CliRunner

from batchgen.cli import app
from batchgen.driver.dispatch import Progress
from batchgen.driver.run import run_job
from batchgen.spec import JobSpec
from batchgen.specs.load import make_spec

Tree = dict[str, Any]
Key = tuple[str, int, int]

DEFAULTS: Tree = {
    "prompt": {"column": "prompt"},
    "engine": {"kind": "simulated", "has_latency": False, "mean_tokens": 12, "sigma": 0.5},
    "sampling": {"max_tokens": 32},
    "output": {"rows_per_shard": 10, "journal_interval_s": 0.3},
    "cluster": {
        "pool": "inline",
        "workers": {"min": 2, "max": 2},
        "lease_ttl_s": 6,
        "drain_s": 5,
        "log_interval_s": 1.0,
    },
    "retry": {"backoff_s": 0.01},
}
# About 0.1 s a row and 160 rows/s with two workers: a few hundred rows are a job of seconds that can be killed half way.
SLOW_ENGINE = {"has_latency": True, "slots": 8, "max_inflight": 12, "decode_tokens_per_s": 120, "sigma": 0.3}


# ---- input -----------------------------------------------------------------------------------------------------------


def make_prompts(num_rows: int, first: int = 0) -> pa.Table:
    return pa.table(
        {
            "prompt": pa.array([f"question number {i} é" for i in range(first, first + num_rows)], pa.string()),
            "key": pa.array([f"row-{i}" for i in range(first, first + num_rows)], pa.string()),
        }
    )


def write_file(url: str | Path, table: pa.Table, **options: Any) -> str:
    """One Parquet file, local or on S3; its name."""
    put_file(str(url), to_parquet(table, **options))
    return str(url)


def to_parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return bytes(sink.getvalue().to_pybytes())


def put_file(url: str, data: bytes) -> None:
    put_files({url: data})


def put_files(contents: Mapping[str, bytes]) -> None:
    """Files by name; to S3 many at a time."""
    remote = {url.removeprefix("s3://"): data for url, data in contents.items() if url.startswith("s3://")}
    if remote:
        open_s3().pipe(remote)
    for url in contents.keys() - {f"s3://{name}" for name in remote}:
        Path(url).parent.mkdir(parents=True, exist_ok=True)
        Path(url).write_bytes(contents[url])


def write_prompts(folder: str | Path, sizes: Sequence[int] = (30, 25)) -> list[tuple[str, int]]:
    """One file a size; (name, rows) of each, in input order."""
    contents, first = {}, 0
    for number, size in enumerate(sizes):
        contents[f"{folder}/part-{number:03d}.parquet"] = to_parquet(make_prompts(size, first), row_group_size=16)
        first += size
    put_files(contents)
    return list(zip(contents, sizes, strict=True))


# ---- spec ------------------------------------------------------------------------------------------------------------


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    merged = dict(copy.deepcopy(dict(base)))
    for name, value in over.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def make_tree(inputs: str | Path | list[str], out: str | Path, calls: str | Path | None = None, **over: Any) -> Tree:
    """A spec as plain values: `DEFAULTS`, these places, and what the test changes."""
    paths = inputs if isinstance(inputs, list) else [str(inputs)]
    places = {"input": {"paths": paths}, "output": {"path": str(out)}}
    if calls is not None:
        places["engine"] = {"call_log": str(calls)}
    tree = merge(merge(DEFAULTS, places), over)
    if set(over.get("prompt", {})) & {"messages", "template", "prompt_token_ids"}:
        tree["prompt"].pop("column", None)
    return tree


# ---- a run in this process -------------------------------------------------------------------------------------------


@dataclass
class RecordingView:
    said: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    shown: list[Progress] = field(default_factory=list)

    def say(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)

    def show(self, progress: Progress) -> None:
        self.shown.append(progress)


def run(tree: Tree | JobSpec, limit: int | None = None) -> tuple[dict[str, Any], RecordingView]:
    view = RecordingView()
    spec = tree if isinstance(tree, JobSpec) else make_spec(tree)
    return run_job(spec, view, limit=limit), view


# ---- a run as a process of its own -----------------------------------------------------------------------------------


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        return dict(json.loads(self.out.splitlines()[-1]))


class CliRun:
    """A `batchgen` command under way. Its output goes to files: a full pipe must not stop it."""

    def __init__(self, folder: Path, *args: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"cli-{time.monotonic_ns()}"
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            command = [sys.executable, "-m", "batchgen.cli", *args]
            self.process = subprocess.Popen(command, stdout=out, stderr=err)

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(120)

    def wait(self, timeout_s: float = 240) -> Ended:
        code = self.process.wait(timeout_s)
        return Ended(code, self._out.read_text(), self.err)


@contextlib.contextmanager
def running(folder: Path, tree: Tree | str, *args: str) -> Iterator[CliRun]:
    """`batchgen run` on this spec (a tree, or where it lies); killed at the end when it still runs."""
    job = CliRun(folder, "run", tree if isinstance(tree, str) else write_spec(folder, tree), "--json", *args)
    try:
        yield job
    finally:
        if job.is_running:
            with contextlib.suppress(ProcessLookupError):
                job.signal(signal.SIGCONT)
            job.kill()


def run_to_end(folder: Path, tree: Tree | str, *args: str) -> Ended:
    with running(folder, tree, *args) as job:
        return job.wait()


def run_cli(folder: Path, *args: str) -> Ended:
    return CliRun(folder, *args).wait()


def call_cli(*args: str) -> Ended:
    """In this process, for tests of what a command says: a process of its own takes a second of a core to begin."""
    done = CliRunner().invoke(app, list(args))
    return Ended(done.exit_code, done.stdout, done.stderr)


def write_spec(folder: Path, tree: Tree) -> str:
    path = folder / f"spec-{time.monotonic_ns()}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))  # JSON is YAML
    return str(path)


def wait_for(condition: Callable[[], Any], timeout_s: float = 120, what: str = "the condition") -> Any:
    give_up_at = time.monotonic() + timeout_s
    while time.monotonic() < give_up_at:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come within {timeout_s} s")


# ---- engine calls ----------------------------------------------------------------------------------------------------


def read_timed_calls(calls: Path) -> list[tuple[Key, float]]:
    """(row and sample, Unix time) of each call to the engine."""
    lines = [line for path in sorted(calls.glob("calls-*.jsonl")) for line in path.read_text().splitlines()]
    return [((f[0], f[1], f[2]), f[4]) for f in map(json.loads, lines)]


def count_calls(calls: Path) -> int:
    return len(read_timed_calls(calls))


def max_calls_within(calls: Path, span_s: float) -> int:
    """The most calls in any stretch of this length."""
    times = sorted(at for _, at in read_timed_calls(calls))
    best, first = 0, 0
    for last, at in enumerate(times):
        while times[first] < at - span_s:
            first += 1
        best = max(best, last - first + 1)
    return best


# ---- output ----------------------------------------------------------------------------------------------------------


def open_s3() -> s3fs.S3FileSystem:
    return _open_s3(os.environ["AWS_ENDPOINT_URL"])


@functools.cache
def _open_s3(endpoint: str) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(endpoint_url=endpoint, use_listings_cache=False)


def list_output(out: str | Path, folder: str = "") -> list[str]:
    """Names below a folder of the output, sorted."""
    root = f"{out}/{folder}".rstrip("/")
    if root.startswith("s3://"):
        return sorted("s3://" + name for name in open_s3().find(root.removeprefix("s3://")))
    return sorted(str(path) for path in Path(root).rglob("*") if path.is_file())


def read_bytes(name: str) -> bytes:
    return read_many([name])[name]


def read_many(names: Sequence[str]) -> dict[str, bytes]:
    """Content by name; from S3 many at a time."""
    if names and names[0].startswith("s3://"):
        found = open_s3().cat([name.removeprefix("s3://") for name in names])
        return {f"s3://{name}": data for name, data in found.items()}
    return {name: Path(name).read_bytes() for name in names}


def read_table(name: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(read_bytes(name)))


def read_folder(out: str | Path, folder: str = "data") -> pa.Table:
    contents = read_many(list_output(out, folder))
    return pa.concat_tables([pq.read_table(pa.BufferReader(contents[name])) for name in sorted(contents)])


def read_rows(out: str | Path, without: Sequence[str] = ()) -> list[dict[str, Any]]:
    """`without`: columns whose values Python can't hold."""
    return list(read_folder(out).drop_columns(list(without)).to_pylist())


def list_keys(files: Sequence[tuple[str, int]], n: int = 1) -> list[Key]:
    return [(name, row, sample) for name, size in files for row in range(size) for sample in range(n)]


def get_key(row: Mapping[str, Any]) -> Key:
    return row["source_file"], row["source_row"], row["sample_index"]


def check_output(
    out: str | Path, files: Sequence[tuple[str, int]], n: int = 1, without: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Every row of `files` (name, rows) and every sample exactly once, in input order, a generation or an error; its
    batch in `batch_stats`, once. The rows."""
    names = list_output(out, "data")
    assert all(name.rpartition("/")[2].startswith("shard-") and name.endswith(".parquet") for name in names)
    rows = read_rows(out, without)
    assert [get_key(row) for row in rows] == list_keys(files, n)
    for row in rows:
        check_row(row)
    batches = read_folder(out, "batch_stats")["batch_id"].to_pylist()
    assert len(set(batches)) == len(batches)
    assert {row["batch_id"] for row in rows} <= set(batches)
    return rows


def check_row(row: Mapping[str, Any]) -> None:
    """A generation or an error, and nothing of the other."""
    answer = ("text", "finish_reason", "completion_tokens", *(() if row.get("reused_from") else ("latency_s",)))
    error = ("error_type", "error_message", "is_retryable")
    assert row["status"] in {"ok", "error"}
    there, absent = (answer, error) if row["status"] == "ok" else (error, answer[:3])
    assert [name for name in there if row[name] is None] == [], row
    assert [name for name in absent if row[name] is not None] == [], row


def read_stats(out: str | Path) -> dict[str, dict[str, Any]]:
    rows = read_folder(out, "batch_stats").to_pylist()
    assert len({row["batch_id"] for row in rows}) == len(rows)
    return {row["batch_id"]: row for row in rows}


def check_stats_add_up(out: str | Path, data: dict[str, bytes]) -> None:
    """Every batch with rows in data/ is in batch_stats with at least those rows and tokens; exactly those where no file
    was replaced. No batch whose rows stand without an attempt that failed to commit them is called lost."""
    stats = read_stats(out)
    columns = ["batch_id", "status", "completion_tokens"]
    tables = [pq.read_table(pa.BufferReader(content), columns=columns) for content in data.values()]
    rows = [row for table in tables for row in table.to_pylist()]
    was_replaced = any(row["num_rows_copied"] for row in stats.values())
    for batch_id in {row["batch_id"] for row in rows}:
        mine = [row for row in rows if row["batch_id"] == batch_id]
        num_ok = sum(row["status"] == "ok" for row in mine)
        tokens = sum(row["completion_tokens"] or 0 for row in mine)
        said = (stats[batch_id]["num_rows_ok"], stats[batch_id]["completion_tokens"] or 0)
        assert said == (num_ok, tokens) or (was_replaced and said >= (num_ok, tokens)), batch_id
    made_files = {
        pq.ParquetFile(pa.BufferReader(content)).schema_arrow.metadata[b"batchgen"] for content in data.values()
    }
    standing = {json.loads(footer)["batch_id"] for footer in made_files}
    assert {stats[batch_id]["outcome"] for batch_id in standing} <= {"committed"}


def check_conserved(out: str | Path, files: Sequence[tuple[str, int]], n: int = 1) -> dict[str, Any]:
    """Manifest, report and data agree; the report."""
    data = read_many(list_output(out, "data"))
    statuses = [s for content in data.values() for s in pq.read_table(pa.BufferReader(content))["status"].to_pylist()]
    num_ok, num_error = statuses.count("ok"), statuses.count("error")
    manifest = json.loads(read_bytes(f"{out}/manifest.json"))
    report = dict(json.loads(read_bytes(f"{out}/report.json")))
    num_input = sum(size for _, size in files)
    assert manifest["rows"] == report["rows"]
    assert (report["rows"]["input"], report["rows"]["n"], report["rows"]["output"]) == (num_input, n, len(statuses))
    assert num_input * n == len(statuses)
    assert (report["rows"]["ok"], report["rows"]["error"]) == (num_ok, num_error)
    check_stats_add_up(out, data)
    sizes = {name: len(content) for name, content in data.items()}
    assert {f"{out}/{file['path']}": file["num_bytes"] for file in manifest["files"]} == sizes
    assert sum(file["num_rows"] for file in manifest["files"]) == len(statuses)
    return report
