"""Stores that fill up, turn read-only or vanish, inputs that change: a clear stop, nothing torn, resumable."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs_util import (
    CliRun,
    check_conserved,
    check_output,
    count_calls,
    list_output,
    make_prompts,
    make_tree,
    merge,
    run,
    run_to_end,
    running,
    wait_for,
    write_file,
    write_prompts,
    write_spec,
)

SLOW = {"has_latency": True, "slots": 8, "max_inflight": 8, "decode_tokens_per_s": 200, "sigma": 0.3}
# Tried a few times and then given up within seconds, not minutes.
HASTY = {"cluster": {"lease_ttl_s": 6, "drain_s": 1}, "retry": {"max_shard_attempts": 2}}


def check_nothing_torn(folder: Path) -> None:
    for path in sorted((folder / "data").glob("*")):
        assert pq.read_table(path).num_rows > 0, path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(small_disk: Path, tmp_path: Path) -> None:
    files = write_prompts(tmp_path / "in", (600,))
    out = small_disk / "out"
    tree = make_tree(tmp_path / "in", out, tmp_path / "calls", engine=SLOW, **HASTY)
    ended = run_to_end(tmp_path, tree)
    assert ended.code == 3, ended.err
    assert "Traceback" not in ended.err
    assert "the disk is full; free some space" in ended.err
    check_nothing_torn(out)
    assert len(list_output(out, "data")) >= 3
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert run_to_end(tmp_path, merge(tree, {"engine": {"has_latency": False}})).code == 0
    check_output(out, files)
    check_conserved(out, files)


def test_a_disk_that_is_full_from_the_start_is_a_refusal(small_disk: Path, tmp_path: Path) -> None:
    write_prompts(tmp_path / "in", (20,))
    with (small_disk / "ballast").open("wb") as file:
        file.write(bytes(2**20 - 8192))
    ended = run_to_end(tmp_path, make_tree(tmp_path / "in", small_disk / "out"))
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err


def test_an_output_that_turns_read_only_stops_the_run(small_disk: Path, tmp_path: Path) -> None:
    files = write_prompts(tmp_path / "in", (300,))
    out = small_disk / "out"
    tree = make_tree(tmp_path / "in", out, tmp_path / "calls", engine=SLOW, **HASTY)
    with running(tmp_path, tree) as job:
        wait_for(lambda: len(list_output(out, "data")) >= 3 or not job.is_running)
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        ended = job.wait()
    assert ended.code == 3, ended.err
    assert "Traceback" not in ended.err
    check_nothing_torn(out)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert run_to_end(tmp_path, merge(tree, {"engine": {"has_latency": False}})).code == 0
    check_output(out, files)


@pytest.mark.s3
@pytest.mark.usefixtures("s3_url")
def test_a_bucket_that_is_deleted_stops_the_run(tmp_path: Path) -> None:
    client: Any = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket="short-lived")
    write_prompts(tmp_path / "in", (300,))
    out = "s3://short-lived/out"
    tree = make_tree(tmp_path / "in", out, tmp_path / "calls", engine=SLOW, **HASTY)
    job = CliRun(tmp_path, "run", write_spec(tmp_path, tree), "--json")
    try:
        wait_for(lambda: len(list_output(out, "data")) >= 3 or not job.is_running)
        bucket = boto3.resource("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).Bucket("short-lived")
        give_up_at = time.monotonic() + 120
        while True:
            assert time.monotonic() < give_up_at
            try:
                bucket.objects.all().delete()
                bucket.delete()
                break
            except client.exceptions.ClientError:
                continue  # the run wrote something in between
        ended = job.wait()
    finally:
        if job.is_running:
            job.kill()
    assert ended.code == 3, ended.err
    assert "Traceback" not in ended.err


def test_an_input_that_is_replaced_in_mid_run_stops_it_by_name(tmp_path: Path) -> None:
    """Rows of two versions in one dataset would be nobody's data."""
    files = write_prompts(tmp_path / "in", (40, 400))
    tree = make_tree(tmp_path / "in", tmp_path / "out", tmp_path / "calls", engine=SLOW)
    original = Path(files[1][0]).read_bytes()
    timer = threading.Thread(target=_replace_when_running, args=(tmp_path, files[1][0]))
    timer.start()
    report, view = run(tree)
    timer.join()
    assert report["exit_code"] == 3
    assert "part-001.parquet" in report["message"]
    check_nothing_torn(tmp_path / "out")
    Path(files[1][0]).write_bytes(original)
    stale = run_to_end(tmp_path, tree)
    assert (stale.code, "was changed since it was planned" in stale.err) == (2, True), "another mtime is another file"
    assert not any("Traceback" in warned for warned in view.warned)


def _replace_when_running(tmp_path: Path, name: str) -> None:
    wait_for(lambda: count_calls(tmp_path / "calls") >= 30)
    table: pa.Table = make_prompts(400, first=5000)
    write_file(name, table)
