"""The shared engines of one served model, as a controller holds them.

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
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from batchgen.build import build_id
from batchgen.ray_pool import describe_error
from batchgen.serve.engine_actor import EngineActor
from batchgen.serve.host import HostReport
from batchgen.serve.spec import ServedModel

log = logging.getLogger("batchgen.serve")
NAMESPACE = "batchgen-serve"
CALL_S = 10.0
# How long one look waits for reports: an engine that waits for room must not hold up those that are up.
LISTEN_S = 0.5
# Between starts of engines that fail; doubles.
MAX_BACKOFF_S = 60.0
# An idle engine above the least number stays this many looks: a batch may follow.
IDLE_LOOKS = 60


@dataclass(slots=True)
class HeldEngine:
    """`opening` is there until it is up; `hearing` while it is asked for a report, since `hearing_since`."""

    name: str
    actor: ActorHandle
    opening: Any = None
    report: HostReport | None = None
    num_idle: int = 0
    asked_at: float = field(default_factory=time.monotonic)
    hearing: Any = None
    hearing_since: float = 0.0
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
        for engine in engines:
            if engine.hearing is None:
                engine.hearing, engine.hearing_since = engine.actor.report.remote(), time.monotonic()
        calls = [engine.hearing for engine in engines]
        told = set(ray.wait(calls, num_returns=len(calls), timeout=LISTEN_S)[0]) if calls else set()
        for engine in engines:
            if engine.hearing in told:
                self._hear(engine)
            else:
                self._check_silent(engine)
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

    def _hear(self, engine: HeldEngine) -> None:
        ref, engine.hearing = engine.hearing, None
        try:
            report = engine.report = ray.get(ref)
            if engine.opening is not None and ray.wait([engine.opening], timeout=0)[0]:
                ray.get(engine.opening)
                engine.opening, self._num_failures = None, 0
        except RayError as error:
            self._fail(engine, describe_error(error))
        else:
            is_idle = not (report.num_workers or report.num_urgent or engine.opening)
            engine.num_idle = engine.num_idle + 1 if is_idle else 0
            if report.death is not None:
                self._fail(engine, report.death)

    def _check_silent(self, engine: HeldEngine) -> None:
        """One that is not up waits for room, or for its weights, and may for longer."""
        now, waits = time.monotonic(), engine.opening is not None
        limit_s = self.served.cluster.start_timeout_s if waits else CALL_S
        if now - (engine.asked_at if waits else engine.hearing_since) > limit_s:
            self._fail(engine, "it does not answer")

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
