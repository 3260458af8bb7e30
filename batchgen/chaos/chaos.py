"""`batchgen chaos`: a job of the user's on a store of the user's, with a simulated engine and real kills; then a count.

The code is what runs in production: driver, workers, journal, commits, leases. Its processes are ended by SIGKILL, at
moments and at named steps (`faults`) that a seed chooses, and the job is submitted again until it is done. The same job
is run without kills first, and what both cost is said side by side. Everything lies below a fresh folder of the store,
which is left there to be looked at. Nothing but processes that were started for this is ever killed.
"""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from batchgen.chaos.faults import STEPS, WHENS, Fault, find_impossible
from batchgen.driver.job import open_job
from batchgen.engines.trtllm.keeper import is_alive, read_stat
from batchgen.errors import OutputError, RunStopped
from batchgen.parquet import ParquetFile
from batchgen.spec import JobSpec, ModelSpec
from batchgen.specs.engine import SimulatedEngineSpec
from batchgen.storage import Storage
from batchgen.verify.verify import verify
from batchgen.write import KEY_FIELDS

Pool = Literal["inline", "ray"]
Say = Callable[[str], None]
POLL_S = 0.05
# A job that is killed again and again must still end: this many runs more than there are kills.
MAX_MORE_RUNS = 20
# No new call to an engine for so long: the run hangs, or waits for a lease; it is killed all the same.
MAX_SILENCE_S = 60.0
STEP_SHARE = 0.4
KEYS = [field.name for field in KEY_FIELDS[1:]]


@dataclass(frozen=True, slots=True)
class Result:
    """What a job cost and left. `generated`: calls to engines, None where they ran on other machines; `useful_work`: tokens
    in the output, as seconds of a slot, by slots x time."""

    output: str
    num_runs: int
    kills: dict[str, int]
    elapsed_s: float
    rows_wanted: int
    rows: int
    rows_error: int
    lost: int
    twice: int
    generated: int | None
    useful_work: float
    findings: tuple[str, ...]

    @property
    def is_conserved(self) -> bool:
        return self.lost == self.twice == 0 and not self.findings

    @property
    def regenerated(self) -> int | None:
        """Calls beyond one a row, of those that are generations."""
        return None if self.generated is None else self.generated - (self.rows - self.rows_error)


def make_chaos_spec(spec: JobSpec, output: str, call_log: str, pool: Pool) -> JobSpec:
    """The job with a simulated engine and another place for its output; waits for dead processes are short."""
    engine = spec.engine
    if not isinstance(engine, SimulatedEngineSpec):
        engine = SimulatedEngineSpec(kind="simulated", max_inflight=engine.max_inflight)
    cluster = spec.cluster.model_copy(update={"pool": pool, "lease_ttl_s": 10.0, "gpus_per_worker": 0.0})
    journal = {"path": output, "journal_interval_s": min(1.0, spec.output.journal_interval_s), "lock_url": None}
    return spec.model_copy(
        update={
            "engine": engine.model_copy(update={"call_log": call_log}),
            "model": ModelSpec(max_model_len=spec.model.max_model_len),
            "output": spec.output.model_copy(update=journal),
            "cluster": cluster,
        }
    )


def run_chaos(spec: JobSpec, store: str, *, seed: int, num_kills: int, pool: Pool, say: Say) -> dict[str, Any]:
    """Both jobs, calm first; what came of them, with `exit_code` 0 where every row is there once. Raises RunStopped where
    a job does not end, and what `open_job` refuses."""
    folder = f"{store.rstrip('/')}/batchgen-chaos-{uuid.uuid4().hex[:8]}"
    results = {}
    for name, kills in (("calm", 0), ("chaos", num_kills)):
        with tempfile.TemporaryDirectory(prefix="batchgen-chaos-") as local:
            chaos_spec = make_chaos_spec(spec, f"{folder}/{name}", f"{local}/calls", pool)
            open_job(chaos_spec, Storage(chaos_spec.output.path))
            say(f"{name}: {kills} kills, output in {chaos_spec.output.path}")
            runner = _Runner(chaos_spec, Path(local), random.Random(seed), say)
            results[name] = runner.run_to_end(kills)
    return make_verdict(results["calm"], results["chaos"], seed)


def make_verdict(calm: Result, chaos: Result, seed: int) -> dict[str, Any]:
    def show(result: Result) -> dict[str, Any]:
        return {**asdict(result), "findings": list(result.findings), "regenerated": result.regenerated}

    is_right = calm.is_conserved and chaos.is_conserved
    return {"seed": seed, "calm": show(calm), "chaos": show(chaos), "exit_code": 0 if is_right else 1}


class _Runner:
    """Submits one job until it is done, and kills what it started on the way."""

    def __init__(self, spec: JobSpec, local: Path, rng: random.Random, say: Say) -> None:
        self._spec, self._local, self._rng, self._say = spec, local, rng, say
        self._path = local / "spec.json"
        self._path.write_text(spec.model_dump_json())  # JSON is YAML
        self._calls = Path(str(local / "calls"))
        self._kills: dict[str, int] = {}
        self._began: dict[int, int | None] = {}
        self._num_runs = 0

    def run_to_end(self, num_kills: int) -> Result:
        started = time.monotonic()
        wanted = open_job(self._spec, Storage(self._spec.output.path)).num_wanted_rows * self._spec.sampling.n
        while True:
            left = num_kills - sum(self._kills.values())
            with self._running(self._choose_fault() if left > 0 else None) as child:
                code = self._watch(child, wanted, left)
            if code in (0, 1):
                break
            if self._num_runs > num_kills + MAX_MORE_RUNS:
                log = (self._local / "log").read_text(errors="replace")[-2000:]
                raise RunStopped(f"the job was not done after {self._num_runs} runs; the last one said: {log}")
        return self._count(wanted, time.monotonic() - started)

    @contextmanager
    def _running(self, fault: Fault | None) -> Iterator[subprocess.Popen[bytes]]:
        self._num_runs += 1
        command = [sys.executable, "-m", "batchgen.chaos.child", str(self._path), *([str(fault)] if fault else [])]
        with (self._local / "log").open("ab") as log, subprocess.Popen(command, stdout=log, stderr=log) as child:
            try:
                yield child
            finally:
                child.kill()

    def _choose_fault(self) -> Fault | None:
        """A step for this run to die at; None: it is killed from outside only."""
        if self._rng.random() >= STEP_SHARE:
            return None
        steps = [step for step in STEPS if step not in ("list", "lease", "read")]
        step, when = self._rng.choice(steps), self._rng.choice([when for when in WHENS if when != "lost_reply"])
        return None if find_impossible(step, when) else Fault(step, when, self._rng.randint(1, 6))

    def _watch(self, child: "subprocess.Popen[bytes]", wanted: int, num_kills: int) -> int:
        """The exit code, after as many kills of what the child started as fall into its time."""
        while num_kills > 0:
            calls = self._count_calls()
            step = max(1, (wanted - min(wanted, calls)) // (num_kills + 1))
            if not self._wait_for_calls(child, calls + self._rng.randint(1, step)):
                break
            num_kills -= 1
            if self._strike(child):
                return child.wait()
        code = child.wait()
        if code == -signal.SIGKILL:  # by itself, at its step
            self._note("driver at a step")
        return code

    def _wait_for_calls(self, child: "subprocess.Popen[bytes]", num_calls: int) -> bool:
        """Until the engines were called so often, or were silent too long. False: the child has ended."""
        give_up_at, last = time.monotonic() + MAX_SILENCE_S, -1
        while child.poll() is None:
            calls = self._count_calls()
            if calls != last:
                give_up_at, last = time.monotonic() + MAX_SILENCE_S, calls
            if calls >= num_calls or time.monotonic() > give_up_at:
                return True
            time.sleep(POLL_S)
        return False

    def _strike(self, child: "subprocess.Popen[bytes]") -> bool:
        """Kill the driver or, on Ray, as often one of its workers. Is the driver gone?"""
        workers = [pid for pid in self._list_workers() if pid != child.pid]
        if workers and self._rng.random() < 0.7:
            self._note("worker")
            with suppress(ProcessLookupError):  # it ended this instant
                os.kill(self._rng.choice(workers), signal.SIGKILL)
            return False
        self._note("driver")
        child.kill()
        return True

    def _note(self, whom: str) -> None:
        self._kills[whom] = self._kills.get(whom, 0) + 1
        self._say(f"kill {sum(self._kills.values())}: {whom}, after {self._count_calls():,} requests")

    def _list_workers(self) -> list[int]:
        """Processes of this machine that called an engine of this job: each has a log of its own. Not one that has a dead
        one's number: the system gives numbers again."""
        self._list_logs()
        return [pid for pid, began in self._began.items() if began is not None and is_alive(pid, began)]

    def _list_logs(self) -> Sequence[Path]:
        """Looked at many times a second, so a process whose log is new lives, or did a moment ago."""
        logs = sorted(self._calls.glob("calls-*.jsonl"))
        for log in logs:
            if (found := re.search(r"calls-(\d+)\.jsonl$", log.name)) and int(found[1]) not in self._began:
                stat = read_stat(int(found[1]))
                self._began[int(found[1])] = None if stat is None else stat[2]
        return logs

    def _count_calls(self) -> int:
        return sum(log.read_bytes().count(b"\n") for log in self._list_logs())

    def _count(self, wanted: int, elapsed_s: float) -> Result:
        spec, storage = self._spec, Storage(self._spec.output.path)
        rows = read_keys(storage)
        distinct = rows.group_by(KEYS).aggregate([]).num_rows
        tokens = sum(value or 0 for value in rows["completion_tokens"].to_pylist())
        engine, verdict = spec.engine, verify(storage)
        assert isinstance(engine, SimulatedEngineSpec)
        slot_s = engine.slots * spec.cluster.workers.max * elapsed_s
        return Result(
            output=storage.root,
            num_runs=self._num_runs,
            kills=dict(self._kills),
            elapsed_s=round(elapsed_s, 1),
            rows_wanted=wanted,
            rows=rows.num_rows,
            rows_error=sum(status == "error" for status in rows["status"].to_pylist()),
            lost=wanted - distinct,
            twice=rows.num_rows - distinct,
            generated=self._count_calls() or None,
            useful_work=round(tokens / engine.decode_tokens_per_s / slot_s, 4),
            findings=(*map(str, verdict.findings), *verdict.todo),
        )


def read_keys(storage: Storage) -> pa.Table:
    """Key, status and completion tokens of every output row."""
    tables = []
    for info in storage.list_files("data", suffix=".parquet"):
        with storage.open_read(info.path) as source:
            tables.append(ParquetFile(source).read(columns=[*KEYS, "status", "completion_tokens"]))
    if not tables:
        raise OutputError(f"{storage.root}: the job left no output; run it by itself to see why")
    return pa.concat_tables(tables)
