"""SIGKILL at random instants, to the engine's processes and to the process that holds the engine: nothing is lost, nothing
comes twice, nothing stays behind."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from jobs_util import check_conserved, check_output, make_tree, run, write_prompts
from trtllm_util import CHILD, KEEPER, RANK, SMALL, StandIn, create_stand_in, wait_until

from batchgen.engines.trtllm.orphans import sweep_orphans

NUM_KILLS = 20
SIZES = (260, 240)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return create_stand_in(tmp_path, monkeypatch)


class Killer(threading.Thread):
    """SIGKILL to the engine's process at random instants of its life, so many times: a third of them
    while it has requests, however fast this machine is, most of the others while it starts."""

    def __init__(self, stand_in: StandIn, seed: int) -> None:
        super().__init__(daemon=True)
        self._stand_in, self._random = stand_in, random.Random(seed)
        self.killed: set[int] = set()
        self.num_busy = 0
        self.is_over = threading.Event()

    def run(self) -> None:
        while len(self.killed) < NUM_KILLS and not self.is_over.is_set():
            found = [pid for pid in self._stand_in.list_pids(CHILD) if pid not in self.killed]
            if not found:
                time.sleep(0.005)
                continue
            self._wait_for_an_instant()
            try:
                os.kill(found[0], signal.SIGKILL)
            except ProcessLookupError:
                continue
            self.killed.add(found[0])
        self._stand_in.control(token_s=0.0)  # the rest need not take long

    def _wait_for_an_instant(self) -> None:
        num_before = self._stand_in.count_requests()
        if self._random.random() < 0.35:
            while self._stand_in.count_requests() <= num_before + 1 and not self.is_over.is_set():  # one is the canary
                time.sleep(0.01)
            self.num_busy += 1
        self.is_over.wait(self._random.uniform(0.0, 0.25))


def test_a_job_survives_twenty_kills(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.control(token_s=0.01)
    files = write_prompts(tmp_path / "in", SIZES)
    tree = make_tree(
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        output={"rows_per_shard": 50},
        cluster={"workers": {"min": 1, "max": 1}},
        retry={"max_attempts": 30, "max_deaths_alone": 30, "backoff_s": 0.01},
    )
    # No start is too many here, and a row that is there each time is only unlucky.
    tree["engine"] = {**SMALL, "max_inflight": 12, "max_restarts": 100}
    killer = Killer(stand_in, seed=7)
    killer.start()
    try:
        report, _ = run(tree)
    finally:
        killer.is_over.set()
        killer.join()
    assert len(killer.killed) == NUM_KILLS, "the job was over before it was tried hard enough"
    assert killer.num_busy >= 3
    rows = check_output(tmp_path / "out", files)
    assert [row["status"] for row in rows] == ["ok"] * sum(SIZES)
    check_conserved(tmp_path / "out", files)
    assert report["exit_code"] == 0
    stand_in.check_nothing_left()


# ---- the process that holds the engine

ACTOR = """
import asyncio, sys
from makers import make_job_spec
from trtllm_util import SMALL, make_request
from batchgen.engines import create_engine

async def main():
    engine = create_engine(make_job_spec(engine=SMALL))
    await engine.open()
    asking = [asyncio.ensure_future(engine.generate(make_request(row, max_tokens=400))) for row in range(4)]
    await asyncio.sleep(0.1)
    print("busy", flush=True)
    await asyncio.wait(asking)

asyncio.run(main())
"""


def start_actor(tmp_path: Path) -> "subprocess.Popen[str]":
    """A process that holds an engine with requests in flight."""
    script = tmp_path / "actor.py"
    script.write_text(ACTOR)
    paths = [str(Path(__file__).parent), os.environ["PYTHONPATH"]]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(tmp_path)}
    actor = subprocess.Popen([sys.executable, str(script)], env=env, stdout=subprocess.PIPE, text=True)
    assert actor.stdout is not None
    assert actor.stdout.readline() == "busy\n"
    return actor


def read_state(pid: int) -> str:
    """As /proc has it: R, S, T for stopped, Z."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("with_keeper", [False, True], ids=["actor", "actor and keeper"])
def test_nothing_outlives_the_actor(with_keeper: bool, stand_in: StandIn, tmp_path: Path) -> None:
    """Ranks that nobody tells anything hold their memory for good: the keeper ends them, or whoever starts next."""
    stand_in.control(token_s=0.01, max_natural_tokens=100_000, orphans=True)
    actor = start_actor(tmp_path)
    ranks = stand_in.list_pids(RANK)
    assert len(ranks) == 2
    assert sorted(pid for pids in stand_in.list_held().values() for pid in pids) == sorted(ranks)
    (keeper,) = stand_in.list_pids(KEEPER)
    if with_keeper:
        # While its owner stands, nobody sweeps a rank, whoever starts an engine on this machine meanwhile.
        os.kill(actor.pid, signal.SIGSTOP)
        wait_until(lambda: read_state(actor.pid) == "T", "the actor stands still")
        os.kill(keeper, signal.SIGKILL)
        wait_until(lambda: not stand_in.list_pids(CHILD), "the engine's process goes with the keeper")
        assert sorted(stand_in.list_pids(RANK)) == sorted(ranks), "the ranks are orphans"
    os.kill(actor.pid, signal.SIGKILL)
    actor.wait(60)
    assert actor.stdout is not None
    actor.stdout.close()
    if with_keeper:
        sweep_orphans()
    stand_in.check_nothing_left()
