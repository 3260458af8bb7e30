"""What every way's process does around its job: read its settings, time the job, write down what it saw.

Standard library only, because a peer may live in an environment without ours. The clock is the machine's monotonic one,
which the server uses too, so that the time before and after the serving window can be told.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


class Child:
    """`settings`: what the way's table line says, and `input`, `output`, `url` (without /v1), `ray_address`."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = json.loads(sys.argv[1])
        self._times: dict[str, float] = {}
        # Nobody waits for an orphan: its rows would meet the next way's at the server.
        threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()

    def __getitem__(self, name: str) -> Any:
        return self.settings[name]

    @contextmanager
    def job(self) -> Iterator[None]:
        """Around the job alone: the process is up, its libraries are loaded, the cluster is joined."""
        self._times["began_at"] = time.monotonic()
        yield
        self._times["ended_at"] = time.monotonic()

    def close(self, *packages: str) -> None:
        """Write the report. `packages`: whose versions it names."""
        report = {**self._times, "versions": {name: find_version(name) for name in packages}}
        Path(self["report"]).write_text(json.dumps(report))


def find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
