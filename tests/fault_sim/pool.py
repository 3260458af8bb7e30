"""The network between a driver and its workers: a `WorkerPool` whose workers are processes of the world.

As Ray does: messages arrive late but in order; a worker's death is noticed after a while, and what it had said last may
be lost; a worker that is cut off is taken for dead though it lives, and killed when the cut ends; a dead driver's workers
live on for a while.
"""

import asyncio
import pickle
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from batchgen.errors import EngineDied
from batchgen.queue.events import PoolEvent, WorkerLost, WorkerStarted, WorkerStartFailed
from batchgen.queue.orders import GiveRows, Order
from batchgen.records import Lease
from batchgen.worker.worker import Worker, WorkerSetup, open_worker

from .kernel import Kernel, Process, Strand, VirtualLoop

WORKER_POLL_S = 1.0
MAX_NOTICE_S = 4.0
MAX_ORPHAN_S = 20.0
DRAIN_MARGIN_S = 10.0


@dataclass(slots=True)
class Peer:
    """The driver's end of one worker. `is_gone`: nothing of it is listened to any more."""

    process: Process
    orders: deque[Lease | Order] = field(default_factory=deque)
    drain_s: float | None = None
    wake: Callable[[], None] = lambda: None
    is_gone: bool = False
    has_drained: bool = False
    sent_until: float = 0.0
    heard_until: float = 0.0


class SimPool:
    def __init__(
        self,
        kernel: Kernel,
        setup: WorkerSetup,
        make_process: Callable[[str], Process],
        on_given_up: Callable[[Process], None],
    ) -> None:
        self._kernel, self._setup, self._make_process, self._on_given_up = kernel, setup, make_process, on_given_up
        self._driver = kernel.process
        assert self._driver is not None
        self._peers: dict[str, Peer] = {}
        self._inbox: list[PoolEvent] = []
        self._waiter: Strand | None = None
        self._driver.on_death.append(self._orphan)

    # ---- WorkerPool --------------------------------------------------------------------------------------------------

    def start_worker(self, worker_id: str) -> None:
        process = self._make_process(worker_id)
        peer = self._peers[worker_id] = Peer(process)
        setup = pickle.loads(pickle.dumps(replace(self._setup, worker_id=worker_id)))
        process.on_death.append(lambda: self._notice(worker_id, peer))
        self._later(0.5, lambda: self._kernel.spawn(process, lambda: self._run(peer, setup)))

    def assign(self, lease: Lease) -> None:
        self._order(lease.worker_id, lease)

    def tell(self, worker_id: str, order: Order) -> None:
        begun = " that are begun" if isinstance(order, GiveRows) and order.is_begun else ""
        self._kernel.tell(f"{type(order).__name__} for {worker_id}{begun}")
        self._order(worker_id, order)

    def _order(self, worker_id: str, order: Lease | Order) -> None:
        if (peer := self._peers.get(worker_id)) is not None:  # else its loss is on its way to the driver
            self._send(peer, lambda peer: peer.orders.append(pickle.loads(pickle.dumps(order))))

    def kill(self, worker_id: str) -> None:
        if (peer := self._peers.pop(worker_id, None)) is not None:
            peer.is_gone = True
            self._on_given_up(peer.process)
            self._kill_later(peer, "by its driver")

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        if not self._inbox:
            self._waiter = self._kernel.current
            self._kernel.wait(timeout_s)
            self._waiter = None
        events, self._inbox = self._inbox, []
        return events

    def drain(self, timeout_s: float) -> list[PoolEvent]:
        def begin(peer: Peer) -> None:
            peer.drain_s = timeout_s

        for peer in self._peers.values():
            self._send(peer, begin)
        events: list[PoolEvent] = []
        give_up_at = self._kernel.now + timeout_s + DRAIN_MARGIN_S
        while self._kernel.now < give_up_at and not all(p.has_drained or p.is_gone for p in self._peers.values()):
            events += self.poll(0.5)
        return events + self.poll(0.0)

    def close(self) -> None:
        for worker_id in list(self._peers):
            self.kill(worker_id)

    # ---- the way between them ----------------------------------------------------------------------------------------

    def _later(self, at_most_s: float, action: Callable[[], object]) -> None:
        kernel = self._kernel
        kernel.call_at(kernel.now + kernel.rng.uniform(0, at_most_s), lambda: action() and None)

    def _send(self, peer: Peer, do: Callable[[Peer], object]) -> None:
        """To the worker, in order, once it can be reached."""
        kernel = self._kernel

        def arrive() -> None:
            if peer.process.net_cut_until > kernel.now:
                kernel.call_at(peer.process.net_cut_until, arrive)
            elif not peer.process.is_dead:
                do(peer)
                peer.wake()

        peer.sent_until = max(peer.sent_until, kernel.now + kernel.rng.uniform(0, 0.05))
        kernel.call_at(peer.sent_until, arrive)

    def _hear(self, peer: Peer, event: PoolEvent) -> None:
        """From the worker, in order, once it can be reached; not what is on its way when it dies."""
        kernel = self._kernel
        news = pickle.loads(pickle.dumps(event))

        def arrive() -> None:
            if peer.process.net_cut_until > kernel.now and not peer.process.is_dead:
                peer.heard_until = max(peer.heard_until, peer.process.net_cut_until)
                kernel.call_at(peer.heard_until, arrive)
            elif not (peer.is_gone or peer.process.is_dead):
                self._take(news)

        peer.heard_until = max(peer.heard_until, kernel.now + kernel.rng.uniform(0, 0.05))
        kernel.call_at(peer.heard_until, arrive)

    def _take(self, event: PoolEvent) -> None:
        if self._driver is None or self._driver.is_dead:
            return
        self._inbox.append(event)
        if self._waiter is not None:
            self._kernel.wake(self._waiter)

    def _notice(self, worker_id: str, peer: Peer) -> None:
        def tell() -> None:
            if not peer.is_gone:
                peer.is_gone = True
                self._peers.pop(worker_id, None)
                self._take(WorkerLost(worker_id, "the actor died"))

        self._later(MAX_NOTICE_S, tell)

    def suspect(self, process: Process) -> None:
        """Ray takes a worker that is cut off for dead. It lives on, and is killed when it can be reached again."""
        for worker_id, peer in list(self._peers.items()):
            if peer.process is process:
                self._notice(worker_id, peer)
                self._kill_later(peer, "was taken for dead")

    def _kill_later(self, peer: Peer, why: str) -> None:
        """Not before its node can be reached: what froze may be the whole of it."""
        kernel, is_node_frozen = self._kernel, self._kernel.rng.random() < 0.7

        def end() -> None:
            out_until = max(peer.process.net_cut_until, peer.process.frozen_until if is_node_frozen else 0.0)
            if out_until > kernel.now:
                kernel.call_at(out_until + kernel.rng.uniform(0, 2), end)
            else:
                kernel.kill(peer.process, why)

        self._later(1.0, end)

    def _orphan(self) -> None:
        for peer in self._peers.values():
            process = peer.process
            self._later(MAX_ORPHAN_S, lambda process=process: self._kernel.kill(process, "its driver is dead"))

    # ---- the worker's side -------------------------------------------------------------------------------------------

    def _run(self, peer: Peer, setup: WorkerSetup) -> None:
        loop = VirtualLoop(self._kernel)
        try:
            loop.run_until_complete(self._main(peer, setup))
        finally:
            loop.close()

    async def _main(self, peer: Peer, setup: WorkerSetup) -> None:
        try:
            worker = await open_worker(setup, peer.process.machine)
        except EngineDied as error:
            self._hear(peer, WorkerStartFailed(setup.worker_id, str(error)))
            return
        loop = asyncio.get_running_loop()
        peer.wake = lambda: loop.call_soon_threadsafe(worker.wake) and None
        self._hear(peer, WorkerStarted(worker.info))
        try:
            await self._serve(peer, worker)
        finally:
            peer.wake = lambda: None
            if not peer.process.is_dead:
                await worker.close()

    async def _serve(self, peer: Peer, worker: Worker) -> None:
        while peer.drain_s is None:
            while peer.orders:
                order = peer.orders.popleft()
                worker.assign(order) if isinstance(order, Lease) else worker.tell(order)
            for event in await worker.poll(WORKER_POLL_S):
                self._hear(peer, event)
                if isinstance(event, WorkerLost):
                    return
        for event in await worker.drain(peer.drain_s):
            self._hear(peer, event)
        at = max(peer.heard_until, self._kernel.now)
        self._kernel.call_at(at, lambda: self._end_drain(peer))

    def _end_drain(self, peer: Peer) -> Any:
        peer.has_drained = True
        if self._waiter is not None:
            self._kernel.wake(self._waiter)
