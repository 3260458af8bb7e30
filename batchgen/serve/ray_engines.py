"""The shared engines of one served model, as a controller holds them, and a run's pool of workers on them.

Engines are detached actors with names that follow from the endpoint's store, the model and a number: a controller that
starts finds those of the last one, warm. Their number follows the runs' own queues: a run asks for workers as it would of a
pool of its own, and gets them on engines that are there, else on a new one, up to `cluster.workers.max`.
"""

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from batchgen.build import build_id
from batchgen.queue.events import PoolEvent, WorkerStartFailed
from batchgen.ray_pool import RayPool, describe_error
from batchgen.serve.engine_actor import EngineActor
from batchgen.serve.host import HostReport
from batchgen.serve.spec import ServedModel
from batchgen.worker.setup import WorkerSetup

log = logging.getLogger("batchgen.serve")
NAMESPACE = "batchgen-serve"
# A worker that does not let go in this time sits on an engine that hangs.
DETACH_S = 15.0
CALL_S = 10.0
# Between starts of engines that fail; doubles.
MAX_BACKOFF_S = 60.0
# An idle engine above the least number stays this many looks: a batch may follow.
IDLE_LOOKS = 60


@dataclass(slots=True)
class HeldEngine:
    """`opening` is there until it is up."""

    name: str
    actor: ActorHandle
    opening: Any = None
    report: HostReport | None = None
    num_idle: int = 0
    asked_at: float = field(default_factory=time.monotonic)
    users: set[str] = field(default_factory=set)


class SharedEngines:
    """Thread-safe. `look` is called again and again by the controller."""

    def __init__(self, root: str, model: str, served: ServedModel) -> None:
        self.served, self._prefix = served, make_prefix(root, model)
        text = f"{build_id()}\0{served.model_dump_json()}"
        self._identity = hashlib.sha256(text.encode()).hexdigest()
        self._lock = threading.RLock()
        self._engines: dict[str, HeldEngine] = {}
        self._num_failures, self._not_before = 0, 0.0
        self._adopt()

    def look(self) -> None:
        """Hear what every engine does; replace the dead, start up to the least number, let go of the idle."""
        with self._lock:
            engines = list(self._engines.values())
        refs = {engine.name: engine.actor.report.remote() for engine in engines}
        if refs:
            ray.wait(list(refs.values()), num_returns=len(refs), timeout=CALL_S)
        for engine in engines:
            self._hear(engine, refs[engine.name])
        with self._lock:
            while len(self._engines) < self.served.cluster.workers.min and time.monotonic() >= self._not_before:
                self._start()
            for engine in [each for each in self._engines.values() if each.num_idle > IDLE_LOOKS]:
                if len(self._engines) > self.served.cluster.workers.min and not engine.users:
                    self.retire(engine)

    def take(self, user: str, but: Collection[str]) -> HeldEngine | None:
        """An engine for one more worker: one not named in `but`, the least used; a new one where there may be one more."""
        with self._lock:
            free = [engine for engine in self._engines.values() if engine.name not in but]
            if not free and len(self._engines) < self.served.cluster.workers.max:
                free = [self._start()]
            if not free:
                return None
            engine = min(free, key=lambda each: len(each.users))
            engine.users.add(user)
            return engine

    def give_back(self, engine: HeldEngine, user: str) -> None:
        with self._lock:
            engine.users.discard(user)

    def retire(self, engine: HeldEngine) -> None:
        """Kill it. Twice is a no-op."""
        with self._lock:
            if self._engines.get(engine.name) is engine:
                del self._engines[engine.name]
                ray.kill(engine.actor)

    def list_up(self) -> list[str]:
        """Names of the engines that answer."""
        with self._lock:
            return [engine.name for engine in self._engines.values() if engine.opening is None]

    def list_reports(self) -> dict[str, HostReport]:
        """Of the same: what one that loads says is no figure yet."""
        with self._lock:
            up = [engine for engine in self._engines.values() if engine.opening is None]
            return {engine.name: engine.report for engine in up if engine.report is not None}

    def _hear(self, engine: HeldEngine, ref: Any) -> None:
        try:
            report = engine.report = ray.get(ref, timeout=0.1)
            if engine.opening is not None and ray.wait([engine.opening], timeout=0)[0]:
                ray.get(engine.opening)
                engine.opening, self._num_failures = None, 0
        except GetTimeoutError:
            waits = engine.opening is not None  # for room, or for its weights
            if not waits or time.monotonic() - engine.asked_at > self.served.cluster.start_timeout_s:
                self._fail(engine, "it does not answer")
        except RayError as error:
            self._fail(engine, describe_error(error))
        else:
            is_idle = not (report.num_workers or report.num_urgent or engine.opening)
            engine.num_idle = engine.num_idle + 1 if is_idle else 0
            if report.death is not None:
                self._fail(engine, report.death)

    def _fail(self, engine: HeldEngine, reason: str) -> None:
        """One that was up is replaced at once; those that never come up are not started for ever in a row."""
        log.warning("%s: %s", engine.name, reason)
        if engine.opening is not None:
            self._num_failures += 1
            self._not_before = time.monotonic() + min(MAX_BACKOFF_S, 2.0**self._num_failures)
        self.retire(engine)

    def _start(self) -> HeldEngine:
        number = next(n for n in range(10**6) if f"{self._prefix}-{n}" not in self._engines)
        name, cluster = f"{self._prefix}-{number}", self.served.cluster
        with contextlib.suppress(ValueError):  # one of that name that is on its way out
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
        actor = (
            ray.remote(EngineActor)
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                num_cpus=cluster.cpus_per_worker,
                num_gpus=cluster.gpus_per_worker,
                resources=dict(cluster.resources_per_worker) or None,
                scheduling_strategy="SPREAD" if cluster.placement == "SPREAD" else "DEFAULT",
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=10_000,
            )
            .remote(self.served, self._identity)
        )
        engine = self._engines[name] = HeldEngine(name, actor, actor.open.remote())
        return engine

    def _adopt(self) -> None:
        """Those that an earlier controller left, where they are what this one would start."""
        for number in range(self.served.cluster.workers.max):
            name = f"{self._prefix}-{number}"
            try:
                actor = ray.get_actor(name, namespace=NAMESPACE)
            except ValueError:
                continue
            try:
                identity, _ = ray.get(actor.get_identity.remote(), timeout=CALL_S)
                is_ours = identity == self._identity
                if is_ours:
                    ray.get(actor.adopt.remote(), timeout=CALL_S)
            except RayError:
                is_ours = False
            if is_ours:
                self._engines[name] = HeldEngine(name, actor, actor.open.remote())
            else:
                ray.kill(actor)


def make_prefix(root: str, model: str) -> str:
    return f"batchgen-engine-{hashlib.sha256(f'{root}|{model}'.encode()).hexdigest()[:16]}"


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


class SharedPool(RayPool):
    """The workers of one run, each on a shared engine; never two on one."""

    def __init__(self, setup: WorkerSetup, engines: SharedEngines, user: str, deadline: float) -> None:
        super().__init__(setup)
        self._engines, self._user, self._deadline = engines, user, deadline
        self._refused: list[PoolEvent] = []

    def start_worker(self, worker_id: str) -> None:
        used = {on.engine.name for on in self._actors.values()}
        engine = self._engines.take(self._user, used)
        if engine is None:
            self._refused.append(WorkerStartFailed(worker_id, "no shared engine is free for it"))
            return
        # Epochs and worker ids of two jobs may be alike; on the engine they must not be.
        setup = replace(self._setup, worker_id=worker_id)
        on = self._actors[worker_id] = _OnShared(engine, f"{self._user}/{setup.epoch}/{worker_id}")
        self._wait_for(worker_id, "open", on.attach.remote(setup, self._deadline))

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        refused, self._refused = self._refused, []
        return [*refused, *super().poll(0.0 if refused else timeout_s)]

    def kill(self, worker_id: str) -> None:
        """One that was at work is given up: its engine may hang."""
        on = self._actors.get(worker_id)
        if self._end_worker(worker_id) == "busy" and on is not None:
            self._engines.retire(on.engine)

    def _forget(self, worker_id: str) -> None:
        self._end_worker(worker_id)

    def _end_worker(self, worker_id: str) -> str | None:
        """What it was doing when it was let go."""
        on = self._drop(worker_id)
        if on is None:
            return None
        self._engines.give_back(on.engine, self._user)
        try:
            left: str = ray.get(on.detach.remote(), timeout=DETACH_S)
        except (RayError, GetTimeoutError):
            left = "dead"
        if left == "dead" and on.engine.opening is None:
            self._engines.retire(on.engine)
        return left
