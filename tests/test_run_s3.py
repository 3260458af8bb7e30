"""Whole jobs over an S3 server, and over a proxy that misbehaves as stores in the wild do."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jobs_util import (
    SLOW_ENGINE,
    RecordingView,
    Tree,
    call_cli,
    check_conserved,
    check_output,
    count_calls,
    get_key,
    list_output,
    make_prompts,
    make_tree,
    max_calls_within,
    merge,
    open_s3,
    put_file,
    put_files,
    read_bytes,
    read_folder,
    read_many,
    run,
    run_to_end,
    running,
    to_parquet,
    wait_for,
    write_file,
    write_prompts,
    write_spec,
)
from s3_server import S3Proxy

from batchgen.driver.run import run_job
from batchgen.specs.load import make_spec

pytestmark = pytest.mark.s3

SIZES = (4, 0, 9, 7)
NUM_ROWS = sum(SIZES)
Files = list[tuple[str, int]]


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    return tmp_path / "calls"


@pytest.fixture
def out(s3_url: str) -> str:
    return f"{s3_url}/out ü+1"


@pytest.fixture
def files(s3_url: str) -> Files:
    return write_prompts(f"{s3_url}/in", SIZES)


@pytest.fixture
def tree(s3_url: str, files: Files, out: str, calls: Path) -> Tree:
    del files
    return make_tree(f"{s3_url}/in", out, calls, output={"rows_per_shard": 5})


def check_no_secret(out: str, folder: Path) -> None:
    """In any file below the output and in all that the commands printed."""
    texts = read_many(list_output(out))
    texts |= {str(path): path.read_bytes() for path in folder.glob("cli-*")}
    assert len(texts) > 5
    assert [name for name, text in texts.items() if b"test-secret" in text] == []


def is_there(url: str) -> bool:
    return bool(open_s3().exists(url.removeprefix("s3://")))


# ---- a real-looking bucket -------------------------------------------------------------------------------------------


def write_many_files(s3_url: str) -> Files:
    """230 files in nested folders with odd names, every fifth with rows, and two that are not input."""
    tables = {
        f"{s3_url}/in/day {number % 5} é/part#{number % 3}%20[x]/日本 {number:03d}+&=.parquet": make_prompts(
            0 if number % 5 else 8, number
        )
        for number in range(228)
    }
    put_files({name: to_parquet(table) for name, table in tables.items()})
    put_files({f"{s3_url}/in/_SUCCESS": b"", f"{s3_url}/in/.hidden/x.parquet": b"no Parquet"})
    return sorted((name, table.num_rows) for name, table in tables.items())


def test_two_hundred_files_and_a_kill(s3_url: str, out: str, calls: Path, tmp_path: Path) -> None:
    files = write_many_files(s3_url)
    num_rows = sum(size for _, size in files)
    tree = make_tree(f"{s3_url}/in/", out, calls, engine={**SLOW_ENGINE, "slots": 16})
    put_file(f"{s3_url}/spec é.yaml", json.dumps(tree).encode())
    with running(tmp_path, f"{s3_url}/spec é.yaml") as job:
        wait_for(lambda: count_calls(calls) >= num_rows // 2 or not job.is_running)
        assert job.is_running, job.err
        job.kill()
    ended = run_to_end(tmp_path, f"{s3_url}/spec é.yaml")
    assert ended.code == 0, ended.err
    check_output(out, files)
    check_conserved(out, files)
    check_no_secret(out, tmp_path)
    assert list_output(out, "_batchgen/journal") == []
    assert count_calls(calls) <= num_rows + 2 * 12 + max_calls_within(calls, 0.3 + 0.3)


# ---- stores of different manners -------------------------------------------------------------------------------------


@pytest.fixture(params=["s3", "refusing", "ignoring"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param != "s3":
        proxy = request.getfixturevalue("s3_proxy")
        proxy.refuses_conditions, proxy.ignores_conditions = request.param == "refusing", request.param == "ignoring"
    return str(request.param)


def test_trial_run_replacement_and_no_more(kind: str, tree: Tree, files: Files, out: str, calls: Path) -> None:
    flaky = merge(tree, {"engine": {"failure_rate": 0.3}, "retry": {"max_attempts": 1}})
    _, view = run(flaky, limit=6)
    assert any("conditional writes" in warning for warning in view.warned) == (kind != "s3")
    trial = check_output(out, [(files[0][0], 4), (files[2][0], 2)])
    report, _ = run(flaky)
    assert report["exit_code"] == 1
    before = check_output(out, files)
    # What failed in the trial was tried again by the full run, and failed again.
    assert [row for row in before[:6] if row["status"] == "ok"] == [row for row in trial if row["status"] == "ok"]
    failed = {get_key(row) for row in before if row["status"] == "error"}
    assert 0 < len(failed) < NUM_ROWS
    num_calls = count_calls(calls)
    report, _ = run(tree)
    rows = check_output(out, files)
    check_conserved(out, files)
    assert report["exit_code"] == 0
    assert is_there(f"{out}/_SUCCESS")
    assert [row for row in rows if get_key(row) not in failed] == [row for row in before if row["status"] == "ok"]
    assert count_calls(calls) == num_calls + len(failed)
    _, view = run(tree)
    assert any("nothing left" in said for said in view.said)
    assert count_calls(calls) == num_calls + len(failed)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("kind", ["refusing", "ignoring"], indirect=True)  # on plain S3: with many files, above
def test_killed_and_resumed(tree: Tree, files: Files, out: str, calls: Path, tmp_path: Path) -> None:
    slow = merge(
        tree, {"engine": {**SLOW_ENGINE, "slots": 2, "max_inflight": 2}, "output": {"journal_interval_s": 0.1}}
    )
    with running(tmp_path, slow) as job:
        wait_for(lambda: count_calls(calls) >= 12 or not job.is_running)
        job.kill()
    ended = run_to_end(tmp_path, slow)
    assert ended.code == 0, ended.err
    check_output(out, files)
    check_conserved(out, files)
    check_no_secret(out, tmp_path)
    assert count_calls(calls) <= NUM_ROWS + 4 + max_calls_within(calls, 0.1 + 0.3)


def test_a_second_driver_is_refused(tree: Tree, files: Files, out: str, calls: Path, tmp_path: Path) -> None:
    slower = {**SLOW_ENGINE, "slots": 1, "max_inflight": 1, "decode_tokens_per_s": 5}
    slow = merge(tree, {"engine": slower, "cluster": {"lease_ttl_s": 3, "drain_s": 60}})
    with running(tmp_path, slow) as first:
        wait_for(lambda: count_calls(calls) >= 2 or not first.is_running)
        second = call_cli("run", write_spec(tmp_path, slow))
        assert second.code == 2, second.err
        assert f"process {first.process.pid}" in second.err
        first.process.terminate()  # it would take minutes
        assert first.wait().code == 3
    run(tree)
    check_output(out, files)
    assert count_calls(calls) == NUM_ROWS


# ---- replies that never come -----------------------------------------------------------------------------------------


def test_a_lost_reply_is_recognised_as_our_own_commit(
    s3_proxy: S3Proxy, tree: Tree, files: Files, out: str, calls: Path
) -> None:
    s3_proxy.drop_reply(r"/data/shard-", times=3)
    run(merge(tree, {"engine": {"failure_rate": 0.3}, "retry": {"max_attempts": 1}}))
    rows = check_output(out, files)
    num_bad = sum(row["status"] == "error" for row in rows)
    assert set(read_folder(out, "batch_stats")["outcome"].to_pylist()) == {"committed"}
    assert count_calls(calls) == NUM_ROWS
    s3_proxy.drop_reply(r"/data/shard-", times=1)  # of a replacement
    report, _ = run(tree)
    check_output(out, files)
    check_conserved(out, files)
    assert set(read_folder(out, "batch_stats")["outcome"].to_pylist()) == {"committed"}
    assert report["exit_code"] == 0
    assert count_calls(calls) == NUM_ROWS + num_bad


HELD = ["lease/", "plan/files", "plan/shards", "journal/", "data/shard-", "batch_stats/"]


@pytest.mark.parametrize("path", HELD)
def test_killed_between_a_write_and_its_reply(
    s3_proxy: S3Proxy, tree: Tree, files: Files, out: str, calls: Path, tmp_path: Path, path: str
) -> None:
    """The store has it, the driver never heard of it and is gone."""
    nth = 2 if path in {"journal/", "data/shard-"} else 1
    held = s3_proxy.hold_reply(re.escape(path), nth=nth)
    engine = {**SLOW_ENGINE, "slots": 2} if path == "journal/" else {}
    with running(tmp_path, merge(tree, {"engine": engine, "output": {"journal_interval_s": 0.1}})) as job:
        assert held.is_forwarded.wait(120), job.err
        job.kill()
    held.release()
    num_calls = count_calls(calls)
    committed = {name: read_bytes(name) for name in list_output(out, "data")}
    assert committed or path != "data/shard-"
    report, _ = run(tree)
    assert report["exit_code"] == 0
    check_output(out, files)
    check_conserved(out, files)
    assert is_there(f"{out}/_SUCCESS")
    assert {name: read_bytes(name) for name in committed} == committed
    if path == "batch_stats/":
        assert count_calls(calls) == num_calls == NUM_ROWS


# ---- a store that has had enough -------------------------------------------------------------------------------------


def test_bursts_of_slow_down(s3_proxy: S3Proxy, tree: Tree, files: Files, out: str, calls: Path) -> None:
    for method, pattern in (("PUT", "/data/"), ("PUT", "/lease/"), ("GET", "/in/"), ("HEAD", "/data/"), ("GET", "")):
        s3_proxy.answer(503, "SlowDown", pattern=pattern, method=method, times=2 if pattern == "/data/" else 1)
    report, _ = run(tree)
    assert report["exit_code"] == 0
    check_output(out, files)
    check_conserved(out, files)
    assert count_calls(calls) == NUM_ROWS


def test_longer_trouble_gives_the_shard_back(
    s3_proxy: S3Proxy, tree: Tree, files: Files, out: str, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client gives up: what is finished is journaled, and the shard is lent again."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3_proxy.answer(503, "SlowDown", pattern="/data/shard-000000000", method="PUT", times=2)
    report, view = run(tree)
    assert report["exit_code"] == 0
    assert any("slow down" in warning for warning in view.warned)
    check_output(out, files)
    check_conserved(out, files)
    assert count_calls(calls) == NUM_ROWS


def test_endless_trouble_stops_the_run(
    s3_proxy: S3Proxy, tree: Tree, files: Files, out: str, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3_proxy.answer(403, "AccessDenied", pattern="/data/shard-", method="PUT", times=30)
    report, _ = run(merge(tree, {"retry": {"max_shard_attempts": 2}}))
    assert report["exit_code"] == 3
    assert "access is denied" in report["message"]
    s3_proxy.answer(200, "", pattern="never", times=0)
    for rule in s3_proxy._rules:
        rule.times = 0
    assert run(tree)[0]["exit_code"] == 0
    check_output(out, files)
    assert count_calls(calls) == NUM_ROWS


def test_input_that_changes_under_a_run_stops_it(tree: Tree, files: Files) -> None:
    class Changer(RecordingView):
        def show(self, progress: Any) -> None:
            if not self.shown:
                write_file(files[-1][0], make_prompts(files[-1][1], 1000))
            self.shown.append(progress)

    slow = merge(tree, {"engine": {**SLOW_ENGINE, "max_inflight": 1, "startup_s": 0.2}})
    report = run_job(make_spec(slow), Changer())
    assert report["exit_code"] == 3
    assert files[-1][0] in report["message"]
    assert "changed" in report["message"]


# ---- refused at once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "env", "word"),
    [
        ("no bucket for output", {}, "bucket does not exist"),
        ("no bucket for input", {}, "bucket does not exist"),
        ("no keys", {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no usable AWS credentials"),
        ("nobody answers", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}, "cannot be reached"),
        ("no such spec", {}, "no such file"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused(
    tree: Tree, tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch, where: str, env: Any, word: str
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    if where == "no bucket for output":
        tree = merge(tree, {"output": {"path": "s3://nowhere-at-all/out"}})
    elif where == "no bucket for input":
        tree = merge(tree, {"input": {"paths": ["s3://nowhere-at-all/in"]}})
    spec = "s3://bucket/no spec.yaml" if where == "no such spec" else None
    ended = call_cli("run", spec or write_spec(tmp_path, tree))
    assert ended.code == 2, ended.err
    assert word in ended.err
    assert "Traceback" not in ended.err
    assert len([line for line in ended.err.splitlines() if line.strip()]) == 1
    assert count_calls(calls) == 0
