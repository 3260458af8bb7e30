"""What the head's loss and a driver's node's loss cost: the control store (GCS) is killed, and comes back from its disk or
does not, and a job goes on from another node. The head has no cores, as cluster.yaml and jobs/kuberay/ start it."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs_util import check_output, make_tree, merge, run, write_spec
from ray_cluster import MARK, RayCluster, list_marked, run_ray_cluster

from batchgen.engines.simulated import read_calls

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

NUM_ROWS = 120
WINDOW = 4
ENGINE = {"has_latency": True, "slots": WINDOW, "max_inflight": WINDOW, "decode_tokens_per_s": 50, "mean_tokens": 20}
CLUSTER = {
    "pool": "ray",
    "workers": {"min": 2, "max": 2},
    "cpus_per_worker": 0,
    "resources_per_worker": {"slot": 1},
    "lease_ttl_s": 20,  # a disk that others write to may hold up a renewal for seconds
    "drain_s": 2,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Its control store keeps what it knows on disk. Ray tells apart one that is slow and one that is gone after a minute;
    here after half of it. The tests use it in their order: a node that one has added serves the next, and the last one
    ends it."""
    disk = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(tmp_path_factory.mktemp("lasting") / "gcs")}
    patience = {"RAY_gcs_rpc_server_reconnect_timeout_s": "30", "RAY_gcs_server_request_timeout_seconds": "30"}
    with run_ray_cluster(tmp_path_factory.mktemp("home"), disk | patience, num_cpus=0) as cluster:
        yield cluster


def make_job(tmp_path: Path, **over: Any) -> dict[str, Any]:
    (tmp_path / "in").mkdir(exist_ok=True)
    prompts = [f"question {row}" for row in range(NUM_ROWS)]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in" / "part.parquet")
    plain = {"engine": ENGINE, "output": {"rows_per_shard": 10, "journal_interval_s": 0.3}, "cluster": CLUSTER}
    return make_tree(tmp_path / "in", tmp_path / "out", tmp_path / "calls", **merge(plain, over))


def count_calls(tmp_path: Path) -> Counter[int]:
    return Counter(row for _, row, _, _ in read_calls(str(tmp_path / "calls")))


def wait_for_calls(tmp_path: Path, num_calls: int) -> None:
    give_up_at = time.monotonic() + 120
    while count_calls(tmp_path).total() < num_calls:
        assert time.monotonic() < give_up_at, "the job never began"
        time.sleep(0.05)


def check_all_there(tmp_path: Path) -> None:
    rows = check_output(tmp_path / "out", [(str(tmp_path / "in" / "part.parquet"), NUM_ROWS)])
    assert {row["status"] for row in rows} == {"ok"}


def test_a_submitted_job_drives_from_a_head_without_cores(cluster: RayCluster, tmp_path: Path) -> None:
    """The driver runs before there is any core at all; the node with one comes as the autoscaler would bring it."""
    workers = {"workers": {"min": 1, "max": 1}, "cpus_per_worker": 1}
    submission = cluster.submit(
        write_spec(tmp_path, make_job(tmp_path, engine={"has_latency": False}, cluster=workers))
    )
    give_up_at = time.monotonic() + 120
    while "1 starting" not in cluster.read_logs(submission):
        assert cluster.get_status(submission) in ("PENDING", "RUNNING"), cluster.read_logs(submission)
        assert time.monotonic() < give_up_at, "the driver never began"
        time.sleep(0.2)
    cluster.add_node(slot=1)
    assert cluster.wait(submission) == "SUCCEEDED", cluster.read_logs(submission)[-3000:]
    check_all_there(tmp_path)
    cluster.stop_nodes()


def test_a_driver_on_another_node_goes_on(cluster: RayCluster, tmp_path: Path) -> None:
    """The first driver is killed with its node and the worker there; the second, elsewhere, resumes."""
    first = cluster.add_node(slot=1, one=1)
    cluster.add_node(slot=2, two=1)
    spec = write_spec(tmp_path, make_job(tmp_path))
    cluster.submit(spec, on="one")
    wait_for_calls(tmp_path, NUM_ROWS // 3)
    cluster.kill_node(first)
    assert count_calls(tmp_path).total() < NUM_ROWS
    again = cluster.submit(spec, on="two")
    assert cluster.wait(again) == "SUCCEEDED", cluster.read_logs(again)[-3000:]
    check_all_there(tmp_path)
    # At most what was in flight on two workers, and what they had finished since the last journal.
    twice = sum(count - 1 for count in count_calls(tmp_path).values())
    assert twice <= 2 * WINDOW + 20


def test_a_control_store_that_comes_back_costs_no_row(cluster: RayCluster, tmp_path: Path) -> None:
    """Ray's RocksDB storage: drivers and actors outlive their GCS, and no row is generated twice. Needs the node with two
    slots that the test before has left."""
    job = cluster.submit(write_spec(tmp_path, make_job(tmp_path)), on="two")
    wait_for_calls(tmp_path, NUM_ROWS // 4)
    cluster.restart_gcs(down_s=2)
    assert count_calls(tmp_path).total() < NUM_ROWS
    assert cluster.wait(job) == "SUCCEEDED", cluster.read_logs(job)[-3000:]
    check_all_there(tmp_path)
    assert set(count_calls(tmp_path).values()) == {1}


def test_a_head_that_is_lost_ends_the_run_and_another_cluster_goes_on(cluster: RayCluster, tmp_path: Path) -> None:
    """Ray ends every process of a cluster whose control store is gone: so it must not hang, and what was there stays. Last:
    nothing is left of the cluster."""
    tree = make_job(tmp_path)
    job = cluster.submit(write_spec(tmp_path, tree))
    wait_for_calls(tmp_path, NUM_ROWS // 4)
    cluster.kill_gcs()
    give_up_at = time.monotonic() + 120
    while list_marked(cluster.env[MARK], "jobs/generate.py"):
        assert time.monotonic() < give_up_at, "a driver without a head lives on"
        time.sleep(0.2)
    (log,) = Path(cluster.env["RAY_TMPDIR"]).glob(f"ray/session_2*/logs/job-driver-{job}.log")
    assert "Failed to connect to GCS within 30 seconds" in log.read_text()
    report, _ = run(merge(tree, {"cluster": {"pool": "inline"}}))
    assert report["exit_code"] == 0
    check_all_there(tmp_path)
