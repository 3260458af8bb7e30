"""One job, three doors: a tenant's Parquet dataset as a batch, and a job that was started elsewhere, seen by the SDK."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from serve_process import CHAT, CLUSTER, SLOW, TERMINAL, Server, make_endpoint_tree, read_lines, running, wait_over

from batchgen.serve.dataset import is_allowed


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("endpoint")
    tree = make_endpoint_tree(
        str(folder / "store"),
        tenants={"acme": {"inputs": [f"file://{folder}/acme"]}, "globex": {"inputs": [f"file://{folder}/globex"]}},
        jobs=str(folder / "jobs"),
        limits={"max_requests": 10},
    )
    with running(Server(folder, tree)) as started:
        yield started


def write_dataset(path: Path, num_rows: int, **columns: pa.Array) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    chats = [json.dumps([{"role": "user", "content": f"say {row}"}]) if row != 3 else None for row in range(num_rows)]
    keys = [f"k{row}" for row in range(num_rows)]
    pq.write_table(pa.table({"custom_id": keys, "messages": chats, **columns}), path)
    return f"file://{path}"


def create(client: openai.OpenAI, url: str, **fields: object) -> openai.types.Batch:
    known = {"input_file_id": url, "endpoint": CHAT, "completion_window": "24h", "extra_body": {"model": "fast"}}
    return client.batches.create(**{**known, **fields})  # type: ignore[arg-type]


def test_a_dataset_beyond_the_row_limit(server: Server) -> None:
    client = server.client()
    write_dataset(server.folder / "acme" / "a.parquet", 60)
    write_dataset(server.folder / "acme" / "b.parquet", 5, sampling=pa.array(['{"max_tokens": 3}'] * 5))
    done = wait_over(client, create(client, f"file://{server.folder}/acme/a.parquet").id)
    assert done.status == "completed"
    assert done.request_counts is not None
    assert (done.request_counts.completed, done.request_counts.failed) == (59, 1)
    assert done.usage is not None
    assert done.usage.output_tokens > 0
    answers = read_lines(client, done.output_file_id)
    assert set(answers) == {f"k{row}" for row in range(60) if row != 3}
    openai.types.chat.ChatCompletion.model_validate(answers["k0"]["response"]["body"])
    errors = read_lines(client, done.error_file_id)
    assert errors["k3"]["response"]["body"]["error"]["code"] == "null_prompt"
    # The result stays Parquet: its job's own dataset.
    out = Path(server.tree["store"]) / "t" / "acme" / "jobs" / done.id / "data"
    assert pq.read_table(out).num_rows == 60
    done = wait_over(client, create(client, f"file://{server.folder}/acme/b*.parquet").id)
    assert done.status == "completed"
    bodies = [line["response"]["body"] for line in read_lines(client, done.output_file_id).values()]
    assert {body["usage"]["completion_tokens"] for body in bodies} <= {1, 2, 3}


def test_a_dataset_that_is_none_fails_in_its_own_words(server: Server) -> None:
    client = server.client()
    folder = server.folder / "acme" / "odd"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"question": ["x"]}), folder / "x.parquet")
    (folder / "text.parquet").write_text("no Parquet")
    for name, word in (("x.parquet", "messages"), ("text.parquet", "text.parquet"), ("gone.parquet", "gone.parquet")):
        done = wait_over(client, create(client, f"file://{folder}/{name}").id)
        assert done.status == "failed"
        assert done.errors is not None
        assert done.errors.data
        assert word in str(done.errors.data[0].message)
        assert done.errors.data[0].param == "input_file_id"


def test_prefixes_hold(server: Server) -> None:
    client, base = server.client(), f"file://{server.folder}"
    write_dataset(server.folder / "globex" / "theirs.parquet", 1)
    write_dataset(server.folder / "acme2" / "near.parquet", 1)
    for url in (
        f"{base}/globex/theirs.parquet",
        f"{base}/acme2/near.parquet",
        f"{base}/acme/../globex/theirs.parquet",
        f"{base}/acme/%2e%2e/globex/theirs.parquet",
        f"{base}/acme",
        f"{base}/*/theirs.parquet",
        "s3://other/acme/x.parquet",
        "http://169.254.169.254/acme/",
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            create(client, url)
        assert caught.value.param == "input_file_id"
    for url in (f"simplecache::{base}/acme/a.parquet", f"{server.folder}/acme/a.parquet", "FILE:///etc/passwd"):
        with pytest.raises(openai.NotFoundError):
            create(client, url, extra_body={})
    (server.folder / "acme").mkdir(exist_ok=True)
    (server.folder / "acme" / "link.parquet").symlink_to(server.folder / "globex" / "theirs.parquet")
    done = wait_over(client, create(client, f"{base}/acme/link.parquet").id)
    assert done.status == "failed"
    with pytest.raises(openai.NotFoundError):
        create(client, f"{base}/acme/a.parquet", extra_body={"model": "none"})
    with pytest.raises(openai.BadRequestError):
        create(client, f"{base}/acme/a.parquet", extra_body={})


@pytest.mark.parametrize(
    ("url", "is_fine"),
    [
        ("s3://b/acme/x.parquet", True),
        ("s3://b/acme/*/x.parquet", True),
        ("s3://b/acme", False),
        ("s3://b/acmeX/x", False),
        ("s3://b/acme/../x", False),
        ("s3://b/acme/./x", False),
        ("s3://b/acme/x?y=1", True),
        ("s3://b/other", False),
        ("S3://b/acme/x", False),
        ("s3://u:p@b/acme/x", False),
        ("s3://b/acme/\x00", False),
        ("s3://b/acme/..\\x", False),
    ],
)
def test_what_lies_below_a_prefix(url: str, is_fine: bool) -> None:
    assert is_allowed(url, ("s3://b/acme/",)) is is_fine
    assert is_allowed(url, ("s3://b/acme",)) is is_fine
    assert not is_allowed(url, ())


# ---- jobs of one's own


def start_job(server: Server, name: str, num_rows: int, engine: dict[str, object]) -> subprocess.Popen[bytes]:
    """As `ray job submit` would, below the endpoint's prefix."""
    out = server.folder / "jobs" / "acme" / name
    url = write_dataset(server.folder / "in" / f"{name}.parquet", num_rows)
    tree = {
        "input": {"paths": url, "custom_id": "custom_id"},
        "prompt": {"messages": "messages"},
        "engine": engine,
        "output": {"path": str(out), "rows_per_shard": 20, "journal_interval_s": 0.3},
        "cluster": CLUSTER,
        "retry": {"max_error_rate": 1},
    }
    spec = server.folder / f"{name}.yaml"
    spec.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "batchgen.cli", "run", str(spec)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def find_job(client: openai.OpenAI, name: str) -> openai.types.Batch | None:
    return next((each for each in client.batches.list(limit=100) if (each.metadata or {}).get("job") == name), None)


def test_a_job_started_elsewhere_is_listed_and_cancelled(server: Server) -> None:
    client = server.client()
    process = start_job(server, "nightly", 300, SLOW)
    try:
        while (job := find_job(client, "nightly")) is None or not (job.request_counts and job.request_counts.completed):
            assert process.poll() is None
            time.sleep(0.1)
        assert job.status == "in_progress"
        assert job.request_counts is not None
        assert job.request_counts.total == 300
        assert client.batches.retrieve(job.id).id == job.id
        with pytest.raises(openai.NotFoundError):
            server.client("globex").batches.retrieve(job.id)
        assert find_job(server.client("globex"), "nightly") is None
        assert client.batches.cancel(job.id).status in ("cancelling", "cancelled")
        assert process.wait(60) == 3
        assert client.batches.retrieve(job.id).status == "cancelled"
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(job.id)
    finally:
        process.kill()
        process.wait()


def test_a_job_that_ended_is_completed(server: Server) -> None:
    client = server.client()
    fast = {"kind": "simulated", "has_latency": False}
    assert start_job(server, "quick", 10, fast).wait(60) == 0
    job = find_job(client, "quick")
    assert job is not None
    assert job.status == "completed"
    assert job.status in TERMINAL
    assert job.request_counts is not None
    assert (job.request_counts.total, job.request_counts.completed, job.request_counts.failed) == (10, 9, 1)


def test_batchgen_cancel_of_a_batchs_job_cancels_the_batch(server: Server) -> None:
    client = server.client()
    url = write_dataset(server.folder / "acme" / "long.parquet", 400)
    batch = create(client, url, extra_body={"model": "slow"})
    while (counts := client.batches.retrieve(batch.id).request_counts) is None or not counts.completed:
        time.sleep(0.1)
    out = Path(server.tree["store"]) / "t" / "acme" / "jobs" / batch.id
    subprocess.run([sys.executable, "-m", "batchgen.cli", "cancel", str(out)], check=True, capture_output=True)
    done = wait_over(client, batch.id)
    assert done.status == "cancelled"
    assert done.request_counts is not None
    assert 0 < done.request_counts.completed < 400
    assert len(read_lines(client, done.output_file_id)) == done.request_counts.completed
    left = read_lines(client, done.error_file_id)
    assert {line["error"]["code"] for line in left.values() if line["response"] is None} == {"batch_cancelled"}
    status = subprocess.run(
        [sys.executable, "-m", "batchgen.cli", "verify", str(out)], check=False, capture_output=True, text=True
    )
    assert status.returncode == 0, status.stderr
    assert httpx.get(f"{server.url[:-3]}/health").status_code == 200
