"""A real Prometheus (Debian's package) for tests, where there is one: its checker of rules, and its server."""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import find_port

REPO = Path(__file__).parents[1]
RULES = REPO / "batchgen" / "grafana" / "alerts.yaml"
PAGE = REPO / "docs" / "metrics.md"
DISCOVERY = "/tmp/ray/prom_metrics_service_discovery.json"


def find_program(name: str) -> str:
    """`prometheus` or `promtool`, or the test is skipped: on a machine of CI never."""
    path = shutil.which(name)
    if path is None:
        assert "CI" not in os.environ, "CI must have Debian's prometheus"
        pytest.skip(f"no {name} on this machine: apt install prometheus")
    return path


@dataclass(frozen=True, slots=True)
class Prometheus:
    url: str

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
                return True
        except OSError:
            return False  # refused, or a 503

    def get(self, path: str, **params: str) -> Any:
        """`data` of the API's answer. Fails where the server says that the request is wrong."""
        query = urllib.parse.urlencode(params)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=20) as answer:
            told = json.load(answer)
        assert told["status"] == "success", told
        return told["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Labels and value of each series, now."""
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found


@contextmanager
def run_prometheus(folder: Path, discovery: Path) -> Iterator[Prometheus]:
    """With the settings of docs/metrics.md, looking every second at the agents in Ray's file."""
    port = find_port()
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block.count(DISCOVERY) == block.count("[alerts.yaml]") == 1
    own = block.replace(DISCOVERY, str(discovery)).replace("alerts.yaml", str(RULES))
    (folder / "prometheus.yml").write_text(f"global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n{own}")
    command = [
        find_program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    prometheus = Prometheus(f"http://127.0.0.1:{port}")
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            give_up_at = time.monotonic() + 30
            while not prometheus.is_ready():
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
                assert time.monotonic() < give_up_at
                time.sleep(0.1)
            yield prometheus
        finally:
            process.kill()
