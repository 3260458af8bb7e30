"""Pipelines through Ray's job API: a real head, real schedulers, SIGKILL."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from jobs_util import count_calls
from pipeline_util import make_eager, make_pipeline, write_pipeline, write_prompts
from ray_cluster import MARK, REPO, RayCluster, find_port, run_ray_cluster
from typer.testing import CliRunner

from batchgen.cli import app
from batchgen.pipelines.calendar import parse_key
from batchgen.pipelines.partitions import make_partition_name
from batchgen.pipelines.ray_jobs import RaySubmitter
from batchgen.pipelines.submit import Submission, SubmitterAway
from batchgen.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[RayCluster]:
    (tmp_path / "home").mkdir()
    with run_ray_cluster(tmp_path / "home", {}, num_cpus=2) as cluster:
        yield cluster


@contextmanager
def scheduling(cluster: RayCluster, *files: str) -> Iterator[subprocess.Popen[bytes]]:
    """A scheduler, killed at the end; it is no process of the cluster's."""
    command = make_eager("schedule", *files, "--address", cluster.dashboard)
    env = {name: value for name, value in cluster.env.items() if name != MARK}
    process = subprocess.Popen(command, env=env, cwd=REPO)
    try:
        yield process
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def show(file: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["pipelines", "show", file, "--json", "--last", "1000"])
    assert done.exit_code == 0, done.output
    value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return value


def wait_for_states(file: str, states: list[str], timeout_s: float) -> list[dict[str, Any]]:
    give_up_at = time.monotonic() + timeout_s
    while True:
        runs: list[dict[str, Any]] = show(file)["runs"]
        if [run["state"] for run in runs] == states:
            return runs
        assert time.monotonic() < give_up_at, runs
        time.sleep(0.2)


def list_jobs(cluster: RayCluster, *pipelines: str) -> list[str]:
    """Submission ids of all jobs of these pipelines that the head knows."""
    ids = [job.submission_id or "" for job in cluster.jobs.list_jobs()]
    return sorted(name for name in ids if name.startswith(tuple(f"batchgen-{pipeline}-" for pipeline in pipelines)))


def test_two_schedulers_and_a_killed_one_submit_each_date_once(cluster: RayCluster, tmp_path: Path) -> None:
    write_prompts(tmp_path / "in" / "rows.parquet")
    tree = make_pipeline(str(tmp_path), max_active_runs=2, max_active_partitions=2)
    tree["partitions"] = {"lang": ["en", "zh Hant"]}
    for stage in tree["stages"]:
        stage["job"]["output"]["path"] += "/{{ lang }}"
    file = write_pipeline(tmp_path / "p.yaml", tree)
    backfill = ["pipelines", "backfill", file, "--from", "2026-11-18", "--to", "2026-11-19"]
    subprocess.run([sys.executable, "-m", "batchgen.cli", *backfill], check=True)
    with scheduling(cluster, file):
        wait_for_states(file, ["running", "running"], 120)
    with scheduling(cluster, file), scheduling(cluster, file):
        runs = wait_for_states(file, ["succeeded", "succeeded"], 240)
    assert [run["attempt"] for run in runs] == [1, 1]
    names = [make_partition_name(["en"]), make_partition_name(["zh Hant"])]
    assert list_jobs(cluster, "nightly") == [
        f"batchgen-nightly-{run['key']}-{name}-1" for run in runs for name in names
    ]
    latest = json.loads((tmp_path / "published" / "latest.json").read_text())
    assert latest["run"] == runs[-1]["key"]
    for value in ("en", "zh Hant"):
        output = latest["outputs"][f"judge/{make_partition_name([value])}"]
        assert output["partition"] == {"lang": value}
        assert pq.read_table(f"{output['path']}/data").num_rows == 10


@pytest.mark.soak
def test_a_scheduler_that_is_a_ray_job_itself_gives_its_files_to_its_runs(cluster: RayCluster, tmp_path: Path) -> None:
    """The entry point under `ray job submit`, with a package of its own that the jobs have to be given."""
    write_prompts(tmp_path / "in" / "rows.parquet")
    tree = make_pipeline(str(tmp_path))
    del tree["stages"][1]
    file = write_pipeline(tmp_path / "p.yaml", tree)
    backfill = ["pipelines", "backfill", file, "--from", "2026-11-18", "--to", "2026-11-18"]
    subprocess.run([sys.executable, "-m", "batchgen.cli", *backfill], check=True)
    own = json.dumps({"env_vars": {"BATCHGEN_TEST_OWN": "1"}})
    command = [sys.executable, str(REPO / "jobs" / "schedule.py"), file]
    submit = ["job", "submit", "--address", cluster.dashboard, "--no-wait", "--submission-id", "keeper"]
    cluster.call(*submit, "--runtime-env-json", own, "--", *command)
    (run,) = wait_for_states(file, ["succeeded"], 90)
    (own_run,) = [job for job in cluster.jobs.list_jobs() if job.submission_id == f"batchgen-nightly-{run['key']}-1"]
    assert "BATCHGEN_TEST_OWN" in str(own_run.runtime_env)
    cluster.jobs.stop_job("keeper")


@pytest.mark.soak
def test_a_dead_head_is_waited_for(own_cluster: RayCluster, tmp_path: Path) -> None:
    """It dies with all that is on it, a job at work too, and another one comes that knows nothing: the scheduler lives
    through it, and each date is made once."""
    write_prompts(tmp_path / "in" / "rows.parquet")
    tree = make_pipeline(str(tmp_path), retries={"max": 2, "delay": "0s"})
    slow = {"kind": "simulated", "mean_tokens": 5, "decode_tokens_per_s": 1.0, "call_log": str(tmp_path / "calls")}
    tree["stages"] = tree["stages"][:1]
    tree["stages"][0]["job"]["engine"] = slow
    file = write_pipeline(tmp_path / "p.yaml", tree)
    backfill = ["pipelines", "backfill", file, "--from", "2026-11-18", "--to", "2026-11-19"]
    subprocess.run([sys.executable, "-m", "batchgen.cli", *backfill], check=True)
    with scheduling(own_cluster, file) as scheduler:
        wait_for_calls(tmp_path / "calls")
        own_cluster.kill_all()
        time.sleep(15)  # a real outage, in which it asks some times
        assert scheduler.poll() is None
        assert show(file)["runs"][0]["state"] == "running", "nothing is decided while nobody answers"
        own_cluster.start_head()
        runs = wait_for_states(file, ["succeeded", "succeeded"], 240)
    assert [run["attempt"] for run in runs] == [1, 1], "the same ids, submitted once more"
    assert list_jobs(own_cluster, "nightly") == [f"batchgen-nightly-{run['key']}-1" for run in runs]
    for run in runs:
        assert pq.read_table(f"{tmp_path}/made/{run['key']}/data").num_rows == 20
    assert 40 <= count_calls(tmp_path / "calls") <= 60, (
        "rows that were in flight on the dead one are sent again, no others"
    )


def wait_for_calls(folder: Path) -> None:
    give_up_at = time.monotonic() + 60
    while not folder.exists() or not count_calls(folder):
        assert time.monotonic() < give_up_at
        time.sleep(0.2)


def test_a_head_that_is_not_there_is_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    submitter = RaySubmitter(f"http://127.0.0.1:{find_port()}")
    submission = Submission(Storage(str(tmp_path)), "nightly", "2026-11-20T0100Z", 1, "0")
    for ask in (submitter.submit, submitter.get_status, submitter.stop):
        with pytest.raises(SubmitterAway, match="Ray's job API"):
            ask(submission)


@pytest.mark.soak
def test_three_minute_schedules_for_five_minutes_with_two_kills(cluster: RayCluster, tmp_path: Path) -> None:
    write_prompts(tmp_path / "in" / "rows.parquet")
    started = datetime.now(UTC)
    files = []
    for name in ("one", "two", "three"):
        tree = make_pipeline(str(tmp_path / name), name=name, max_active_runs=2)
        tree["schedule"] = {"cron": "* * * * *", "catchup": True, "start": started.isoformat()}
        tree["stages"] = tree["stages"][:1]
        tree["stages"][0]["job"]["input"]["paths"] = str(tmp_path / "in")
        files.append(write_pipeline(tmp_path / f"{name}.yaml", tree))
    for seconds in (100, 100):
        with scheduling(cluster, *files):
            time.sleep(seconds)  # real minutes: the schedules are what is tried
    expected = []
    with scheduling(cluster, *files):
        time.sleep(100)
        subprocess.run([sys.executable, "-m", "batchgen.cli", "pipelines", "list", *files], check=True)
        for file in files:
            subprocess.run([sys.executable, "-m", "batchgen.cli", "pipelines", "pause", file], check=True)
        for file in files:
            runs = show(file)["runs"]
            runs = wait_for_states(file, ["succeeded"] * len(runs), 240)
            dates = [parse_key(run["key"]) for run in runs]
            assert dates == [dates[0] + timedelta(minutes=number) for number in range(len(dates))]
            assert dates[0] < started + timedelta(minutes=2)
            assert len(dates) >= 4
            assert {run["attempt"] for run in runs} == {1}
            name = Path(file).stem
            expected += [f"batchgen-{name}-{run['key']}-1" for run in runs]
            made = Storage(str(tmp_path / name / "made")).list_files(suffix="_SUCCESS")
            assert len(made) == len(runs)
    assert list_jobs(cluster, "one", "two", "three") == sorted(expected)
    print(f"\n{len(expected)} dates of three schedules, each one job, one attempt")
