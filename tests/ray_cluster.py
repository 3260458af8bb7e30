"""A real Ray cluster on this machine, started and used with the commands that the README gives, token included."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

REPO = Path(__file__).parents[1]
MARK = "BATCHGEN_TEST_CLUSTER"
RAY = str(Path(sys.executable).parent / "ray")
# The log monitor brings actors' output to drivers, of which none of ours wants it.
QUIET = ("--disable-usage-stats", "--include-log-monitor", "false")


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class RayCluster:
    """`env` is what a user's shell holds: token authentication on, HOME with the token file."""

    address: str
    dashboard: str
    env: dict[str, str]
    metrics: str = ""
    nodes: list[int] = field(default_factory=list)
    head: tuple[str, ...] = ()

    def start_head(self) -> None:
        """Once more on the same ports, after `kill_all`: a head that knows nothing of the one before."""
        self.call(*self.head)

    def kill_all(self) -> None:
        """Every process of the cluster, jobs too. By a mark in their environment: `ray stop` would end every Ray of this
        machine, other people's too."""
        stop_processes(list_marked(self.env[MARK]))

    @property
    def discovery(self) -> Path:
        """Where Ray writes down what Prometheus is to scrape."""
        return Path(self.env["RAY_TMPDIR"]) / "ray" / "prom_metrics_service_discovery.json"

    def call(self, *args: str, timeout_s: float = 240) -> str:
        done = subprocess.run([RAY, *args], env=self.env, cwd=REPO, capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    @contextmanager
    def at_hand(self, *args: str) -> "Iterator[Callable[[], None]]":
        """A command of ray's that has loaded what it needs: called, it does at once what else takes seconds to begin."""
        code = "import sys, ray.scripts.scripts as ray; print(flush=True); sys.stdin.readline(); ray.cli(sys.argv[1:])"
        command = [sys.executable, "-c", code, *args]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, env=self.env, text=True, **pipes) as process:
            assert process.stdout is not None
            process.stdout.readline()

            def go() -> None:
                told, _ = process.communicate("\n")
                assert process.returncode == 0, told[-2000:]

            try:
                yield go
            finally:
                process.kill()

    @cached_property
    def jobs(self) -> "JobSubmissionClient":
        """What `ray job` itself talks through: each call of that command takes two seconds of a core, to import Ray.
        `test_road.py` pastes the command."""
        from ray.job_submission import JobSubmissionClient

        token = (Path(self.env["HOME"]) / ".ray" / "auth_token").read_text()
        return JobSubmissionClient(self.dashboard, headers={"Authorization": f"Bearer {token}"})

    def submit(self, *args: str, env: Mapping[str, str] | None = None, on: str | None = None) -> str:
        """As `ray job submit --no-wait --working-dir .` does it of jobs/generate.py; the submission id. `env`: for its
        actors too; `on`: the resource of the node that the driver is to run on, else the head."""
        return self.jobs.submit_job(
            entrypoint=shlex.join((sys.executable, "jobs/generate.py", *args)),
            runtime_env={"working_dir": str(REPO), "env_vars": dict(env or {})},
            entrypoint_resources={on: 0.001} if on else None,
        )

    def get_status(self, submission: str) -> str:
        return str(self.jobs.get_job_status(submission).value)

    def wait(self, submission: str, timeout_s: float = 240) -> str:
        """The status the job ends with."""
        give_up_at = time.monotonic() + timeout_s
        while (status := self._look(submission)) in ("RUNNING", "PENDING"):
            assert time.monotonic() < give_up_at, self.read_logs(submission)[-3000:]
            time.sleep(0.2)
        return status

    def _look(self, submission: str) -> str:
        try:
            return self.get_status(submission)
        except (RuntimeError, OSError):
            return "PENDING"  # a head whose control store is away answers with an error, or not at all

    def read_logs(self, submission: str) -> str:
        return str(self.jobs.get_job_logs(submission))

    def add_node(self, **resources: float) -> int:
        """A second raylet on this machine; its process id."""
        before = set(self.list_raylets())
        self.call(
            *("start", "--address", self.address, "--num-cpus", "1", "--resources", json.dumps(resources)),
            *("--dashboard-agent-listen-port", str(find_port()), *QUIET),
        )
        (raylet,) = set(self.list_raylets()) - before
        self.nodes.append(raylet)
        return raylet

    def list_raylets(self) -> list[int]:
        return list_marked(self.env[MARK], "raylet/raylet")

    def restart_gcs(self, down_s: float) -> None:
        """SIGKILL the head's control store, and start it again as it was started, as an operator or a supervisor does."""
        (old,) = list_marked(self.env[MARK], "gcs/gcs_server")
        command = Path(f"/proc/{old}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
        environ = dict(
            item.split("=", 1) for item in Path(f"/proc/{old}/environ").read_bytes().decode().split("\0") if item
        )
        os.kill(old, signal.SIGKILL)
        time.sleep(down_s)
        subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def kill_gcs(self) -> None:
        stop_processes(list_marked(self.env[MARK], "gcs/gcs_server"))

    def kill_node(self, raylet: int) -> None:
        """The raylet and all that it started, drivers too: a machine that is gone."""
        stop_processes(list_descendants(raylet))

    def stop_nodes(self) -> None:
        """All but the head, each telling it: a node that is killed is thought to be there for seconds."""
        nodes, self.nodes = self.nodes, []
        for raylet in nodes:
            with suppress(ProcessLookupError):
                os.kill(raylet, signal.SIGTERM)
        give_up_at = time.monotonic() + 60
        while set(nodes) & set(self.list_raylets()):
            assert time.monotonic() < give_up_at, "a node does not end"
            time.sleep(0.1)


def read_node_id(raylet: int) -> str:
    (flag,) = [arg for arg in Path(f"/proc/{raylet}/cmdline").read_text().split("\0") if arg.startswith("--node_id=")]
    return flag.partition("=")[2]


def list_descendants(pid: int) -> list[int]:
    """This process first, then what it started and what those started."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended meanwhile
        parents.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for each in found:  # grows while it is walked
        found += parents.get(each, [])
    return found


def list_marked(mark: str, command: str = "") -> list[int]:
    """Ids of processes of one cluster, by the mark in their environment; only those whose command line holds a text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = mark.encode() in (folder / "environ").read_bytes()
            if is_ours and command.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue  # it ended meanwhile
    return found


@contextmanager
def run_ray_cluster(
    home: Path, extra_env: Mapping[str, str], num_cpus: int = 3, num_gpus: int = 0
) -> Iterator[RayCluster]:
    """Start a head as the README says; stop it whatever happens. `num_gpus`: Ray believes it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Ray's own folder, short because socket names are: what a killed cluster leaves in it must mislead nobody.
    folder = tempfile.mkdtemp(prefix="bg", dir="/tmp")
    env |= {
        **extra_env,
        "RAY_TMPDIR": folder,
        MARK: uuid.uuid4().hex,
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_metrics_report_interval_ms": "1000",
        "PATH": f"{Path(RAY).parent}:{env['PATH']}",
    }
    port, dashboard, metrics = find_port(), find_port(), find_port()
    head = (
        *("start", "--head", "--node-ip-address", "127.0.0.1", "--port", str(port), *QUIET),
        *("--dashboard-port", str(dashboard), "--ray-client-server-port", str(find_port())),
        *("--dashboard-agent-listen-port", str(find_port()), "--num-cpus", str(num_cpus)),
        *("--metrics-export-port", str(metrics), "--num-gpus", str(num_gpus)),
    )
    urls = (f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics")
    cluster = RayCluster(*urls[:2], env, *urls[2:], head=head)
    cluster.call("get-auth-token", "--generate")
    cluster.start_head()
    try:
        yield cluster
    finally:
        cluster.kill_all()
        shutil.rmtree(folder, ignore_errors=True)


def stop_processes(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue  # it went with its parent
