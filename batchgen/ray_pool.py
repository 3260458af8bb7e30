"""Workers as Ray actors. With `serve/` and the job entry points, the only importer of ray.

Each actor holds one `Worker` and is asked for its events by a poll that is always outstanding: its reply is the
heartbeat, its failure is the loss of the worker. Actors are never restarted by Ray and no call is ever retried by it:
what happens after a loss is the queue's decision. Leases and events travel; rows and clients never do.
"""

import asyncio
import hashlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
from ray.actor import ActorHandle
from ray.exceptions import AuthenticationError, RayActorError, RayError, RayTaskError

from batchgen.errors import LeaseHeld, Refusal
from batchgen.queue.events import Heartbeat, PoolEvent, WorkerLeaving, WorkerLost, WorkerStarted, WorkerStartFailed
from batchgen.queue.orders import Order
from batchgen.ray_metrics import RayExporter
from batchgen.records import Lease
from batchgen.spec import ClusterSpec
from batchgen.worker.collector import calm_collector
from batchgen.worker.worker import Worker, WorkerSetup, open_worker

NAMESPACE = "batchgen"
CONNECT_TIMEOUT_S = 10.0
TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"
# How long one poll waits in the actor for news. Its reply is the heartbeat, so also how old a heartbeat gets.
ACTOR_POLL_S = 2.0
# Metrics are told no more often; Prometheus asks every 15 s or so.
EXPORT_S = 2.0
# A drained worker may need this much longer than its rows got, to journal and commit; what then is missing is lost, as in
# any crash. With `cluster.drain_s` that is the 20 s in which a stopped run ends.
DRAIN_MARGIN_S = 7.0
# How often is asked which nodes are being drained, and what of their time is kept for the journal.
DRAINING_LOOK_S, DRAINING_MARGIN_S = 2.0, 5.0


def connect(cluster: ClusterSpec) -> None:
    """Join the cluster: the given address, RAY_ADDRESS, a cluster that runs on this machine, or a fresh one, in that
    order. A process that is connected already stays so. Raises Refusal when there is no such cluster or no way in."""
    if ray.is_initialized():
        return
    address = find_address(cluster)
    if address == "local":
        # A fresh cluster takes a token by itself, and warns that it did: nothing for anybody to do. Errors still show.
        logging.getLogger(TOKEN_LOGGER).setLevel(logging.ERROR)
    try:
        _knock(address)
        ray.init(address=address, namespace=NAMESPACE, logging_level=logging.WARNING, log_to_driver=False)
    except (OSError, AuthenticationError) as error:
        raise Refusal(
            f"cluster.address: no Ray cluster lets us in at {address}; start it, correct the address, or set "
            "RAY_AUTH_MODE=token with the cluster's token file (ray get-auth-token)"
        ) from error


def find_address(cluster: ClusterSpec) -> str:
    """Where `connect` goes; 'local' is a fresh cluster. Ray finds a cluster of this machine by a file that outlives a
    killed one, and then waits for it for minutes: so the address in it must answer."""
    if address := cluster.address or os.environ.get("RAY_ADDRESS"):
        return address
    current = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        address = current.read_text().strip()
        _knock(address)
    except OSError:
        return "local"
    return address


def _knock(address: str) -> None:
    """Ray tries a dead HOST:PORT for minutes; a refused connection is known at once. Raises OSError."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in host:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


class WorkerActor:
    """The remote side: one worker on the actor's own event loop."""

    async def open(self, setup: WorkerSetup) -> Any:
        context = ray.get_runtime_context()
        self._worker: Worker = await open_worker(setup, context.get_node_id()[:12])
        self._worker.meter.is_wanted = True
        self._exporter = RayExporter({"run": setup.run_name, "worker": setup.worker_id})
        self._export_at = 0.0
        calm_collector()
        return self._worker.info

    async def assign(self, lease: Lease) -> None:
        self._worker.assign(lease)

    async def tell(self, order: Order) -> None:
        self._worker.tell(order)

    async def poll(self) -> list[PoolEvent]:
        events = await self._worker.poll(ACTOR_POLL_S)
        if (now := time.monotonic()) >= self._export_at and isinstance(beat := events[-1], Heartbeat):
            self._export_at = now + EXPORT_S
            self._exporter.export(self._worker.meter.take(beat, self._worker.info.window))
        return events

    async def drain(self, timeout_s: float) -> list[PoolEvent]:
        return await self._worker.drain(timeout_s)


@dataclass(frozen=True, slots=True)
class _Waiting:
    worker_id: str
    call: Literal["open", "poll", "drain"]


class RayPool:
    """A `WorkerPool` over actors. Belongs to one thread."""

    def __init__(self, setup: WorkerSetup) -> None:
        connect(setup.spec.cluster)
        self._setup = setup
        self._cluster = setup.spec.cluster
        self._actors: dict[str, ActorHandle] = {}
        self._waiting: dict[ray.ObjectRef, _Waiting] = {}
        self._nodes: dict[str, str] = {}
        self._leaving: set[str] = set()
        self._look_at = 0.0

    def start_worker(self, worker_id: str) -> None:
        cluster = self._cluster
        actor = (
            ray.remote(WorkerActor)
            .options(
                name=None,
                num_cpus=cluster.cpus_per_worker,
                num_gpus=cluster.gpus_per_worker,
                resources=dict(cluster.resources_per_worker) or None,
                scheduling_strategy="SPREAD" if cluster.placement == "SPREAD" else "DEFAULT",
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=64,
            )
            .remote()
        )
        self._actors[worker_id] = actor
        self._wait_for(worker_id, "open", actor.open.remote(replace(self._setup, worker_id=worker_id)))

    def _wait_for(self, worker_id: str, call: Literal["open", "poll", "drain"], ref: ray.ObjectRef) -> None:
        self._waiting[ref] = _Waiting(worker_id, call)

    def assign(self, lease: Lease) -> None:
        # Its own failure says nothing that the outstanding poll does not say too.
        if (actor := self._actors.get(lease.worker_id)) is not None:
            actor.assign.remote(lease)

    def tell(self, worker_id: str, order: Order) -> None:
        if (actor := self._actors.get(worker_id)) is not None:
            actor.tell.remote(order)

    def kill(self, worker_id: str) -> None:
        self._forget(worker_id)

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        if not self._waiting:
            return []
        leaving = self._leave_draining_nodes()
        ready, _ = ray.wait(list(self._waiting), num_returns=1, timeout=0.0 if leaving else timeout_s)
        if ready:
            ready, _ = ray.wait(list(self._waiting), num_returns=len(self._waiting), timeout=0)
        return [*leaving, *(event for ref in ready for event in self._take(ref))]

    def drain(self, timeout_s: float) -> list[PoolEvent]:
        """News that the polls still hold is taken in first, so that no commit goes unnoticed."""
        events = self.poll(0.0)
        opening = {waiting.worker_id for waiting in self._waiting.values() if waiting.call == "open"}
        draining = {
            actor.drain.remote(timeout_s): worker_id
            for worker_id, actor in self._actors.items()
            if worker_id not in opening
        }
        refs = [*draining, *(ref for ref, waiting in self._waiting.items() if waiting.call != "open")]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s + DRAIN_MARGIN_S) if refs else ([], [])
        for ref in ready:
            try:
                events += ray.get(ref)
            except RayError:
                continue  # it died while it drained: its rows since the last flush are lost, as in any crash
        self.close()
        return events

    def close(self) -> None:
        for worker_id in list(self._actors):
            self._forget(worker_id)

    def _take(self, ref: ray.ObjectRef) -> list[PoolEvent]:
        """Events of one reply; the next poll is sent at once."""
        waiting = self._waiting.pop(ref, None)
        if waiting is None:
            return []  # forgotten a moment ago, by an earlier reply
        worker_id = waiting.worker_id
        try:
            reply = ray.get(ref)
        except RayError as error:
            loss = self._make_loss(worker_id, error)
            self._forget(worker_id)
            return [WorkerStartFailed(worker_id, loss.reason) if waiting.call == "open" else loss]
        if waiting.call == "drain":
            self._forget(worker_id)
            return [*reply, WorkerLost(worker_id, "its node is being drained", (), has_rows_to_blame=False)]
        if waiting.call == "open":
            self._nodes[worker_id] = reply.node
        events: list[PoolEvent] = [WorkerStarted(reply)] if waiting.call == "open" else reply
        if any(isinstance(event, WorkerLost) for event in events):
            self._forget(worker_id)
        elif (actor := self._actors.get(worker_id)) is not None:
            self._waiting[actor.poll.remote()] = _Waiting(worker_id, "poll")
        return events

    def _make_loss(self, worker_id: str, error: RayError) -> WorkerLost:
        """A machine that went says nothing of the rows that were on it."""
        is_preempted = isinstance(error, RayActorError) and error.preempted
        node = self._nodes.get(worker_id, "")
        is_gone = worker_id in self._leaving or (
            bool(node) and not any(known["Alive"] and known["NodeID"].startswith(node) for known in ray.nodes())
        )
        return WorkerLost(worker_id, describe_error(error), has_rows_to_blame=not (is_preempted or is_gone))

    def _leave_draining_nodes(self) -> list[PoolEvent]:
        """Ray was told that a node goes soon (a spot notice, `ray drain-node`, the autoscaler): its workers journal what
        they have and hand it back while there is time."""
        now = time.monotonic()
        if now < self._look_at:
            return []
        self._look_at = now + DRAINING_LOOK_S
        # The call that Ray's own libraries (Train, Data) make; there is no public one as of Ray 2.60.
        draining: dict[str, int] = ray._private.state.state.get_draining_nodes()
        events: list[PoolEvent] = []
        for worker_id, actor in self._actors.items():
            node = self._nodes.get(worker_id)
            deadlines = [at_ms for name, at_ms in draining.items() if node and name.startswith(node)]
            if not deadlines or worker_id in self._leaving:
                continue
            left_s = deadlines[0] / 1000 - time.time() - DRAINING_MARGIN_S if deadlines[0] else self._cluster.drain_s
            drain = actor.drain.remote(max(0.0, min(self._cluster.drain_s, left_s)))
            self._leaving.add(worker_id)
            self._waiting[drain] = _Waiting(worker_id, "drain")
            events.append(WorkerLeaving(worker_id, f"its node {node} is being drained"))
        return events

    def _forget(self, worker_id: str) -> None:
        """Kill the actor and drop what it may still answer."""
        if (actor := self._drop(worker_id)) is not None:
            ray.kill(actor)

    def _drop(self, worker_id: str) -> ActorHandle | None:
        self._waiting = {ref: waiting for ref, waiting in self._waiting.items() if waiting.worker_id != worker_id}
        return self._actors.pop(worker_id, None)


def describe_error(error: RayError) -> str:
    """One line: our own reason where the actor raised one, else what Ray says of its death."""
    if isinstance(error, RayTaskError):
        return str(error.cause).splitlines()[0]
    kind = "the actor died" if isinstance(error, RayActorError) else type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{kind}: {lines[0]}" if lines else kind


class _Name:
    """Holds a name as long as its driver lives."""

    async def wait(self) -> None:
        await asyncio.Event().wait()


@contextmanager
def hold_name(cluster: ClusterSpec, root: str) -> Iterator[None]:
    """Keep other drivers of this cluster off an output folder: a named actor that dies with us. Raises LeaseHeld."""
    connect(cluster)
    name = f"batchgen-output-{hashlib.sha256(root.encode()).hexdigest()[:16]}"
    try:
        # num_cpus=0: a control actor must never wait for a core that the engines hold.
        actor = ray.remote(_Name).options(name=name, namespace=NAMESPACE, num_cpus=0, max_concurrency=2).remote()
    except ValueError as error:
        raise LeaseHeld(
            f"{root}: another run of this Ray cluster is working on it; wait for it or cancel it"
        ) from error
    try:
        yield
    finally:
        ray.kill(actor)
