"""A run's pool of workers on the shared engines of its model, as `RayPool` has one of actors of its own.

Letting go of a worker never waits for its engine: the call is sent, and its answer, or that there is none in `DETACH_S`, is
looked at by a later `poll`. Until then its engine is no one else's of this run.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError

from batchgen.queue.events import PoolEvent, WorkerStartFailed
from batchgen.ray_pool import RayPool
from batchgen.serve.ray_engines import HeldEngine, SharedEngines
from batchgen.worker.setup import WorkerSetup

# A worker that does not let go in this time sits on an engine that hangs.
DETACH_S = 15.0


class _Call:
    """One method of a worker on a shared engine, called as an actor's own would be."""

    def __init__(self, method: Any, worker_id: str) -> None:
        self._method, self._worker_id = method, worker_id

    def remote(self, *args: Any) -> Any:
        return self._method.remote(self._worker_id, *args)


class _OnShared:
    """A worker on a shared engine, as `RayPool` calls an actor of its own."""

    def __init__(self, engine: HeldEngine, worker_id: str) -> None:
        self.engine, self.worker_id = engine, worker_id

    def __getattr__(self, name: str) -> _Call:
        return _Call(getattr(self.engine.actor, name), self.worker_id)


@dataclass(frozen=True, slots=True)
class _Leaving:
    """A worker that was told to go. `is_killed`: if it was at work, its engine may hang."""

    engine: HeldEngine
    is_killed: bool
    until: float


class SharedPool(RayPool):
    """The workers of one run, each on a shared engine; never two on one."""

    def __init__(self, setup: WorkerSetup, engines: SharedEngines, user: str, deadline: float) -> None:
        super().__init__(setup)
        self._engines, self._user, self._deadline = engines, user, deadline
        self._refused: list[PoolEvent] = []
        self._asked: list[str] = []
        self._leaving_calls: dict[ray.ObjectRef, _Leaving] = {}

    @property
    def num_leaving(self) -> int:
        """Workers that were let go, and whose engine has not said so."""
        return len(self._leaving_calls)

    def start_worker(self, worker_id: str) -> None:
        on_leave = {leaving.engine.name for leaving in self._leaving_calls.values()}
        used = {on.engine.name for on in self._actors.values()}
        engine = self._engines.take(self._user, used | on_leave)
        if engine is None and on_leave:
            self._asked.append(worker_id)  # one will be free soon, or be replaced
            return
        if engine is None:
            self._refused.append(WorkerStartFailed(worker_id, "no shared engine is free for it"))
            return
        # Epochs and worker ids of two jobs may be alike; on the engine they must not be.
        setup = replace(self._setup, worker_id=worker_id)
        on = self._actors[worker_id] = _OnShared(engine, f"{self._user}/{setup.epoch}/{worker_id}")
        self._wait_for(worker_id, "open", on.attach.remote(setup, self._deadline))

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        self._look_at_leaving(timeout_s if self._asked and not self._waiting else 0.0)
        asked, self._asked = self._asked, []
        for worker_id in asked:
            self.start_worker(worker_id)
        refused, self._refused = self._refused, []
        return [*refused, *super().poll(0.0 if refused else timeout_s)]

    def kill(self, worker_id: str) -> None:
        """One that was at work is given up: its engine may hang."""
        self._let_go(worker_id, is_killed=True)

    def close(self) -> None:
        """Waits until all have let go, or had their time."""
        super().close()
        self._asked = []
        while self._leaving_calls:
            self._look_at_leaving(max(0.0, max(each.until for each in self._leaving_calls.values()) - time.monotonic()))

    def _forget(self, worker_id: str) -> None:
        self._let_go(worker_id, is_killed=False)

    def _let_go(self, worker_id: str, *, is_killed: bool) -> None:
        if worker_id in self._asked:
            self._asked.remove(worker_id)
        is_starting = any(each.worker_id == worker_id and each.call == "open" for each in self._waiting.values())
        on = self._drop(worker_id)
        if on is None:
            return
        told = on.detach.remote()
        if on.engine.opening is None or not is_starting:  # a worker that is up says more than the last look did
            self._leaving_calls[told] = _Leaving(on.engine, is_killed, time.monotonic() + DETACH_S)
        else:  # it hears of it once it is up, if it ever is: nothing to wait for
            self._engines.give_back(on.engine, self._user)

    def _look_at_leaving(self, timeout_s: float) -> None:
        calls = list(self._leaving_calls)
        if not calls:
            return
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
        now = time.monotonic()
        for ref in calls:
            if ref in ready or now >= self._leaving_calls[ref].until:
                self._end(self._leaving_calls.pop(ref), read_left(ref) if ref in ready else "dead")

    def _end(self, leaving: _Leaving, left: str) -> None:
        self._engines.give_back(leaving.engine, self._user)
        if left == "dead" or (left == "busy" and leaving.is_killed):
            self._engines.retire(leaving.engine)


def read_left(ref: ray.ObjectRef) -> str:
    """What the worker was doing."""
    try:
        left: str = ray.get(ref)
    except RayError:
        return "dead"
    return left
