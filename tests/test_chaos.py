"""`batchgen chaos`: real kills of real processes, and the count that it makes of what they left."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs_util import SLOW_ENGINE, Tree, list_output, make_tree, run_cli, write_prompts, write_spec
from jobs_util import read_folder as read_output
from ray_cluster import run_ray_cluster

from batchgen.chaos import chaos
from batchgen.chaos.chaos import make_chaos_spec, make_verdict, run_chaos
from batchgen.driver.job import limit_rows
from batchgen.errors import Refusal
from batchgen.specs.load import make_spec

NUM_ROWS = 120


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    write_prompts(tmp_path / "in", (70, 50))
    engine = {**SLOW_ENGINE, "slots": 24, "max_inflight": 32}
    return make_tree(tmp_path / "in", tmp_path / "out", engine=engine, output={"rows_per_shard": 16})


def check_results(verdict: dict[str, Any], num_kills: int, num_rows: int = NUM_ROWS) -> None:
    calm, struck = verdict["calm"], verdict["chaos"]
    assert (calm["kills"], calm["num_runs"], calm["regenerated"]) == ({}, 1, 0)
    assert sum(struck["kills"].values()) == num_kills
    assert struck["num_runs"] > 1
    for result in (calm, struck):
        assert (result["rows"], result["lost"], result["twice"], result["findings"]) == (num_rows, 0, 0, [])
    assert struck["generated"] == num_rows + struck["regenerated"]
    # Which is larger depends on the machine in so short a job: elsewhere it is measured, not asserted.
    assert 0 < struck["useful_work"] < 1
    assert 0 < calm["useful_work"] < 1


def test_a_job_is_killed_and_counted(tree: Tree, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    args = ["--store", store, "--seed", "3", "--kills", "2", "--json"]
    ended = run_cli(tmp_path, "chaos", write_spec(tmp_path, tree), *args)
    assert ended.code == 0, ended.err
    check_results(ended.report, 2)
    assert not (tmp_path / "out").exists()
    assert ended.report["chaos"]["output"].startswith(f"{store}/batchgen-chaos-")
    assert read_output(ended.report["chaos"]["output"]).num_rows == NUM_ROWS
    assert "kill 2: " in ended.err
    assert "lost 0, twice 0, generated again" in ended.err


@pytest.mark.s3
def test_on_a_store_that_speaks_s3(tree: Tree, s3_url: str) -> None:
    said: list[str] = []
    spec = limit_rows(make_spec(tree), 48)
    verdict = run_chaos(spec, s3_url, seed=5, num_kills=1, pool="inline", say=said.append)
    check_results(verdict, 1, 48)
    assert verdict["exit_code"] == 0
    assert len([line for line in said if line.startswith("kill ")]) == 1


def test_what_is_lost_is_told(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the output is taken away and another one doubled, before the rows are counted."""
    read_keys = chaos.read_keys

    def damage(storage: Any) -> Any:
        first, second, *_ = [Path(name) for name in list_output(storage.root, "data")]
        second.write_bytes(first.read_bytes())
        return read_keys(storage)

    monkeypatch.setattr(chaos, "read_keys", damage)
    verdict = run_chaos(
        make_spec(tree), str(tmp_path / "store"), seed=0, num_kills=0, pool="inline", say=lambda _: None
    )
    assert verdict["exit_code"] == 1
    assert verdict["chaos"]["lost"] == verdict["chaos"]["twice"] > 0
    assert verdict["chaos"]["findings"]


def test_a_job_that_cannot_work_is_refused_before_anything_is_started(tree: Tree, tmp_path: Path) -> None:
    bad = make_spec({**tree, "prompt": {"column": "no such column"}})
    with pytest.raises(Refusal, match="no such column"):
        run_chaos(bad, str(tmp_path / "store"), seed=0, num_kills=1, pool="inline", say=lambda _: None)
    ended = run_cli(tmp_path, "chaos", str(tmp_path / "nothing.yaml"), "--store", str(tmp_path / "store"))
    assert ended.code == 2
    assert "Traceback" not in ended.err


def test_any_job_becomes_one_with_a_simulated_engine() -> None:
    tree = make_tree("/in", "/out", engine={"kind": "transformers", "max_inflight": 7})
    for name in ("has_latency", "mean_tokens", "sigma"):
        del tree["engine"][name]
    tree["model"] = {"path": "/models/x", "max_model_len": 4096}
    tree["cluster"]["gpus_per_worker"] = 8
    spec = make_chaos_spec(make_spec(tree), "s3://bucket/x", "/tmp/calls", "ray")
    assert (spec.engine.kind, spec.engine.max_inflight, spec.cluster.pool) == ("simulated", 7, "ray")
    assert (spec.model.path, spec.model.max_model_len, spec.cluster.gpus_per_worker) == ("embedded", 4096, 0)
    assert spec.output.path == "s3://bucket/x"
    assert make_spec(json.loads(spec.model_dump_json())) == spec


def test_nobody_is_killed_who_only_has_a_workers_number(tree: Tree, tmp_path: Path) -> None:
    """Logs of a worker that is gone, and of one whose number another process has now."""
    runner = chaos._Runner(make_chaos_spec(make_spec(tree), "/out", "/calls", "ray"), tmp_path, random.Random(0), print)
    (tmp_path / "calls").mkdir()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        (tmp_path / f"calls/calls-{child.pid}.jsonl").touch()
        assert runner._list_workers() == [child.pid]
        began = runner._began[child.pid]
        assert began is not None
        runner._began[child.pid] = began - 1
        assert runner._list_workers() == []
        runner._began[child.pid] = began
        child.kill()
    assert runner._list_workers() == []


def test_one_finding_is_enough_for_exit_code_1() -> None:
    plain = {"output": "o", "num_runs": 1, "kills": {}, "elapsed_s": 1.0, "rows_wanted": 2, "rows": 2, "rows_error": 0}
    good = chaos.Result(**plain, lost=0, twice=0, generated=None, useful_work=0.5, findings=())
    bad = chaos.Result(**plain, lost=0, twice=0, generated=2, useful_work=0.5, findings=("x: is gone; restore it",))
    assert make_verdict(good, good, 1)["exit_code"] == 0
    assert make_verdict(good, good, 1)["chaos"]["regenerated"] is None
    assert make_verdict(good, bad, 1)["exit_code"] == 1


# ---- soak: `make soak` ------------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_actors_and_the_driver_are_killed_on_ray(tmp_path: Path) -> None:
    """Eight kills of a job of 2,000 rows, by the command, on a cluster that is there."""
    write_prompts(tmp_path / "in", (1200, 800))
    engine = {**SLOW_ENGINE, "slots": 24, "max_inflight": 32, "decode_tokens_per_s": 30}
    settings: Tree = {"output": {"rows_per_shard": 100}, "retry": {"max_shard_attempts": 20, "max_start_failures": 50}}
    spec = write_spec(tmp_path, make_tree(tmp_path / "in", tmp_path / "out", engine=engine, **settings))
    home = tmp_path / "home"
    home.mkdir()
    with run_ray_cluster(home, {}, num_cpus=4) as cluster:
        command = [sys.executable, "-m", "batchgen.cli", "chaos", spec, "--store", str(tmp_path / "store")]
        command += ["--seed", "1", "--kills", "8", "--pool", "ray", "--json"]
        env = {**cluster.env, "RAY_ADDRESS": cluster.address}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    verdict = json.loads(done.stdout.splitlines()[-1])
    print(done.stderr)
    for result in (verdict["calm"], verdict["chaos"]):
        assert (result["rows"], result["lost"], result["twice"], result["findings"]) == (2000, 0, 0, [])
    assert sum(verdict["chaos"]["kills"].values()) == 8
    assert verdict["chaos"]["kills"]["worker"] > 0
