"""A newcomer's road: the commands of the README's first page, copied and pasted into a shell, in a folder that has what a
clone has once `make demo` ended. Only the cluster is one of ours, on free ports, and the absolute output is elsewhere."""

import re
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray_cluster import RayCluster

from batchgen.demo import SCHEMA, make_questions

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

REPO = Path(__file__).parents[1]
BLOCKS = re.findall(r"```sh\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
ADDRESS = "http://127.0.0.1:8265"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    copytree(REPO / "jobs", folder / "jobs", ignore=lambda _, names: [name for name in names if "__pycache__" in name])
    (folder / "demo" / "prompts").mkdir(parents=True)
    # Those that have to be thought about first are the demo's own job's, and take longer than 64 tokens.
    rows = [row for row in make_questions(0, 100) if row["sampling"] is None]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "demo" / "prompts" / "questions-0.parquet")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    return folder


def paste(block: str, folder: Path, cluster: RayCluster) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-e", "-c", block]
    done = subprocess.run(command, cwd=folder, env=cluster.env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def test_a_first_job_by_copy_and_paste(clone: Path, cluster: RayCluster) -> None:
    (block,) = [block for block in BLOCKS if "cp jobs/first.yaml my.yaml" in block]
    done = paste(block, clone, cluster)
    assert "first prompt" in done.stderr
    assert (clone / "out" / "_SUCCESS").exists()
    table = pq.read_table(clone / "out" / "data")
    right = [
        text == answer for text, answer in zip(table["text"].to_pylist(), table["answer"].to_pylist(), strict=True)
    ]
    assert len(right) > 50
    assert sum(right) > 0.9 * len(right)
    assert "'custom_id'" in done.stdout, "the last line shows rows"


def test_the_same_as_a_ray_job_by_copy_and_paste(clone: Path, cluster: RayCluster, tmp_path: Path) -> None:
    (block,) = [block for block in BLOCKS if "ray start --head\nray job submit" in block]
    assert "/tmp/out" in block
    own = block.replace("ray start --head\n", "").replace(ADDRESS, cluster.dashboard)
    (clone / "my.yaml").write_bytes((REPO / "jobs" / "first.yaml").read_bytes())
    paste(own.replace("/tmp/out", str(tmp_path / "out")), clone, cluster)
    assert (tmp_path / "out" / "_SUCCESS").exists()
    # The output of the file itself would lie in a copy that Ray deletes.
    with pytest.raises(AssertionError, match="Ray's own copy of --working-dir"):
        paste(re.sub(r" --set output\.path=\S+", "", own), clone, cluster)
