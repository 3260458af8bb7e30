"""A real Prometheus (Debian's package) for tests, where there is one: its checker of rules, and its server."""

import json
import os
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray_cluster import find_port

RULES = Path(__file__).parents[1] / "batchgen" / "grafana" / "alerts.yaml"


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
def run_prometheus(folder: Path, scrape: Mapping[str, Any]) -> Iterator[Prometheus]:
    """With our rules, looking every second at what the one `scrape` section names."""
    port = find_port()
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "ray", **scrape}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    command = [
        find_program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield Prometheus(f"http://127.0.0.1:{port}")
        finally:
            process.kill()
