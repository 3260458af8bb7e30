"""Workers as threads of this process, each with its own event loop: no Ray, no start-up. For small jobs and tests."""

import asyncio
import contextlib
import queue
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace

from batchgen.errors import EngineDied
from batchgen.queue.events import PoolEvent, WorkerLost, WorkerStarted, WorkerStartFailed
from batchgen.queue.orders import Order
from batchgen.records import Lease
from batchgen.worker.worker import Worker, WorkerSetup, open_worker

POLL_S = 0.2
# A thread that doesn't end (an engine that hangs in its close) is left behind after this: it can't be killed.
JOIN_S = 60.0

Open = Callable[[WorkerSetup, str], Awaitable[Worker]]


class InlinePool:
    """A `WorkerPool`. `setup.worker_id` is replaced for each worker; `open_` makes one that is up."""

    def __init__(self, setup: WorkerSetup, open_: Open = open_worker) -> None:
        self._setup, self._open = setup, open_
        self._events: queue.SimpleQueue[PoolEvent] = queue.SimpleQueue()
        self._threads: dict[str, _WorkerThread] = {}

    def start_worker(self, worker_id: str) -> None:
        self._threads[worker_id] = _WorkerThread(replace(self._setup, worker_id=worker_id), self._events, self._open)

    def assign(self, lease: Lease) -> None:
        self._threads[lease.worker_id].assign(lease)

    def tell(self, worker_id: str, order: Order) -> None:
        if (thread := self._threads.get(worker_id)) is not None:
            thread.assign(order)

    def kill(self, worker_id: str) -> None:
        if (thread := self._threads.pop(worker_id, None)) is not None:
            thread.stop()

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        try:
            events = [self._events.get(timeout=timeout_s)]
        except queue.Empty:
            return []
        while not self._events.empty():
            events.append(self._events.get())
        return events

    def drain(self, timeout_s: float) -> list[PoolEvent]:
        for thread in self._threads.values():
            thread.stop(drain_s=timeout_s)
        for thread in self._threads.values():
            thread.join(timeout_s + JOIN_S)
        self.close()
        return self.poll(0.0)

    def close(self) -> None:
        """Those that drain are not waited for: a second Ctrl-C came in between."""
        for thread in self._threads.values():
            thread.end()
        for thread in self._threads.values():
            thread.join(JOIN_S)
        self._threads.clear()


class _WorkerThread:
    """One worker's thread. Every call is safe at any time, also before the engine is up and after it ended."""

    def __init__(self, setup: WorkerSetup, events: "queue.SimpleQueue[PoolEvent]", open_: Open) -> None:
        self._setup, self._events, self._open = setup, events, open_
        self._orders: queue.SimpleQueue[Lease | Order] = queue.SimpleQueue()
        self._is_stopping = threading.Event()
        self._drain_s: float | None = None
        self._wake: Callable[[], None] = lambda: None
        self._cancel: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name=setup.worker_id, daemon=True)
        self._thread.start()

    def assign(self, order: Lease | Order) -> None:
        self._orders.put(order)
        self._wake()

    def stop(self, *, drain_s: float | None = None) -> None:
        """Ask it to end, after draining for this long where given. The first call decides."""
        if not self._is_stopping.is_set():
            self._drain_s = drain_s
            self._is_stopping.set()
            self._wake()

    def end(self) -> None:
        """Now, whatever it does."""
        is_draining = self._is_stopping.is_set() and self._drain_s is not None
        self.stop()
        if is_draining:
            self._cancel()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    async def _main(self) -> None:
        try:
            worker = await self._open(self._setup, socket.gethostname())
        except EngineDied as error:
            self._events.put(WorkerStartFailed(self._setup.worker_id, str(error)))
            return
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # it ended meanwhile: there is nothing left to wake
                loop.call_soon_threadsafe(worker.wake)

        def cancel() -> None:
            with contextlib.suppress(RuntimeError):  # the same
                loop.call_soon_threadsafe(serving.cancel)

        serving = asyncio.ensure_future(self._serve(worker))
        self._wake, self._cancel = wake, cancel
        self._events.put(WorkerStarted(worker.info))
        try:
            await asyncio.wait([serving])
            if not serving.cancelled():
                serving.result()
        finally:
            await worker.close()

    async def _serve(self, worker: Worker) -> None:
        while not self._is_stopping.is_set():
            while not self._orders.empty():
                order = self._orders.get()
                worker.assign(order) if isinstance(order, Lease) else worker.tell(order)
            for event in await worker.poll(POLL_S):
                self._events.put(event)
                if isinstance(event, WorkerLost):
                    return
        if self._drain_s is not None:
            for event in await worker.drain(self._drain_s):
                self._events.put(event)
