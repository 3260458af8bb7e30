"""Fifty SIGKILLs of actors, nodes and the driver over one job of 20,000 rows on a real Ray cluster: nothing lost, nothing
twice, and the useful work beside that of the same run without kills. `make soak`; minutes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from jobs_util import Tree, make_tree, write_prompts, write_spec
from ray_cluster import RayCluster, run_ray_cluster

from batchgen.chaos.chaos import read_keys
from batchgen.storage import Storage
from batchgen.verify.verify import verify

pytestmark = [pytest.mark.soak, pytest.mark.ray, pytest.mark.timeout(3600)]

NUM_ROWS = 20_000
NUM_KILLS = 50
NUM_NODES = 2
SLOTS, TOKENS_PER_S, MEAN_TOKENS = 48, 160, 60
WEIGHTS = {"actor": 5, "driver": 3, "node": 2}


class Job:
    """The job, submitted again as often as it takes, and what is killed of it."""

    def __init__(self, cluster: RayCluster, folder: Path, name: str) -> None:
        self.cluster, self.folder, self.out = cluster, folder, folder / name
        self.calls = folder / f"calls-{name}"
        engine = {"has_latency": True, "slots": SLOTS, "max_inflight": 72, "mean_tokens": MEAN_TOKENS, "sigma": 0.5}
        settings: Tree = {
            "engine": {**engine, "decode_tokens_per_s": TOKENS_PER_S},
            "sampling": {"max_tokens": 256},
            "output": {"rows_per_shard": 250, "journal_interval_s": 1.0},
            "cluster": {"pool": "ray", "workers": {"min": NUM_NODES, "max": NUM_NODES}, "placement": "SPREAD"},
            "retry": {"max_shard_attempts": 20, "max_start_failures": 50},
        }
        self.spec = write_spec(folder, make_tree(folder / "in", self.out, self.calls, **settings))
        self.num_runs = 0
        self.driver = self.submit()

    def submit(self) -> "subprocess.Popen[bytes]":
        self.num_runs += 1
        env = {**self.cluster.env, "RAY_ADDRESS": self.cluster.address}
        command = [sys.executable, "-m", "batchgen.cli", "run", self.spec, "--json"]
        with (self.folder / f"log-{self.out.name}").open("ab") as log:
            return subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def count_calls(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.calls.glob("calls-*.jsonl"))

    def list_actors(self) -> list[int]:
        pids = [int(path.stem.partition("-")[2]) for path in self.calls.glob("calls-*.jsonl")]
        return [pid for pid in pids if Path(f"/proc/{pid}").exists()]

    def wait_for_calls(self, num_calls: int) -> bool:
        """False where the job ended; a run that stopped is submitted again."""
        give_up_at = time.monotonic() + 60
        while self.count_calls() < num_calls:
            if (code := self.driver.poll()) is not None:
                if code in (0, 1):
                    return False
                self.driver = self.submit()
            if time.monotonic() > give_up_at:
                return True  # whatever holds it up is killed as well
            time.sleep(0.1)
        return True


def strike(job: Job, nodes: list[int], rng: random.Random) -> str | None:
    """Kill something that lives; what it was."""
    kinds = [kind for kind in WEIGHTS if kind != "actor" or job.list_actors()]
    kind = rng.choices(kinds, [WEIGHTS[kind] for kind in kinds])[0]
    with suppress(ProcessLookupError):
        if kind == "actor":
            os.kill(rng.choice(job.list_actors()), signal.SIGKILL)
        elif kind == "driver":
            job.driver.kill()
            job.driver.wait()
            job.driver = job.submit()
        else:
            os.kill(nodes.pop(rng.randrange(len(nodes))), signal.SIGKILL)
            nodes.append(job.cluster.add_node(engines=1))
        return kind
    return None


def measure(job: Job, elapsed_s: float) -> dict[str, Any]:
    rows = read_keys(Storage(str(job.out)))
    distinct = rows.group_by(["source_file", "source_row", "sample_index"]).aggregate([]).num_rows
    tokens = sum(rows["completion_tokens"].to_pylist())
    verdict = verify(Storage(str(job.out)))
    assert verdict.findings == []
    assert verdict.exit_code == 0, verdict.todo
    assert Counter(rows["status"].to_pylist()) == {"ok": NUM_ROWS}
    return {
        "lost": NUM_ROWS - distinct,
        "twice": rows.num_rows - distinct,
        "generated_again": job.count_calls() - NUM_ROWS,
        "runs": job.num_runs,
        "elapsed_s": round(elapsed_s, 1),
        "useful_work": round(tokens / TOKENS_PER_S / (SLOTS * NUM_NODES * elapsed_s), 3),
    }


def test_fifty_kills(tmp_path: Path) -> None:
    write_prompts(tmp_path / "in", (12_000, 8_000))
    results: dict[str, Any] = {}
    with run_ray_cluster(tmp_path / "home", {}, num_cpus=0) as cluster:
        nodes = [cluster.add_node(engines=1) for _ in range(NUM_NODES)]
        for name, num_kills in (("calm", 0), ("struck", NUM_KILLS)):
            rng, kills, started = random.Random(1), Counter[str](), time.monotonic()
            job = Job(cluster, tmp_path, name)
            while kills.total() < num_kills:
                step = max(1, (NUM_ROWS - job.count_calls()) // (num_kills - kills.total() + 1))
                assert job.wait_for_calls(job.count_calls() + rng.randint(step // 2 + 1, step + 1)), kills
                if (kind := strike(job, nodes, rng)) is not None:
                    kills[kind] += 1
                    print(f"kill {kills.total()}: {kind}, after {job.count_calls()} requests", flush=True)
            while job.wait_for_calls(10**9):
                assert time.monotonic() - started < 1800, (tmp_path / f"log-{name}").read_text()[-3000:]
            results[name] = {**measure(job, time.monotonic() - started), "kills": dict(kills)}
    print(json.dumps(results, indent=1))
    for result in results.values():
        assert (result["lost"], result["twice"]) == (0, 0)
    assert sum(results["struck"]["kills"].values()) == NUM_KILLS
    assert set(results["struck"]["kills"]) == set(WEIGHTS)
