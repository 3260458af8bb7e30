"""An `EngineHost` as a Ray actor: detached and named, so that it stays warm when the controller is killed.

An engine that no controller has asked for `LEASH_S` seconds ends itself: nobody would ever need it.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator

import ray

from batchgen.errors import EngineDied
from batchgen.queue.events import PoolEvent
from batchgen.queue.orders import Order
from batchgen.ray_pool import ACTOR_POLL_S
from batchgen.records import Lease, Result, WorkerInfo
from batchgen.serve.deltas import Delta
from batchgen.serve.errors import ApiError
from batchgen.serve.host import EngineHost, HostReport, Left
from batchgen.serve.interactive import Ask
from batchgen.serve.interpreter import Switching, freeze_loaded
from batchgen.serve.spec import ServedModel
from batchgen.worker.setup import WorkerSetup

LEASH_S = 120.0


class EngineActor:
    """The remote side. `identity`: of the build and the model's sections; another controller's must be the same."""

    def __init__(self, served: ServedModel, identity: str) -> None:
        self._host = EngineHost(served, ray.get_runtime_context().get_node_id()[:12])
        self._identity = identity
        self._heard_at = time.monotonic()
        self._opened: asyncio.Future[None] | None = None
        self._leash: asyncio.Future[None] | None = None
        self._coming: set[str] = set()
        self._switching = Switching()

    async def open(self) -> None:
        if self._opened is None:
            self._opened = asyncio.ensure_future(self._load())
            self._leash = asyncio.ensure_future(self._watch())
        await asyncio.shield(self._opened)

    async def _load(self) -> None:
        await self._host.open()
        freeze_loaded()

    async def get_identity(self) -> tuple[str, int]:
        """(identity, process id)."""
        self._heard_at = time.monotonic()
        return self._identity, os.getpid()

    async def adopt(self) -> None:
        """Another controller: the workers of the last one's runs end."""
        self._heard_at = time.monotonic()
        self._coming.clear()
        await self._host.detach_all()

    async def report(self) -> HostReport:
        self._heard_at = time.monotonic()
        return self._host.make_report()

    async def attach(self, key: str, setup: WorkerSetup, deadline: float) -> WorkerInfo:
        """`key`: the worker's here, where those of several jobs are."""
        self._coming.add(key)
        try:
            await self.open()  # Ray may begin this call before the one that opens, though it was sent later
            info = await self._host.attach(key, setup, deadline)
            if key not in self._coming:  # its run ended while the engine loaded, and nobody else would ever end it
                await self._host.detach(key)
                raise EngineDied("its run let go of it before it was open")
        finally:
            self._coming.discard(key)
        return info

    async def detach(self, worker_id: str) -> Left:
        self._coming.discard(worker_id)
        return await self._host.detach(worker_id)

    async def assign(self, worker_id: str, lease: Lease) -> None:
        self._host.get_worker(worker_id).assign(lease)

    async def tell(self, worker_id: str, order: Order) -> None:
        self._host.get_worker(worker_id).tell(order)

    async def poll(self, worker_id: str) -> list[PoolEvent]:
        return await self._host.get_worker(worker_id).poll(ACTOR_POLL_S)

    async def drain(self, worker_id: str, timeout_s: float) -> list[PoolEvent]:
        return await self._host.get_worker(worker_id).drain(timeout_s)

    async def answer(self, ask: Ask) -> list[Result] | ApiError:
        self._switching.note()
        try:
            return await self._host.answer(ask)
        except ApiError as error:  # as a value: Ray would wrap it in an error of its own
            return error

    async def stream(self, ask: Ask) -> AsyncIterator[Delta | Result | ApiError]:
        self._switching.note()
        async for news in self._host.stream(ask):
            yield news

    async def _watch(self) -> None:
        while time.monotonic() - self._heard_at < LEASH_S:
            await asyncio.sleep(1.0)
            self._switching.look(self._host.make_report().num_urgent)
        os._exit(0)
