"""batchgen's commands of the pages that name s3:// URLs or jobs of the cluster, run as they stand: the S3 server has both
buckets, and the embedded model lies where the checkpoint would."""

import re
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from s3_server import S3Server, create_bucket
from test_commands import list_blocks, list_commands
from test_pages import ELSEWHERE, README, REPO, name_command, run_here

from batchgen.storage import Storage

pytestmark = pytest.mark.s3

BUCKET = "my-batchgen"  # docs/cluster.md's own
JOBS = "bucket"  # of the jobs in jobs/: theirs are still to be run, those in BUCKET have ended
CHAT = [{"role": "user", "content": "7 + 5 ="}]


def list_away() -> list[list[str]]:
    """Each once, the bucket's name filled in as a shell would."""
    found = {}
    for words in list_commands("batchgen"):
        filled = [re.sub(r"s3://(\$?BUCKET)\b", f"s3://{BUCKET}", word) for word in words]
        is_away = any(word.startswith(("s3://", "jobs/deepseek")) for word in filled)
        if is_away and name_command(words) not in ELSEWHERE.keys() - {"stage", "doctor"}:
            found[" ".join(filled)] = filled
    return list(found.values())


@pytest.fixture(scope="module")
def clone(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with jobs/ as the page's own sed leaves it, and a finished job in the bucket."""
    folder = tmp_path_factory.mktemp("clone")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.env.items():
            patch.setenv(name, value)
        create_bucket(s3_server.endpoint, BUCKET)
        copytree(REPO / "jobs", folder / "jobs", ignore=lambda _, names: {"__pycache__"} & set(names))
        for name in ("deepseek_v32.yaml", "deepseek_v32_throughput.yaml"):
            text = (folder / "jobs" / name).read_text()
            text = text.replace("BUCKET", JOBS).replace("/nvme/models", str(folder / "nvme"))
            (folder / "jobs" / name).write_text(text)
        put_table(JOBS, "prompts", pa.table({"id": ["a", "b"], "messages": [CHAT, CHAT]}))
        model = Storage(f"s3://{JOBS}/models/DeepSeek-V3.2-NVFP4")
        for path in (REPO / "batchgen" / "embedded").iterdir():
            model.put(path.name, path.read_bytes())
        run_example(folder, f"s3://{BUCKET}/generations/deepseek-v32")
        run_example(folder, "s3://bucket/earlier-run")
        yield folder


def put_table(bucket: str, name: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    Storage(f"s3://{bucket}/{name}").put("part.parquet", sink.getvalue().to_pybytes())


def run_example(folder: Path, output: str) -> None:
    """The README's example, whose input and output are in a bucket, on a simulated engine."""
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    tree = yaml.safe_load(example)
    table = pa.table({tree["input"]["custom_id"]: ["a", "b"], "topic": ["x", "y"], "text": ["1", "2"]})
    put_table(BUCKET, "example", table.append_column("overrides", pa.array([None, '{"temperature": 0}'], pa.string())))
    tree["input"]["paths"], tree["output"]["path"] = f"s3://{BUCKET}/example/", output
    tree["engine"], tree["model"] = {"kind": "simulated", "has_latency": False}, {}
    tree["cluster"] |= {"pool": "inline"}
    (folder / "spec.yaml").write_text(yaml.safe_dump(tree))
    assert run_here(folder, ["run", "spec.yaml"]).exit_code == 0


@pytest.mark.parametrize("words", list_away(), ids=" ".join)
def test_the_command_works_on_a_bucket(clone: Path, words: list[str]) -> None:
    done = run_here(clone, words[1:])
    if words[1] == "cancel":
        assert (done.exit_code, "nothing to cancel" in done.stderr) == (2, True), "the run has ended"
    elif words[1] == "doctor":
        assert done.exit_code == 2, "no GPU here"
        assert "GPU" in done.stderr
    else:
        assert done.exit_code == 0, (done.stderr, done.exception)


def test_the_bucket_is_filled_in_as_the_page_does() -> None:
    sed = [
        line for page, block in list_blocks() if page == "cluster.md" for line in block.splitlines() if "sed" in line
    ]
    assert any("s/BUCKET/$BUCKET/" in line and "deepseek_v32" in line for line in sed)
    assert len(list_away()) > 6
