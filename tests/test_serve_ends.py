"""Batches whose model is changed or gone before they ended: finished rows are kept, every request is accounted for."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from serve_process import (
    CHAT,
    Server,
    check_left_over,
    create,
    end_window,
    make_endpoint_tree,
    make_line,
    read_lines,
    wait_for,
    wait_over,
)

from batchgen.serve.state import State
from batchgen.storage import Storage
from batchgen.verify.verify import verify

NUM_ROWS = 120


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    tenants = {"acme": {"inputs": [f"file://{tmp_path}/in"]}}
    found = Server(tmp_path / "endpoint", make_endpoint_tree(str(tmp_path / "store"), tenants=tenants))
    found.start()
    try:
        yield found
    finally:
        found.stop()


def start_again(server: Server, **models: Any) -> openai.OpenAI:
    """Killed, and started with these models beside the fast one."""
    server.kill()
    fast = server.tree["models"]["fast"]
    server.spec.write_text(yaml.safe_dump({**server.tree, "models": {"fast": fast, **models}}))
    server.start()
    return server.client()


def begin(server: Server) -> openai.types.Batch:
    """Some rows are finished, and journaled."""
    client = server.client()
    batch = create(client, [make_line(f"r{number}", model="slow") for number in range(NUM_ROWS)])
    while (counts := client.batches.retrieve(batch.id).request_counts) is None or counts.completed < 16:
        time.sleep(0.1)
    return batch


def check_kept(server: Server, done: openai.types.Batch, code: str) -> None:
    counts = done.request_counts
    assert counts is not None
    assert counts.total == NUM_ROWS
    assert 8 <= counts.completed < NUM_ROWS
    check_left_over(server.client(), done, code)
    assert verify(Storage(State(server.tree["store"]).job_url("acme", done.id))).findings == []


def test_a_model_that_was_changed_fails_the_batch_and_keeps_its_rows(server: Server) -> None:
    batch = begin(server)
    client = start_again(server, slow={**server.tree["models"]["slow"], "sampling": {"temperature": 0.5}})
    done = wait_over(client, batch.id)
    assert done.status == "failed"
    assert done.failed_at is not None
    assert done.errors is not None
    assert done.errors.data
    assert done.errors.data[0].code == "job_refused"
    check_kept(server, done, "batch_failed")
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_a_batch_whose_model_is_gone_waits_for_it_and_expires_with_its_rows(server: Server) -> None:
    batch = begin(server)
    client = start_again(server)
    time.sleep(1.5)  # long enough for a look at it
    assert client.batches.retrieve(batch.id).status == "in_progress"
    State(server.tree["store"]).change_batch("acme", batch.id, end_window)
    done = wait_over(client, batch.id)
    assert done.status == "expired"
    check_kept(server, done, "batch_expired")


def test_a_batch_that_never_began_can_be_cancelled_without_its_model(server: Server) -> None:
    """Its lines were read; no run of it was ever started, for others had all the room."""
    client = server.client()
    for _ in range(3):
        create(client, [make_line(f"r{number}", model="slow") for number in range(NUM_ROWS)], completion_window="1h")
    batch = create(client, [make_line(f"r{number}", model="slow") for number in range(NUM_ROWS)])
    wait_for(client, batch.id, {"in_progress"})
    client = start_again(server)
    client.batches.cancel(batch.id)
    done = wait_over(client, batch.id)
    assert done.status == "cancelled"
    assert done.request_counts is not None
    assert (done.request_counts.completed, done.request_counts.failed) == (0, NUM_ROWS)
    assert len(read_lines(client, done.error_file_id)) == NUM_ROWS


def test_a_dataset_that_goes_away_fails_the_batch_and_keeps_what_was_committed(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.parquet"
    path.parent.mkdir()
    chats = [json.dumps([{"role": "user", "content": f"say {row}"}]) for row in range(NUM_ROWS)]
    pq.write_table(pa.table({"custom_id": [f"r{row}" for row in range(NUM_ROWS)], "messages": chats}), path)
    client = server.client()
    asked: Any = {"endpoint": CHAT, "completion_window": "24h", "extra_body": {"model": "slow"}}
    batch = client.batches.create(input_file_id=f"file://{path}", **asked)
    job = Storage(State(server.tree["store"]).job_url("acme", batch.id))
    while not job.list_files("data", suffix=".parquet"):
        time.sleep(0.1)
    server.kill()
    path.unlink()
    server.start()
    client = server.client()
    done = wait_over(client, batch.id)
    assert done.status == "failed"
    assert done.errors is not None
    assert done.errors.data
    assert "a.parquet" in str(done.errors.data[0].message)
    assert done.request_counts is not None
    assert done.request_counts.total == NUM_ROWS
    assert 0 < done.request_counts.completed < NUM_ROWS
    assert len(read_lines(client, done.output_file_id)) == done.request_counts.completed
