"""The whole benchmark: servers up, every way in turn, round after round, then the table. Goes on where it stopped.

Every run is a line of `runs.jsonl` in the folder, under a key of its settings, its workload and, for our own, the build:
what is there already is not run again. Ways are run in turn and not one after another, so that whatever else the machine
does meets all of them. A Ray cluster is up before a way that wants one begins, and down while the others run.
"""

import contextlib
import hashlib
import json
import os
import platform
import secrets
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from batchgen.bench.homes import find_python
from batchgen.bench.inputs import write_rows, write_token_ids
from batchgen.bench.measure import Place, measure
from batchgen.bench.processes import MARK, end_marked, make_env, run_server, split_cores
from batchgen.bench.runs import Run, dump_run, load_run
from batchgen.bench.summary import make_oracles, summarise
from batchgen.bench.ways import Way, make_quick_ways, make_ways
from batchgen.bench.workload import Workload
from batchgen.build import build_id

BUCKET = "bucket"
MAX_FAILURES = 2
# Logical ones, so that reading, mapping and writing may overlap on however few real ones.
RAY_CPUS = "4"
QUICK = Workload(num_rows=160, slots=16, mean_s=0.1, rows_per_file=20)


@dataclass(frozen=True, slots=True)
class Options:
    """`scripts`: the folder of the ways' scripts. `s3_server`: a script that serves S3 and prints its port. `minutes`: no
    run begins after this. `only`: ways whose name contains one of these words."""

    folder: Path
    scripts: Path
    s3_server: Path
    repeats: int = 5
    minutes: float = 15.0
    is_quick: bool = False
    only: Sequence[str] = ()
    zero_rows: int = 200_000


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is up beside the server: the environment that leads to it, and the cluster's address."""

    env: Mapping[str, str]
    ray_address: str | None


def run_benchmark(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Run what is missing; the result as one JSON value."""
    work = QUICK if options.is_quick else Workload()
    ways = [way for way in list_ways(options, work) if is_wanted(way, options.only)]
    bench = Bench(options, work, say)
    if not any(bench.is_missing(way, options.repeats) for way in ways):
        return bench.make_result(ways)
    with bench.running():
        for number in range(options.repeats):
            for needs_ray in (False, True):
                some = [way for way in ways if ("ray" in way.needs) == needs_ray]
                bench.run_all([way for way in some if bench.is_missing(way, number + 1)])
    return bench.make_result(ways)


def list_ways(options: Options, work: Workload) -> list[Way]:
    return make_quick_ways(work) if options.is_quick else make_ways(work, zero_rows=options.zero_rows)


def is_wanted(way: Way, only: Sequence[str]) -> bool:
    return not only or any(word.lower() in f"{way.name} {way.kind}".lower() for word in only)


class Bench:
    """The servers, and the runs that are done."""

    def __init__(self, options: Options, work: Workload, say: Callable[[str], None]) -> None:
        self._options, self._work, self._say = options, work, say
        options.folder.mkdir(parents=True, exist_ok=True)
        self._give_up_at = time.monotonic() + options.minutes * 60
        self._log = options.folder / "runs.jsonl"
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        self._runs = [load_run(line) for line in lines]
        self._servers, self._measured = split_cores()

    def is_missing(self, way: Way, num_runs: int) -> bool:
        """Are there fewer runs than that of this very way? One that never went well is not tried for ever."""
        runs = self._list_runs(way)
        is_hopeless = len(runs) >= MAX_FAILURES and all(run.failure is not None for run in runs)
        return len(runs) < num_runs and not is_hopeless

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The server and this process on the first core; sockets of Ray want a short path."""
        self._temporary = Path(tempfile.mkdtemp(prefix="bgb", dir="/tmp"))
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._servers)
        repo = str(self._options.scripts.resolve().parents[1])
        # The measured ways' environment; the servers' has another mark, so that their CPU time is not the ways'.
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
        self._env = make_env({"PYTHONPATH": repo, "RAY_TMPDIR": str(self._temporary), **ray})
        command = [sys.executable, "-m", "batchgen.bench.server", json.dumps(asdict(self._work))]
        log = self._options.folder / "servers.log"
        try:
            with run_server(command, self._servers, make_env({"PYTHONPATH": repo}), log) as port:
                self._url = f"http://127.0.0.1:{port}"
                yield
        finally:
            os.sched_setaffinity(0, before)
            shutil.rmtree(self._temporary, ignore_errors=True)

    def run_all(self, ways: Sequence[Way]) -> None:
        """Once each, while there is time."""
        if not ways or time.monotonic() > self._give_up_at:
            return
        needs = frozenset().union(*(way.needs for way in ways))
        with self._create_surroundings(needs) as surroundings:
            for way in ways:
                if time.monotonic() > self._give_up_at:
                    self._say(f"{self._options.minutes:g} minutes are over; start it again to go on")
                    return
                self._run(way, surroundings)

    @contextlib.contextmanager
    def _create_surroundings(self, needs: frozenset[str]) -> Iterator["Surroundings"]:
        """What the ways want to find. First the S3 server: actors have the environment that the cluster began with."""
        log, env, address = self._options.folder / "servers.log", self._env, None
        with contextlib.ExitStack() as stack:
            stack.callback(end_marked, env[MARK])
            if "s3" in needs:
                command = [sys.executable, str(self._options.s3_server)]
                port = stack.enter_context(run_server(command, self._servers, make_env({}), log))
                create_bucket(f"http://127.0.0.1:{port}")
                env = {**env, **make_s3_env(f"http://127.0.0.1:{port}")}
            if "ray" in needs:
                command = [sys.executable, str(self._options.scripts / "ray_cluster.py"), RAY_CPUS]
                address = stack.enter_context(run_server(command, self._measured, env, log))
            yield Surroundings(env, address)

    def _run(self, way: Way, surroundings: "Surroundings") -> None:
        python, reason = find_python(way.home, self._options.folder / "homes", self._options.scripts)
        work, key = self._cut(way), self._make_key(way)
        if reason is None:
            run = measure(way, key, work, self._make_place(way, work, python, surroundings))
        else:
            run = Run(way.name, way.kind, key, work.num_rows, failure=reason)
        self._runs.append(run)
        with self._log.open("a") as file:
            file.write(dump_run(run) + "\n")
        rate = run.num_rows / run.job_s if run.job_s else 0.0
        figure = f"saturation {run.saturation:.3f}" if run.saturation is not None else f"{rate:,.0f} rows/s"
        self._say(f"{way.kind} {way.name}: {run.failure or figure}")

    def _cut(self, way: Way) -> Workload:
        """The rows that this way is given."""
        return replace(self._work, num_rows=way.num_rows) if way.num_rows else self._work

    def _make_place(self, way: Way, work: Workload, python: str, surroundings: "Surroundings") -> Place:
        inputs = self._options.folder / f"input-{way.kind}-{work.num_rows}"
        if way.kind == "zero":
            write_token_ids(inputs, work.num_rows)
        else:
            write_rows(inputs, work)
        return Place(
            scripts=self._options.scripts.resolve(),
            folder=self._options.folder.resolve(),
            input=inputs.resolve(),
            url=self._url,
            cores=frozenset(self._measured),
            env=surroundings.env,
            python=python,
            ray_address=surroundings.ray_address,
            bucket=f"s3://{BUCKET}/run-{len(self._runs)}" if "s3" in way.needs else None,
        )

    # ---- the result --------------------------------------------------------------------------------------------------

    def make_result(self, ways: Sequence[Way]) -> dict[str, Any]:
        return {
            "machine": describe_machine(),
            "build": build_id(),
            "workload": asdict(self._work),
            "oracles": make_oracles(self._work),
            "ways": [summarise(way, self._list_runs(way), self._cut(way)) for way in ways],
        }

    def _list_runs(self, way: Way) -> list[Run]:
        key = self._make_key(way)
        return [run for run in self._runs if run.key == key]

    def _make_key(self, way: Way) -> str:
        """Of all that a run depends on: another key, another run."""
        build = build_id() if way.script == "run_batchgen.py" else ""
        script = (self._options.scripts / way.script).read_text()
        fields = [way.name, way.kind, way.settings, way.env, way.num_rows, asdict(self._work), build, script]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def create_bucket(endpoint: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT"), timeout=30).close()


def make_s3_env(endpoint: str) -> dict[str, str]:
    """For every process that shall use this server and nothing of the machine's own settings."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def describe_machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"cpu": model, "num_cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
