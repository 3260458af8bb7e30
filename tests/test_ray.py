"""The job on a real Ray cluster, submitted as the README says, with actors, nodes and the driver killed for real."""

import json
import os
import re
import shutil
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from jobs_util import merge, run
from prometheus_server import Prometheus, run_prometheus
from promql import list_metrics
from ray_cluster import MARK, RayCluster, list_marked
from s3_server import S3Proxy
from test_metrics import list_expressions
from trtllm_util import CHILD, KEEPER, RANK, SMALL, create_stand_in

import batchgen
from batchgen.batch_stats import read_stats_table
from batchgen.engines.simulated import read_calls
from batchgen.specs.load import load_spec
from batchgen.storage import Storage
from batchgen.worker.handoff import list_handoffs

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

SLOTS = 16
WINDOW = 24
INTERVAL_S = 1.0


@pytest.fixture
def s3(cluster_proxy: S3Proxy, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", cluster_proxy.endpoint)
    return s3_url


def write_inputs(url: str, num_files: int, rows: int) -> None:
    storage = Storage(url)
    for number in range(num_files):
        prompts = [f"file {number} row {row}: tell me something" for row in range(rows)]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"prompt": prompts}), sink)
        storage.create(f"part {number:03d}.parquet", memoryview(sink.getvalue()))


def write_spec(path: Path, inputs: str, output: str, **changes: Any) -> str:
    engine = {
        "kind": "simulated",
        "slots": SLOTS,
        "max_inflight": WINDOW,
        "mean_tokens": 40,
        "sigma": 0.5,
        "decode_tokens_per_s": 200,
        "call_log": str(path / "calls"),
    }
    cluster = {
        "workers": {"min": 2, "max": 2},
        "lease_ttl_s": 6,
        "log_interval_s": 1,
        "cpus_per_worker": 1,
    }
    spec = {
        "input": {"paths": inputs},
        "prompt": {"column": "prompt"},
        "engine": engine | changes.pop("engine", {}),
        "output": {"path": output, "journal_interval_s": INTERVAL_S},
        "cluster": cluster | changes.pop("cluster", {}),
        **changes,
    }
    (path / "spec.yaml").write_text(yaml.safe_dump(spec))
    return str(path / "spec.yaml")


def make_inline(spec: str) -> dict[str, Any]:
    """The same job in the test's process, by an engine that answers at once."""
    tree = dict(yaml.safe_load(Path(spec).read_text()))
    return merge(tree, {"cluster": {"pool": "inline"}, "engine": {"has_latency": False}})


def wait_for(is_true: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < give_up_at, f"never happened: {what}"
        time.sleep(0.05)


def count_calls(path: Path) -> int:
    return len(read_calls(str(path / "calls"))) if (path / "calls").exists() else 0


def list_worker_pids(path: Path) -> list[int]:
    """Processes that hold an engine, by the names of their call logs; the newest last, dead ones left out."""
    logs = sorted((path / "calls").glob("calls-*.jsonl"), key=lambda log: log.stat().st_mtime)
    pids = [int(re.findall(r"calls-(\d+)", log.name)[0]) for log in logs]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def read_rows(output: str) -> list[dict[str, Any]]:
    """All output rows in the order of the files' names."""
    storage = Storage(output)
    rows: list[dict[str, Any]] = []
    for info in storage.list_files("data", suffix=".parquet"):
        with storage.open_read(info.path) as source:
            rows += pq.read_table(source).to_pylist()
    return rows


def check_rows(rows: list[dict[str, Any]], num_files: int, num_rows: int) -> None:
    """Every row exactly once, in input order, each a generation."""
    keys = [(Path(row["source_file"]).name, row["source_row"]) for row in rows]
    assert keys == [(f"part {f:03d}.parquet", r) for f in range(num_files) for r in range(num_rows)]
    assert Counter(row["status"] for row in rows) == {"ok": num_files * num_rows}


def check_stats(output: str) -> None:
    """Every batch that has rows in data/ is in batch_stats, once."""
    ids = read_stats_table(Storage(output))["batch_id"].to_pylist()
    assert len(ids) == len(set(ids))
    assert {row["batch_id"] for row in read_rows(output)} <= set(ids)


def test_submitted_job_survives_kills_of_driver_and_worker(
    cluster: RayCluster, cluster_proxy: S3Proxy, s3: str, tmp_path: Path
) -> None:
    """1,200 rows in 20 files on S3; SIGKILL of the driver and of a worker half way, while a PUT of a shard waits for its
    reply; submitted again, every row is there exactly once, and what was generated again is bounded."""
    num_files, num_rows = 20, 60
    write_inputs(f"{s3}/in", num_files, num_rows)
    output = f"{s3}/out"
    spec = write_spec(tmp_path, f"{s3}/in", output)
    cluster.submit(spec)
    wait_for(lambda: count_calls(tmp_path) > num_files * num_rows * 0.4, "40 % of the calls")
    held = cluster_proxy.hold_reply("data/shard", nth=1)
    assert held.is_forwarded.wait(120), "no PUT of a shard came"

    os.kill(list_worker_pids(tmp_path)[0], signal.SIGKILL)
    holder = json.loads(Storage(output).read_bytes("_batchgen/lease/000000001.json"))
    os.kill(holder["pid"], signal.SIGKILL)
    killed_at = time.time()
    held.release()
    wait_for(lambda: not list_worker_pids(tmp_path), "the other actor ends with its driver")
    committed = {info.path: info.version for info in Storage(output).list_files("data")}
    assert committed

    again = cluster.submit(spec)
    assert cluster.wait(again) == "SUCCEEDED", cluster.read_logs(again)[-3000:]
    check_rows(read_rows(output), num_files, num_rows)
    check_stats(output)
    after = {info.path: info.version for info in Storage(output).list_files("data")}
    assert committed.items() <= after.items()
    assert Storage(output).info("_SUCCESS") is not None
    assert not Storage(output).list_files("_batchgen/journal")
    # Lost are at most the rows in flight and those finished since each worker's last flush (it takes part of a second).
    extra = count_calls(tmp_path) - num_files * num_rows
    late = count_calls_between(tmp_path, killed_at - INTERVAL_S - 1.0, killed_at + 1.0)
    assert extra <= 2 * WINDOW + late


def count_calls_between(path: Path, start: float, end: float) -> int:
    times = [json.loads(line)[4] for log in (path / "calls").glob("*.jsonl") for line in log.read_text().splitlines()]
    return sum(start <= at <= end for at in times)


def test_lost_actor_and_stopped_actor_are_replaced_within_the_run(cluster: RayCluster, s3: str, tmp_path: Path) -> None:
    """One actor is killed, another one stopped (it lives and says nothing): both are given up, the run ends well."""
    write_inputs(f"{s3}/in", 10, 60)
    output = f"{s3}/out"
    spec = write_spec(tmp_path, f"{s3}/in", output, cluster={"worker_timeout_s": 5})
    job = cluster.submit(spec)
    wait_for(lambda: count_calls(tmp_path) > 150, "150 calls")
    first, second = list_worker_pids(tmp_path)[:2]
    os.kill(first, signal.SIGKILL)
    os.kill(second, signal.SIGSTOP)
    assert cluster.wait(job) == "SUCCEEDED", cluster.read_logs(job)[-3000:]
    check_rows(read_rows(output), 10, 60)
    check_stats(output)
    logs = cluster.read_logs(job)
    assert logs.count("was lost") >= 2, logs[-2000:]
    outcomes = Counter(read_stats_table(Storage(output))["outcome"].to_pylist())
    assert outcomes["lost"] >= 2
    assert outcomes["committed"] == 10, "a batch that was committed counts as committed, whatever became of its worker"
    wait_for(lambda: second not in list_worker_pids(tmp_path), "the stopped actor is ended too")


def test_helper_and_owner_of_a_split_shard_are_killed(cluster: RayCluster, s3: str, tmp_path: Path) -> None:
    """One shard for two actors: the second one helps the first. SIGKILL of the helper, then, while another one helps, of
    the owner: the shard is committed once, by whoever holds it then, with what helpers had journaled."""
    num_rows, output = 600, f"{s3}/out"
    write_inputs(f"{s3}/in", 1, num_rows)
    # Slow enough that the second actor is up long before the first one could end alone.
    spec = write_spec(tmp_path, f"{s3}/in", output, engine={"decode_tokens_per_s": 60})
    changed = yaml.safe_load(Path(spec).read_text())
    changed["output"] |= {"rows_per_shard": num_rows, "journal_interval_s": 0.5}
    Path(spec).write_text(yaml.safe_dump(changed))
    job = cluster.submit(spec)
    wait_for(lambda: len(list_callers(tmp_path)) == 2, "the second actor helps")
    owner, helper = list_callers(tmp_path)
    os.kill(helper, signal.SIGKILL)
    wait_for(lambda: bool(set(list_callers(tmp_path)) - {owner, helper}), "a new actor helps")
    os.kill(owner, signal.SIGKILL)
    assert cluster.wait(job) == "SUCCEEDED", cluster.read_logs(job)[-3000:]
    check_rows(read_rows(output), 1, num_rows)
    check_stats(output)
    outcomes = Counter(read_stats_table(Storage(output))["outcome"].to_pylist())
    assert outcomes["committed"] == 1
    assert outcomes["lost"] >= 2, "the helper's share and the owner's lease"
    assert not list_handoffs(Storage(output)), "handoffs go with the commit"
    # What was in flight, what was not journaled, and a share that outlived its owner.
    assert count_calls(tmp_path) < 1.6 * num_rows


def list_callers(path: Path) -> list[int]:
    """Living workers whose engines were called, in order of their first calls."""
    logs = {pid: (path / "calls" / f"calls-{pid}.jsonl").read_text().splitlines() for pid in list_worker_pids(path)}
    return sorted((pid for pid, lines in logs.items() if lines), key=lambda pid: float(json.loads(logs[pid][0])[4]))


def test_an_actor_killed_in_mid_reuse_costs_its_own_rows_only(cluster: RayCluster, s3: str, tmp_path: Path) -> None:
    """Three quarters of the rows are taken from an earlier output. SIGKILL of an actor: no row of that output is ever
    generated again, and all rows are there once."""
    num_files, num_rows = 6, 80
    write_inputs(f"{s3}/in", num_files, num_rows)
    quick = {"has_latency": False, "call_log": None}
    earlier = yaml.safe_load(Path(write_spec(tmp_path, f"{s3}/in", f"{s3}/earlier", engine=quick)).read_text())
    assert run(earlier | {"cluster": {"pool": "inline"}})[0]["exit_code"] == 0
    for number in range(num_files):
        with Storage(f"{s3}/in").open_read(f"part {number:03d}.parquet") as source:
            prompts = pq.read_table(source)["prompt"].to_pylist()
        changed = [text + " again" if row % 4 == 1 else text for row, text in enumerate(prompts)]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"prompt": changed}), sink)
        Storage(f"{s3}/today").create(f"part {number:03d}.parquet", memoryview(sink.getvalue()))
    output, slow = f"{s3}/out", {"decode_tokens_per_s": 60, "slots": 6, "max_inflight": 8}
    spec = write_spec(tmp_path, f"{s3}/today", output, engine=slow)
    tree = yaml.safe_load(Path(spec).read_text())
    tree["input"]["reuse_from"] = f"{s3}/earlier"
    Path(spec).write_text(yaml.safe_dump(tree))
    job = cluster.submit(spec)
    wait_for(lambda: count_calls(tmp_path) > 20 and len(list_callers(tmp_path)) == 2, "both actors generate")
    os.kill(list_callers(tmp_path)[0], signal.SIGKILL)
    assert cluster.wait(job) == "SUCCEEDED", cluster.read_logs(job)[-3000:]
    rows = read_rows(output)
    check_rows(rows, num_files, num_rows)
    check_stats(output)
    assert {row for _, row, _, _ in read_calls(str(tmp_path / "calls"))} == set(range(1, num_rows, 4))
    assert all((row["reused_from"] is None) == (row["source_row"] % 4 == 1) for row in rows)
    old = {(Path(row["source_file"]).name, row["source_row"]): row["text"] for row in read_rows(f"{s3}/earlier")}
    new = {(Path(row["source_file"]).name, row["source_row"]): row for row in rows}
    assert all(row["text"] == old[key] for key, row in new.items() if row["reused_from"])


def test_lost_node_and_workers_that_join_later(cluster: RayCluster, tmp_path: Path) -> None:
    """Workers need a resource that only added nodes have: one joins late, one is lost with its node."""
    inputs, output = tmp_path / "in", tmp_path / "out"
    write_inputs(str(inputs), 8, 60)
    changes = {"resources_per_worker": {"slot": 1}, "cpus_per_worker": 0, "workers": {"min": 2, "max": 2}}
    spec = write_spec(tmp_path, str(inputs), str(output), cluster=changes)
    first = cluster.add_node(slot=1)
    job = cluster.submit(spec)
    wait_for(lambda: count_calls(tmp_path) > 60, "60 calls by the worker of the first node")
    assert len(list_worker_pids(tmp_path)) == 1
    cluster.add_node(slot=1)
    wait_for(lambda: len(list_worker_pids(tmp_path)) == 2, "the second worker joins")
    os.kill(first, signal.SIGKILL)
    assert cluster.wait(job) == "SUCCEEDED", cluster.read_logs(job)[-3000:]
    check_rows(read_rows(str(output)), 8, 60)
    check_stats(str(output))


def test_workers_that_cannot_start_stop_the_run_with_the_reason(cluster: RayCluster, tmp_path: Path) -> None:
    write_inputs(str(tmp_path / "in"), 1, 5)
    # A model that renders prompts but has no weights: only a worker that loads it can tell.
    shutil.copytree(Path(batchgen.__file__).parent / "embedded", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    spec = write_spec(
        tmp_path,
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        model={"path": str(tmp_path / "model")},
    )
    changed = yaml.safe_load(Path(spec).read_text()) | {"engine": {"kind": "transformers"}}
    changed["retry"] = {"max_start_failures": 2}  # each loads torch first
    Path(spec).write_text(yaml.safe_dump(changed))
    job = cluster.submit(spec)
    assert cluster.wait(job) == "FAILED"
    logs = cluster.read_logs(job)
    assert "workers in a row failed to start" in logs
    assert "model.path" in logs
    assert "Traceback" not in logs


def test_cancel_drains_a_submitted_run(cluster: RayCluster, s3: str, tmp_path: Path) -> None:
    """`batchgen cancel` from elsewhere: the run journals and stops as resumable; the next one, without Ray, goes on."""
    from typer.testing import CliRunner

    from batchgen.cli import app

    # Many more than are done by the next renewal of the lease, at which a run looks whether it was cancelled.
    write_inputs(f"{s3}/in", 4, 200)
    output = f"{s3}/out"
    spec = write_spec(tmp_path, f"{s3}/in", output)
    job = cluster.submit(spec)
    wait_for(lambda: count_calls(tmp_path) > 80, "80 calls")
    assert CliRunner().invoke(app, ["cancel", output]).exit_code == 0
    assert cluster.wait(job) == "FAILED"
    assert "cancelled by" in cluster.read_logs(job)
    num_before = count_calls(tmp_path)
    assert run(make_inline(spec))[0]["exit_code"] == 0
    check_rows(read_rows(output), 4, 200)
    # A drain lets rows in flight finish and journals them, so nothing at all is generated twice.
    assert count_calls(tmp_path) == 800
    assert num_before < 800


def test_a_killed_actor_leaves_no_engine_behind(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-LLM's stand-in: SIGKILL of the actor ends its keeper, its engine's process and its ranks, which are deaf to
    all else and hold their GPUs; the next worker finishes the job, and at its end nothing is left of that one either."""
    stand_in = create_stand_in(tmp_path, monkeypatch)
    stand_in.control(token_s=0.004, orphans=True)
    write_inputs(str(tmp_path / "in"), 2, 60)
    output = tmp_path / "out"
    path = write_spec(tmp_path, str(tmp_path / "in"), str(output), cluster={"workers": {"min": 1, "max": 1}})
    changed = yaml.safe_load(Path(path).read_text()) | {"engine": SMALL, "sampling": {"max_tokens": 32}}
    Path(path).write_text(yaml.safe_dump(changed))
    job = cluster.submit(path, env=stand_in.env)
    wait_for(lambda: stand_in.count_requests() > 20, "20 requests")
    (actor,) = list_marked(cluster.env[MARK], "ray::WorkerActor")
    old = set(stand_in.list_pids(KEEPER) + stand_in.list_pids(CHILD) + stand_in.list_pids(RANK))
    assert len(old) == 4
    os.kill(actor, signal.SIGKILL)
    wait_for(lambda: not old & set(stand_in.list_pids()), "the keeper ends them all")
    assert cluster.wait(job) == "SUCCEEDED", cluster.read_logs(job)[-3000:]
    check_rows(read_rows(str(output)), 2, 60)
    assert stand_in.count_llms() == 2
    stand_in.check_nothing_left()


def test_driver_of_another_build_is_turned_away(cluster: RayCluster, tmp_path: Path) -> None:
    """The driver's process says another build than its workers': nothing is generated."""
    write_inputs(str(tmp_path / "in"), 1, 5)
    spec = write_spec(tmp_path, str(tmp_path / "in"), str(tmp_path / "out"))
    script = tmp_path / "other_build.py"
    script.write_text(
        "import batchgen.driver.dispatch, sys\n"
        "from batchgen.cli import app\n"
        "batchgen.driver.dispatch.build_id = lambda: '9.9.9+other'\n"
        f"sys.exit(app(['run', {spec!r}]))\n"
    )
    import subprocess
    import sys

    env = {**cluster.env, "RAY_ADDRESS": cluster.address}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 3, done.stderr[-2000:]
    assert "install the same build" in done.stderr
    assert count_calls(tmp_path) == 0


def write_metrics_job(path: Path, num_rows: int) -> str:
    """A job that makes use of every metric: errors, retries, GPUs (Ray believes in one)."""
    prompts = [f"row {row}: please" if row % 9 else None for row in range(num_rows)]
    (path / "in").mkdir()
    pq.write_table(pa.table({"prompt": prompts}), path / "in" / "part.parquet")
    return write_spec(
        path,
        str(path / "in"),
        str(path / "out"),
        engine={"failure_rate": 0.2},
        retry={"max_error_rate": 1},
        cluster={"gpus_per_worker": 0.5},
    )


def test_a_run_exports_every_metric_that_dashboard_and_alerts_read(cluster: RayCluster, tmp_path: Path) -> None:
    """Scraped from Ray's own endpoint while the run works; a run with errors and answers."""
    job = cluster.submit(write_metrics_job(tmp_path, 900))
    wanted = {name for expression in list_expressions().values() for name in list_metrics(expression)}
    ends = {"ray_batchgen_runs_ended_total"}
    found: dict[str, str] = {}

    def scrape() -> set[str]:
        with urllib.request.urlopen(cluster.metrics, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found.update({re.split(r"[{ ]", line, maxsplit=1)[0]: line for line in lines if not line.startswith("#")})
        return wanted - found.keys()

    wait_for(lambda: scrape() <= ends, f"all of {sorted(wanted)}")
    assert cluster.wait(job) == "SUCCEEDED", cluster.read_logs(job)[-3000:]
    assert not scrape(), "the last word is there as soon as the driver is gone"
    assert 'state="finished"' in found["ray_batchgen_runs_ended_total"]
    assert 'finished_reason="' in found["ray_batchgen_request_success_total"]
    assert 'error_type="null_prompt"' in found["ray_batchgen_request_failure_total"]
    assert not [line for line in found.values() if "please" in line], "no prompt in a label"


@dataclass(frozen=True, slots=True)
class Board:
    """The dashboard and the alert rules of one job, asked of a real Prometheus."""

    prometheus: Prometheus
    job: str

    def list_runs(self) -> list[str]:
        """What the dashboard's variable offers."""
        values: list[str] = self.prometheus.get("label/run/values", **{"match[]": "ray_batchgen_rows"})
        return [value for value in values if value.startswith(self.job)]

    def list_empty_panels(self, run: str) -> list[str]:
        """Queries without data, but that of runs that have ended."""
        return [
            where
            for where, expression in list_expressions().items()
            if not where.startswith(("Batchgen", "Runs that ended"))
            and not self.prometheus.query(expression.replace("$run", run).replace("$__rate_interval", "10s"))
        ]

    def list_missed(self) -> list[str]:
        """Runs whose driver is gone, as the rule has it, but for how long it waits."""
        found = self.prometheus.query(list_expressions()["BatchgenDriverGone"])
        return [series["metric"]["run"] for series in found if series["metric"]["run"].startswith(self.job)]

    def list_ends(self) -> dict[str, str]:
        found = self.prometheus.query(f'ray_batchgen_runs_ended_total{{run=~"{self.job}.*"}}')
        return {series["metric"]["run"]: series["metric"]["state"] for series in found}


def test_prometheus_answers_every_query_and_misses_a_driver_that_was_killed(
    cluster: RayCluster, tmp_path: Path
) -> None:
    """Set up as docs/metrics.md says: it finds Ray's agents by the file that Ray writes."""
    spec = write_metrics_job(tmp_path, 1500)
    job = load_spec(spec).fingerprint()[:8]
    first, second = f"{job}-e1", f"{job}-e2"
    with run_prometheus(tmp_path, cluster.discovery) as prometheus:
        board = Board(prometheus, job)
        cluster.submit(spec)
        wait_for(lambda: board.list_runs() == [first], "a run to choose on the board")
        wait_for(lambda: not board.list_empty_panels(first), "data in every panel")
        (group,) = prometheus.get("rules")["groups"]
        assert [(rule["name"], rule["health"]) for rule in group["rules"]] == [
            (name, "ok") for name in list_expressions() if name.startswith("Batchgen")
        ]
        assert board.list_missed() == []

        holder = json.loads((tmp_path / "out" / "_batchgen" / "lease" / "000000001.json").read_text())
        os.kill(holder["pid"], signal.SIGKILL)
        wait_for(lambda: board.list_missed() == [first], "the driver to be missed")
        again = cluster.submit(spec)
        wait_for(lambda: board.list_missed() == [], "the next run to say that this one is over")
        assert cluster.wait(again) == "SUCCEEDED", cluster.read_logs(again)[-3000:]
        wait_for(lambda: board.list_ends() == {first: "followed", second: "finished"}, "how it ended")
        looked = f'ray_batchgen_looked_at_seconds{{run="{second}"}}'
        wait_for(lambda: not prometheus.query(looked), "the gauges to go with their driver")
        assert board.list_missed() == []


def test_nothing_of_a_run_is_left_behind(cluster: RayCluster) -> None:
    """After all these kills no actor holds a core or a name any more (runs last in this file)."""
    wait_for(lambda: not list_marked(cluster.env[MARK], "ray::WorkerActor"), "all actors are gone")
