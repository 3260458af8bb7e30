"""A pipeline whose state, outputs and publication lie on an S3 server: two schedulers, real jobs, replies that are lost,
and a store that fails at random in every way S3 is known for: there Ray is played, an attempt is a thread of ours. And real
scheduler processes, killed."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs_util import count_calls, read_folder
from pipeline_util import make_job, make_pipeline, write_pipeline, write_prompts
from s3_server import S3Proxy

from batchgen.driver.run import run_job
from batchgen.driver.view import QuietView
from batchgen.errors import BatchgenError
from batchgen.pipelines.events import Began, Deleted, Ended, PartitionEnded, Retired, parse_event
from batchgen.pipelines.execute import execute
from batchgen.pipelines.hooks import Teller
from batchgen.pipelines.keeper import Keeper
from batchgen.pipelines.load import load_pipeline
from batchgen.pipelines.log import Log, make_path
from batchgen.pipelines.orders import open_folder, read_order
from batchgen.pipelines.publish import read_published
from batchgen.pipelines.spec import PipelineSpec
from batchgen.pipelines.submit import Status, Submission
from batchgen.storage import Storage

pytestmark = [pytest.mark.s3]

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
DATES = ["2026-11-18T0100Z", "2026-11-19T0100Z", "2026-11-20T0100Z"]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchgen.stores.s3.READ_TIMEOUT_S", 0.7)
    monkeypatch.setattr("batchgen.pipelines.execute.LEASE_TTL_S", 6.0)


class ThreadSubmitter:
    """Refuses an id that it has, as Ray does."""

    kind = "ray"

    def __init__(self) -> None:
        self.jobs: dict[str, Future[Any]] = {}
        self._threads, self._lock = ThreadPoolExecutor(2), threading.Lock()

    def submit(self, submission: Submission) -> None:
        with self._lock:
            if submission.id not in self.jobs:
                self.jobs[submission.id] = self._threads.submit(self._carry_out, submission)

    def _carry_out(self, submission: Submission) -> None:
        order = read_order(submission.folder, submission.order)
        execute(order, lambda spec: run_job(spec, QuietView()), lambda _: None)

    def get_status(self, submission: Submission) -> Status:
        job = self.jobs.get(submission.id)
        return "unknown" if job is None else "ended" if job.done() else "running"

    def stop(self, submission: Submission) -> None:
        raise AssertionError(submission.id)


def make_spec(url: str, folder: Path, *partitions: str) -> PipelineSpec:
    write_prompts(folder / "rows.parquet")
    Storage(f"{url}/in").put("rows.parquet", (folder / "rows.parquet").read_bytes())
    tree = make_pipeline(url, retries={"max": 50, "delay": "0s"}, retention={"keep": 1}, max_active_runs=2)
    tree["schedule"] = {
        "cron": "0 2 * * *",
        "timezone": "Europe/Berlin",
        "start": "2026-11-18T00:00:00Z",
        "catchup": True,
    }
    tree["partitions"] = {"lang": list(partitions)}
    tree["wait_for"] = [{"marker": f"{url}/in/rows.parquet"}]
    job = make_job(url, "made", f"{url}/in")
    job["output"]["path"] += "/{{ lang }}"
    tree["stages"] = [{"name": "generate", "job": job}]
    return load_pipeline(write_pipeline(folder / "p.yaml", tree), NOW).spec


@contextmanager
def two_schedulers(spec: PipelineSpec) -> Iterator[ThreadSubmitter]:
    """Each makes its way as `Scheduler` does: what fails is looked at again. One starts anew all the time."""
    submitter, is_over = ThreadSubmitter(), threading.Event()

    def keep(lives: int) -> None:
        keeper: Keeper | None = None
        looks = 0
        while not is_over.is_set():
            try:
                if keeper is None or looks % lives == 0:
                    keeper = Keeper(spec, submitter, Teller(), time.monotonic, str, str)
                looks += 1
                keeper.keep(NOW.timestamp())
            except BatchgenError:
                continue
            time.sleep(0.05)

    threads = [ThreadPoolExecutor(1) for _ in range(2)]
    futures = [thread.submit(keep, lives) for thread, lives in zip(threads, (1_000_000, 3), strict=True)]
    try:
        yield submitter
    finally:
        is_over.set()
        for future in futures:
            future.result(60)


def open_log(spec: PipelineSpec) -> Log:
    while True:
        with suppress(BatchgenError):
            return Log(open_folder(spec))


def wait_until_done(spec: PipelineSpec, timeout_s: float = 150) -> None:
    """All dates made, all but the newest deleted."""
    log, give_up_at = open_log(spec), time.monotonic() + timeout_s
    while True:
        with suppress(BatchgenError):  # the store fails for us, too
            log.catch_up()
        history = log.history
        runs = [history.runs[key] for key in DATES if key in history.runs]
        if [run.end for run in runs] == ["succeeded"] * 3 and [run.is_deleted for run in runs] == [True, True, False]:
            return
        assert time.monotonic() < give_up_at, runs
        time.sleep(0.3)


def check_all(spec: PipelineSpec) -> None:
    """Each decision is there once; readers have the newest date, whole."""
    folder, number, found = open_folder(spec), 0, Counter[str]()
    while folder.info(make_path(number := number + 1)) is not None:
        fields = json.loads(folder.read_bytes(make_path(number)))
        fields.pop("token")
        event = parse_event(json.dumps(fields).encode())
        if isinstance(event, PartitionEnded):
            found[f"{event.kind} {event.key} {event.partition} {event.state}"] += 1
        elif isinstance(event, Began | Ended | Retired | Deleted):
            found[f"{event.kind} {event.key}"] += 1
    wanted = [f"{kind} {key}" for kind in ("began", "ended") for key in DATES]
    names = spec.partitions["lang"]
    wanted += [f"partition_ended {key} {name} succeeded" for key in DATES for name in names]
    wanted += [f"{kind} {key}" for kind in ("retired", "deleted") for key in DATES[:2]]
    assert found == Counter(wanted)
    published = Storage(str(spec.publish))
    assert read_published(published) == DATES[-1]
    assert [info.path for info in published.list_files("dates")] == [f"dates/{DATES[-1]}.json"]
    outputs = json.loads(published.read_bytes("latest.json"))["outputs"]
    assert list(outputs) == [f"generate/{name}" for name in names]
    for output in outputs.values():
        assert len(set(read_folder(output["path"])["custom_id"].to_pylist())) == output["rows_ok"] == 20
    made = Storage(f"{spec.state.removesuffix('/state')}/made").list_files()
    assert {info.path.partition("/")[0] for info in made} == {DATES[-1]}


LOST = [r"log/000000001", r"log/000000002", r"log/00000001", r"orders/", r"started-", r"attempt-", r"lease/"]
LOST += [r"published/dates/", r"published/latest", r"published/latest", r"_SUCCESS", r"data/shard-"]


def test_whatever_reply_is_lost_each_date_is_made_once(s3_url: str, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    spec = make_spec(s3_url, tmp_path, "en", "de")
    for path in LOST:
        s3_proxy.drop_reply(path)
    s3_proxy.drop_reply("delete", method="POST")
    with two_schedulers(spec) as submitter:
        wait_until_done(spec)
    assert [rule.pattern for rule in s3_proxy._rules if rule.times and rule.method == "PUT"] == []
    check_all(spec)
    assert sorted(submitter.jobs) == sorted(
        f"batchgen-nightly-{key}-{name}-1" for key in DATES for name in ("en", "de")
    )


@pytest.mark.parametrize(
    ("seed", "partitions"),
    [pytest.param(seed, ["en", "de"] if seed else ["en"], marks=pytest.mark.soak) for seed in range(5)],
)
def test_two_schedulers_come_through_a_bad_store(
    s3_url: str, s3_proxy: S3Proxy, tmp_path: Path, seed: int, partitions: list[str]
) -> None:
    spec = make_spec(s3_url, tmp_path, *partitions)
    faults = s3_proxy.misbehave(seed, rate=0.05)
    with two_schedulers(spec):
        wait_until_done(spec)
    s3_proxy.behave()
    assert sum(faults.values()) > 20
    check_all(spec)


@contextmanager
def process_scheduling(file: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real `batchgen schedule --local`; each attempt is a process of its own, which outlives it. Killed at the end."""
    process = subprocess.Popen([sys.executable, "-m", "batchgen.cli", "schedule", file, "--local"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_event(spec: PipelineSpec, number: int, timeout_s: float = 60) -> None:
    give_up_at = time.monotonic() + timeout_s
    while open_folder(spec).info(make_path(number)) is None:
        assert time.monotonic() < give_up_at, number
        time.sleep(0.02)


@pytest.mark.soak
@pytest.mark.parametrize("kills", [(2, 4), (3, 9), (5, 12)])
def test_schedulers_killed_with_their_state_on_s3_make_each_date_once(
    s3_url: str, tmp_path: Path, kills: tuple[int, int]
) -> None:
    """Two real schedulers, real jobs. Each scheduler is killed with SIGKILL right behind an event of the log, and another
    one takes its place. Every row of every date is sent to the engine exactly once."""
    spec = make_spec(s3_url, tmp_path, "en", "de")
    tree = yaml.safe_load((tmp_path / "p.yaml").read_text())
    tree["schedule"]["end"] = "2026-11-20T12:00:00Z"
    slow = {"kind": "simulated", "mean_tokens": 5, "decode_tokens_per_s": 4.0, "call_log": str(tmp_path / "calls")}
    tree["stages"][0]["job"]["engine"] = slow
    file = write_pipeline(tmp_path / "p.yaml", tree)
    with process_scheduling(file) as first, process_scheduling(file) as second:
        wait_for_event(spec, kills[0])
        first.kill()
        with process_scheduling(file):
            wait_for_event(spec, kills[1])
            second.kill()
            with process_scheduling(file):
                wait_until_done(spec)
    check_all(spec)
    assert count_calls(tmp_path / "calls") == 3 * 2 * 20
    attempts = [part.attempt for run in open_log(spec).catch_up().runs.values() for part in run.parts.values()]
    assert attempts == [1] * 6
