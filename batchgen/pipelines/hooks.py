"""Tells others how a run ended. A hook that fails never fails the run: it is tried again, then given up with a word.

Told at least once: a scheduler that dies between telling and writing it down tells again, with the same `id`.
"""

import http.client
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from batchgen.pipelines.history import Run
from batchgen.pipelines.spec import HookSpec, PipelineSpec

# Waits between the four tries (s).
PAUSES_S = (2.0, 15.0, 60.0)
NUM_THREADS = 8


class HookFailed(Exception):
    """One try. Its message holds no address: that may be a secret."""


def make_payload(spec: PipelineSpec, run: Run, values: dict[str, Any], outputs: dict[str, str]) -> dict[str, Any]:
    """What is sent. `values`: of the logical date. No prompt or generated text is in it."""
    return {
        # A date that failed may end again: the time of the end is the log's, the same whoever tells it.
        "id": f"batchgen-{spec.name}-{run.key}-{run.state}-{1000 * (run.ended_at or 0):.0f}",
        **values,
        "state": run.state,
        "message": run.message,
        "attempts": run.attempt,
        "gpu_hours": run.gpu_hours,
        "began_at": run.began_at,
        "ended_at": run.ended_at,
        "partitions": {name: part.state for name, part in run.parts.items() if name},
        "outputs": outputs,
    }


def tell(hook: HookSpec, payload: dict[str, Any]) -> None:
    """One try. Raises HookFailed."""
    body = json.dumps(payload, ensure_ascii=False).encode()
    if hook.command is not None:
        return _run_command(hook.command, body, hook.timeout)
    url = hook.webhook or os.environ.get(hook.webhook_env or "")
    if not url:
        raise HookFailed(f"the environment variable {hook.webhook_env} is not set where the scheduler runs")
    headers = {"Content-Type": "application/json", "Idempotency-Key": payload["id"]}
    request = urllib.request.Request(url, body, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=hook.timeout):
            return None
    except urllib.error.HTTPError as error:
        error.close()
        raise HookFailed(f"the webhook answered {error.code}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise HookFailed(f"the webhook can't be reached ({type(error).__name__})") from error


def _run_command(command: tuple[str, ...], body: bytes, timeout_s: float) -> None:
    try:
        # No pipes for what it says: nobody reads it, and a child that it leaves behind would keep them open.
        done = subprocess.run(
            command,
            input=body,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise HookFailed(f"{command[0]}: {type(error).__name__}") from error
    if done.returncode != 0:
        raise HookFailed(f"{command[0]}: ended with exit code {done.returncode}")


def tell_patiently(hook: HookSpec, payload: dict[str, Any], sleep: Callable[[float], None] = time.sleep) -> str | None:
    """None when it was told, else why not, after all tries."""
    for pause_s in (*PAUSES_S, None):
        try:
            tell(hook, payload)
            return None
        except HookFailed as error:
            message = str(error)
        if pause_s is not None:
            sleep(pause_s)
    return message


class Teller:
    """Hooks under way, each in a thread: a slow receiver holds no run up."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_THREADS, "hook")
        self._under_way: dict[tuple[str, str], Future[str | None]] = {}

    def start(self, key: str, hook: HookSpec, payload: dict[str, Any]) -> None:
        """Does nothing for one that is under way."""
        if (key, hook.id) not in self._under_way:
            self._under_way[key, hook.id] = self._threads.submit(tell_patiently, hook, payload)

    def collect(self) -> list[tuple[str, str, str | None]]:
        """(run, id of the hook, None or why it was given up) of those that ended."""
        ended = [name for name, future in self._under_way.items() if future.done()]
        return [(*name, self._under_way.pop(name).result()) for name in ended]
