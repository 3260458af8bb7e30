"""What comes and goes on a real Ray cluster: processes that rows kill, nodes that are drained, jobs that are stopped."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs_util import check_output, make_tree, merge, run, write_spec
from ray_cluster import RayCluster, read_node_id

from batchgen.engines.simulated import read_calls

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

WINDOW = 4
ENGINE = {"has_latency": True, "slots": WINDOW, "max_inflight": WINDOW, "decode_tokens_per_s": 100, "mean_tokens": 20}


def write_rows(folder: Path, num_rows: int, culprit: int | None = None) -> list[tuple[str, int]]:
    folder.mkdir()
    prompts = [f"{'deadly' if row == culprit else 'plain'} {row}" for row in range(num_rows)]
    pq.write_table(pa.table({"prompt": prompts}), folder / "part.parquet")
    return [(str(folder / "part.parquet"), num_rows)]


def make_job(tmp_path: Path, **over: Any) -> dict[str, Any]:
    plain = {
        "engine": ENGINE,
        "output": {"rows_per_shard": 5, "journal_interval_s": 0.3},
        "cluster": {"pool": "ray", "workers": {"min": 2, "max": 2}, "drain_s": 10},
    }
    return make_tree(tmp_path / "in", tmp_path / "out", tmp_path / "calls", **merge(plain, over))


def wait_for_calls(cluster: RayCluster, job: str, tmp_path: Path, num_calls: int) -> None:
    give_up_at = time.monotonic() + 120
    while len(read_calls(str(tmp_path / "calls"))) < num_calls:
        assert time.monotonic() < give_up_at, cluster.read_logs(job)[-3000:]
        time.sleep(0.05)


def count_calls(tmp_path: Path) -> Counter[int]:
    return Counter(row for _, row, _, _ in read_calls(str(tmp_path / "calls")))


def test_a_row_that_kills_its_process_is_found(cluster: RayCluster, tmp_path: Path) -> None:
    """Nobody can say what was in flight: the rows of its shards that the journal doesn't hold are the suspects."""
    files = write_rows(tmp_path / "in", 40, culprit=11)
    tree = make_job(tmp_path, engine={"die_text": "deadly", "death": "process"}, retry={"max_error_rate": 1.0})
    job = cluster.submit(write_spec(tmp_path, tree))
    assert cluster.wait(job) == "SUCCEEDED", cluster.read_logs(job)[-3000:]
    rows = check_output(tmp_path / "out", files)
    assert [(row["source_row"], row["error_type"]) for row in rows if row["status"] == "error"] == [(11, "quarantined")]
    # Two shards of five rows were open: ten suspects, and the death that made them so.
    assert count_calls(tmp_path)[11] <= 1 + 5


def test_a_node_that_is_drained_hands_its_rows_back(cluster: RayCluster, tmp_path: Path) -> None:
    """A spot notice: its worker journals what it has and leaves in time; no row is generated twice."""
    files = write_rows(tmp_path / "in", 56)
    slots = {"resources_per_worker": {"spot": 1}, "cpus_per_worker": 0}
    # Slow enough that the driver looks at its nodes while rows are left: two seconds a row, eight at a time.
    slow = {"decode_tokens_per_s": 10, "sigma": 0.3}
    node, _ = cluster.add_node(spot=1), cluster.add_node(spot=1)
    notice = ("drain-node", "--address", cluster.address, "--node-id", read_node_id(node))
    notice += ("--deadline-remaining-seconds", "60", "--reason", "DRAIN_NODE_REASON_PREEMPTION")
    with cluster.at_hand(*notice, "--reason-message", "spot") as drain:
        job = cluster.submit(write_spec(tmp_path, make_job(tmp_path, cluster=slots, engine=slow)))
        wait_for_calls(cluster, job, tmp_path, 12)
        drain()
    assert cluster.wait(job) == "SUCCEEDED", cluster.read_logs(job)[-3000:]
    assert "is being drained" in cluster.read_logs(job)
    rows = check_output(tmp_path / "out", files)
    assert {row["status"] for row in rows} == {"ok"}
    assert count_calls(tmp_path) == dict.fromkeys(range(56), 1)


def test_a_stopped_job_drains_and_goes_on(cluster: RayCluster, tmp_path: Path) -> None:
    """`ray job stop` that is given time: rows in flight end, and none is generated twice. (Without: `test_stop`.)"""
    files = write_rows(tmp_path / "in", 120)
    tree = make_job(tmp_path, output={"rows_per_shard": 60, "journal_interval_s": 600})
    spec = write_spec(tmp_path, tree)
    patient = cluster.submit(spec, env={"RAY_JOB_STOP_WAIT_TIME_S": "120"})
    wait_for_calls(cluster, patient, tmp_path, 20)
    started = time.monotonic()
    cluster.call("job", "stop", "--address", cluster.dashboard, patient)
    assert cluster.wait(patient) == "STOPPED"
    assert time.monotonic() - started < 100, "it ended by itself; Ray kills it after 120 s"
    assert "stopping: stopped by a signal" in cluster.read_logs(patient)
    assert set(count_calls(tmp_path).values()) == {1}

    report, _ = run(merge(tree, {"cluster": {"pool": "inline"}, "engine": {"has_latency": False}}))
    assert report["exit_code"] == 0
    assert {row["status"] for row in check_output(tmp_path / "out", files)} == {"ok"}
    assert set(count_calls(tmp_path).values()) == {1}
