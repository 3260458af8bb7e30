"""Real processes that end by SIGKILL at a named step, on a local disk, and replies that S3 loses at every step: the cells
of the crash-point matrix (`fault_sim.matrix`) where the operating system or a real client has a say."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from jobs_util import (
    SLOW_ENGINE,
    Tree,
    check_conserved,
    check_output,
    count_calls,
    list_output,
    make_tree,
    merge,
    read_bytes,
    read_folder,
    run,
    write_prompts,
    write_spec,
)
from s3_server import S3Proxy

from batchgen.chaos.faults import STEPS, WHENS, Fault, find_impossible, name_step, parse_fault
from batchgen.errors import SpecError
from batchgen.storage import Storage
from batchgen.verify.verify import verify

SIGKILLED = -9
# In the order of a job's life, so that each of them is still ahead when its run begins.
FAULTS = ["plan:torn:2", "lease:torn:1", "generate:after:9", "journal:torn:1", "create:torn:1", "create:after:1"]
FAULTS += ["stats:torn:1", "manifest:torn:2", "success:torn:1"]
MORE_FAULTS = ["list:before:1", "list:after:2", "plan:before:1", "plan:after:1", "plan:before:3", "lease:before:1"]
MORE_FAULTS += ["lease:after:1", "read:before:3", "read:after:4", "generate:before:5", "journal:before:1"]
MORE_FAULTS += ["journal:after:1", "create:before:1", "create:after:2", "stats:before:1", "stats:after:1"]
MORE_FAULTS += ["manifest:before:1", "manifest:after:3", "manifest:torn:4", "success:before:1", "success:after:1"]
STABLE = ["custom_id", "source_row", "sample_index", "text", "finish_reason", "prompt_tokens", "completion_tokens"]


def run_child(spec: str, fault: str) -> int:
    command = [sys.executable, "-m", "batchgen.chaos.child", spec, fault]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode


@pytest.mark.timeout(300)
@pytest.mark.parametrize("faults", [FAULTS, pytest.param(MORE_FAULTS, marks=pytest.mark.soak)], ids=["some", "more"])
def test_killed_at_every_step_in_turn(faults: list[str], tmp_path: Path) -> None:
    """One job, processes that die one after the other; what they leave together is what an undisturbed run makes."""
    files = write_prompts(tmp_path / "in", (30, 25))
    engine = {**SLOW_ENGINE, "decode_tokens_per_s": 60}
    tree = make_tree(tmp_path / "in", tmp_path / "out", engine=engine, output={"journal_interval_s": 0.05})
    calm = merge(tree, {"output": {"path": str(tmp_path / "calm")}, "engine": {"has_latency": False}})
    run(calm)
    spec = write_spec(tmp_path, tree)
    ended = {fault: run_child(spec, fault) for fault in faults}
    assert {fault for fault, code in ended.items() if code != SIGKILLED} == set()
    torn = [path for path in (tmp_path / "out/_batchgen/tmp").iterdir() if path.name != "replace.lock"]
    assert len(torn) >= sum(":torn:" in fault for fault in faults)
    report, _ = run(tree)
    assert report["exit_code"] == 0
    check_output(tmp_path / "out", files)
    check_conserved(tmp_path / "out", files)
    assert verify(Storage(str(tmp_path / "out")), with_input=True).exit_code == 0
    assert read_folder(tmp_path / "out").select(STABLE) == read_folder(tmp_path / "calm").select(STABLE)
    for path in list_output(tmp_path / "calm", "_batchgen/plan"):
        assert read_bytes(path.replace("/calm/", "/out/")) == read_bytes(path)


# ---- replies that are lost, of a real S3 client ------------------------------------------------------------------------

LOST = [r"lease/", r"plan/files", r"plan/shards", r"journal/", r"data/shard-", r"batch_stats/"]
LOST += [r"committed\.parquet", r"report\.json", r"report\.html", r"manifest\.json", r"_SUCCESS"]


@pytest.mark.s3
def test_our_own_object_is_ours_whatever_reply_is_lost(s3_url: str, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    """The client tries each again, meets what it wrote (412), and nothing is done twice for it."""
    files = write_prompts(f"{s3_url}/in", (30, 25))
    out = f"{s3_url}/out"
    engine = {**SLOW_ENGINE, "decode_tokens_per_s": 60}
    tree = make_tree(f"{s3_url}/in", out, tmp_path / "calls", engine=engine, output={"journal_interval_s": 0.05})
    for path in LOST:
        s3_proxy.drop_reply(path)
    report, view = run(tree)
    assert report["exit_code"] == 0
    assert [rule.pattern for rule in s3_proxy._rules if rule.times] == []
    assert view.warned == []
    check_output(out, files)
    check_conserved(out, files)
    assert set(read_folder(out, "batch_stats")["outcome"].to_pylist()) == {"committed"}
    assert count_calls(tmp_path / "calls") == 55
    assert verify(Storage(out)).exit_code == 0


# ---- what S3 likes -----------------------------------------------------------------------------------------------------


def count_requests(proxy: S3Proxy, out: str, tree: Tree) -> Counter[str]:
    """Requests of one run by what they are, without those that come with time (lease, status, the run's record)."""
    proxy.seen.clear()
    assert run(tree)[0]["exit_code"] == 0
    found: Counter[str] = Counter()
    for seen in proxy.seen:
        path, folder = seen.path, out.removeprefix("s3:/")
        is_list = seen.method == "GET" and "list-type" in seen.query
        place = path.removeprefix(f"{folder}/").partition("/")[0] if path.startswith(folder) else "input"
        if not any(word in path for word in ("/lease/", "status.json", "/runs/", "cancel-", "/probe/")):
            found["LIST" if is_list else f"{seen.method} {place}"] += 1
    return found


@pytest.mark.s3
def test_a_store_is_asked_for_little(s3_url: str, s3_proxy: S3Proxy) -> None:
    """One HEAD, one PUT and a few ranges of its input for each shard; everything else does not grow with the job."""
    write_prompts(f"{s3_url}/in", (64, 64))
    counts = {}
    for num_shards, rows in ((8, 16), (32, 4)):
        out = f"{s3_url}/out-{num_shards}"
        seldom = {"log_interval_s": 3600.0}  # what is written by the clock grows with a slow machine
        size = {"rows_per_shard": rows, "journal_interval_s": 60}
        tree = make_tree(f"{s3_url}/in", out, output=size, cluster=seldom)
        counts[num_shards] = count_requests(s3_proxy, out, tree)
        assert len(list_output(out, "data")) == num_shards
    few, many = counts[8], counts[32]
    grown = {what: many[what] - few[what] for what in many if many[what] != few[what]}
    assert grown == dict.fromkeys(["PUT data", "HEAD data", "HEAD input", "GET input"], 24)
    assert many["PUT data"] == 32
    assert sum(few.values()) - 4 * 8 <= 90


# ---- the plan of a fault -----------------------------------------------------------------------------------------------


def test_every_step_and_moment_has_a_word() -> None:
    assert {(fault.step, fault.when) for fault in map(parse_fault, [*FAULTS, *MORE_FAULTS])} >= {
        (step, when)
        for step in STEPS
        for when in WHENS
        if when in ("before", "after") or (when == "torn" and find_impossible(step, when) is None)
    }
    assert str(parse_fault("create:torn:12")) == "create:torn:12"
    assert parse_fault("create:torn:12") == Fault("create", "torn", 12)


@pytest.mark.parametrize(
    "text", ["", "create", "create:after", "create:after:0", "create:after:x", "eat:after:1", "a:b:c:d"]
)
def test_a_fault_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="write step:when:nth"):
        parse_fault(text)


@pytest.mark.parametrize(
    ("operation", "path", "step"),
    [
        ("list", "data", "list"),
        ("read", "s3://in/x.parquet", "read"),
        ("write", "_batchgen/spec.json", "plan"),
        ("write", "_batchgen/plan/files.parquet", "plan"),
        ("write", "_batchgen/lease/000000001.json", "lease"),
        ("delete", "_batchgen/journal/e1.parquet", "journal"),
        ("write", "data/shard-000000000.parquet", "create"),
        ("write", "batch_stats/run-000001.parquet", "stats"),
        ("write", "manifest.json", "manifest"),
        ("write", "report.html", "manifest"),
        ("delete", "_SUCCESS", "success"),
        ("write", "_batchgen/status.json", None),
    ],
)
def test_what_an_operation_is_called(operation: str, path: str, step: Any) -> None:
    assert name_step(operation, path) == step
