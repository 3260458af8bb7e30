"""A head without cores, as cluster.yaml and jobs/kuberay/ start it: the job's driver runs there, and no worker does."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ray_cluster import RayCluster, run_ray_cluster

from batchgen.batch_stats import read_stats_table
from batchgen.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RayCluster]:
    home = tmp_path / "home"
    home.mkdir()
    with run_ray_cluster(home, {}, num_cpus=0) as cluster:
        yield cluster


def test_a_submitted_job_drives_from_a_head_without_cores(cluster: RayCluster, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [f"say {number}" for number in range(50)]}), tmp_path / "in.parquet")
    spec = {
        "input": {"paths": str(tmp_path / "in.parquet")},
        "prompt": {"column": "prompt"},
        "engine": {"kind": "simulated", "mean_tokens": 5},
        "output": {"path": str(tmp_path / "out")},
        "cluster": {"workers": {"min": 1, "max": 1}, "cpus_per_worker": 1, "resources_per_worker": {"engine": 1}},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    submission = cluster.submit(str(tmp_path / "spec.yaml"))
    while "1 starting" not in cluster.read_logs(submission):
        assert cluster.get_status(submission) in ("PENDING", "RUNNING"), cluster.read_logs(submission)
    # The driver runs before there is any core at all; the node with one comes as the autoscaler would bring it.
    cluster.add_node(engine=1)
    assert cluster.wait(submission) == "SUCCEEDED", cluster.read_logs(submission)[-3000:]
    stats = read_stats_table(Storage(str(tmp_path / "out")))
    assert sum(stats["num_rows_ok"].to_pylist()) == 50
