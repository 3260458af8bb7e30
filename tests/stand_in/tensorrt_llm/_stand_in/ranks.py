"""Starts the rank processes and talks to them. As with MPI, they get a session of their own and every descriptor that the
main process left inheritable."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK = Path(__file__).with_name("rank.py")


class RankProcess:
    """One rank. `on_event` is called on a thread of its own; when the rank dies nobody is told, as with the real one."""

    def __init__(self, options: dict[str, Any], on_event: Callable[[dict[str, Any]], None]) -> None:
        read_fd, write_fd = os.pipe()
        os.set_inheritable(write_fd, True)
        command = [sys.executable, "-S", "-E", str(RANK), json.dumps({**options, "event_fd": write_fd})]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, close_fds=False, start_new_session=True)
        os.close(write_fd)
        self._events = os.fdopen(read_fd)
        self._lock = threading.Lock()
        self.num_active = 0
        self._on_event, self._name = on_event, f"rank-{options['rank']}"

    def wait_until_ready(self) -> None:
        """At once for one that died."""
        self._events.readline()
        threading.Thread(target=self._read, daemon=True, name=self._name).start()

    def send(self, order: dict[str, Any]) -> None:
        """A no-op when the rank is dead."""
        with self._lock:
            try:
                self._process.stdin.write(json.dumps(order).encode() + b"\n")
                self._process.stdin.flush()
            except OSError:
                return

    def stop(self, wait_s: float) -> None:
        """Tells it to end and waits; one that doesn't is left behind."""
        with self._lock:
            if not self._process.stdin.closed:
                try:
                    self._process.stdin.close()
                except BrokenPipeError:
                    return
        end = time.monotonic() + wait_s
        while self._process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)

    def _read(self) -> None:
        for line in self._events:
            self._on_event(json.loads(line))
