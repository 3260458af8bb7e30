"""Virtual time: strands of blocking code, of which one runs at a time, and which only the kernel switches between.

A strand is a greenlet: a driver, its lease keeper, a worker's event loop, a function that was sent to a thread. It gives
way only where it sleeps, waits or touches the store, so a world is as deterministic as its seed. A process is a set of
strands with one fate (killed, frozen) and one clock, which may run fast or slow and show another time of day.
"""

import asyncio
import heapq
import random
from collections.abc import Callable
from typing import Any

import greenlet


class Killed(BaseException):
    """Raised wherever a strand of a killed process would go on. No effect of it reaches anybody any more."""


class Process:
    """`rate`: its seconds per true second; `wall`: what is added for its time of day."""

    def __init__(self, name: str, machine: str, rate: float = 1.0, wall: float = 0.0) -> None:
        self.name, self.machine, self.rate, self.wall = name, machine, rate, wall
        self.is_dead = False
        self.is_asked_to_stop = False
        self.frozen_until = 0.0
        self.store_cut_until = 0.0
        self.net_cut_until = 0.0
        self.strands: dict[Strand, None] = {}  # a set's order is not the seed's
        self.on_death: list[Callable[[], None]] = []


class Strand:
    def __init__(self, process: Process, let: greenlet.greenlet) -> None:
        self.process, self.let = process, let
        self.loop: Any = None
        self.ticket = 0
        self.is_parked = False
        self.is_woken = False
        self.is_done = False


class Kernel:
    """`tell` gets one line of the story at a time, as (time, who, words)."""

    def __init__(self, rng: random.Random, tell: Callable[[float, str, str], None]) -> None:
        self.rng, self._tell = rng, tell
        self.now = 0.0
        self.current: Strand | None = None
        self.failure: BaseException | None = None
        self._hub = greenlet.getcurrent()
        self._heap: list[tuple[float, float, int, Any, int]] = []
        self.live: dict[Strand, None] = {}
        self._num_pushed = 0
        self.num_switches = 0

    # ---- clocks ------------------------------------------------------------------------------------------------------

    def monotonic(self) -> float:
        process = self.process
        return 1000.0 + self.now * (process.rate if process else 1.0)

    def wall(self) -> float:
        process = self.process
        return 1_700_000_000.0 + self.now + (process.wall if process else 0.0)

    @property
    def process(self) -> Process | None:
        return self.current.process if self.current else None

    # ---- what a strand calls -----------------------------------------------------------------------------------------

    def sleep(self, seconds: float) -> None:
        """Of the calling process's own seconds."""
        strand = self._me()
        self._push(self.now + max(0.0, seconds) / strand.process.rate, strand)
        self._park(strand)

    def wait(self, timeout_s: float | None) -> bool:
        """Until `wake`, or this long. Was it woken?"""
        strand = self._me()
        if not strand.is_woken:
            if timeout_s is not None:
                self._push(self.now + max(0.0, timeout_s) / strand.process.rate, strand)
            strand.is_parked = True
            self._park(strand)
            strand.is_parked = False
        was_woken, strand.is_woken = strand.is_woken, False
        return was_woken

    def check_alive(self) -> None:
        self._me()

    def _me(self) -> Strand:
        strand = self.current
        assert strand is not None, "only a strand may wait"
        if strand.process.is_dead:
            raise Killed
        return strand

    def _park(self, strand: Strand) -> None:
        strand.loop = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        self._hub.switch()
        asyncio._set_running_loop(strand.loop)
        if strand.process.is_dead:
            raise Killed

    # ---- what anybody calls ------------------------------------------------------------------------------------------

    def tell(self, words: str, who: str | None = None) -> None:
        self._tell(self.now, who or (self.process.name if self.process else "world"), words)

    def spawn(self, process: Process, work: Callable[[], object]) -> Strand:
        def main() -> None:
            try:
                if not process.is_dead:
                    work()
            except Killed:
                pass
            except BaseException as error:  # noqa: BLE001 - shown to the world, which ends
                if not process.is_dead:
                    self.failure = self.failure or error
            finally:
                strand.is_done = True
                process.strands.pop(strand, None)
                self.live.pop(strand, None)

        strand = Strand(process, greenlet.greenlet(main, self._hub))
        process.strands[strand] = self.live[strand] = None
        self._push(self.now, strand)
        return strand

    def wake(self, strand: Strand) -> None:
        strand.is_woken = True
        if strand.is_parked:
            self._push(self.now, strand)

    def call_at(self, when: float, action: Callable[[], None]) -> None:
        """Outside of all processes; must not wait."""
        self._num_pushed += 1
        heapq.heappush(self._heap, (max(when, self.now), self.rng.random(), self._num_pushed, action, -1))

    def kill(self, process: Process, why: str) -> None:
        """At once; raises Killed when it is the caller's own."""
        if process.is_dead:
            return
        self.tell(f"killed: {why}", process.name)
        process.is_dead = True
        for strand in process.strands:
            if strand is not self.current:
                self._push(self.now, strand)
        for action in process.on_death:
            action()
        if self.process is process:
            raise Killed

    def _push(self, when: float, strand: Strand) -> None:
        self._num_pushed += 1
        heapq.heappush(self._heap, (when, self.rng.random(), self._num_pushed, strand, strand.ticket))

    # ---- the hub -----------------------------------------------------------------------------------------------------

    def run(self, is_over: Callable[[], bool], until: float) -> None:
        """Until it is over, nothing is left to do, or this time. Raises what a strand failed with."""
        while self._heap and not is_over():
            when, tie, number, what, ticket = heapq.heappop(self._heap)
            if when > until:
                heapq.heappush(self._heap, (when, tie, number, what, ticket))
                self.now = until
                return
            if ticket < 0:
                self.now = max(self.now, when)
                what()
            elif not what.is_done and what.ticket == ticket:
                self._resume(when, what)
            if self.failure is not None:
                raise self.failure

    def _resume(self, when: float, strand: Strand) -> None:
        process = strand.process
        if process.frozen_until > when and not process.is_dead:
            self._push(process.frozen_until, strand)
            return
        self.now = max(self.now, when)
        self.num_switches += 1
        strand.ticket += 1
        self.current = strand
        strand.let.switch()
        self.current = None

    def end(self) -> None:
        """Unwind whatever still lives, so that nothing of this world runs in the next one."""
        self._heap.clear()
        for strand in list(self.live):
            strand.process.is_dead = True
        for strand in list(self.live):
            if not strand.is_done:
                self.current = strand
                strand.let.switch()
                self.current = None


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop whose time is the kernel's and whose threads are strands. Made by the strand that runs it."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self._kernel, self._strand = kernel, kernel.current
        self._selector = self
        self.slow_calls = lambda: 0.0

    def time(self) -> float:
        return self._kernel.monotonic()

    def select(self, timeout: float | None) -> list[Any]:
        if timeout == 0:
            self._kernel.check_alive()
            if self._strand is not None:
                self._strand.is_woken = False
        else:
            self._kernel.wait(timeout)
        return []

    def _process_events(self, event_list: Any) -> None: ...

    def _write_to_self(self) -> None:
        assert self._strand is not None
        self._kernel.wake(self._strand)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        del executor
        future = self.create_future()
        process = self._kernel.process
        assert process is not None

        def work() -> None:
            try:
                outcome: tuple[Any, BaseException | None] = (func(*args), None)
            except Exception as error:  # noqa: BLE001 - the future's
                outcome = (None, error)
            if not self.is_closed():
                self.call_soon_threadsafe(finish, *outcome)

        def finish(value: Any, error: BaseException | None) -> None:
            if not future.done():
                if error is None:
                    future.set_result(value)
                else:
                    future.set_exception(error)

        self._kernel.spawn(process, work)
        return future


# ---- threading, for the modules that start threads of their own ------------------------------------------------------


class Threading:
    """What `batchgen.driver.hold` and `batchgen.driver.lease` use of the module `threading`."""

    def __init__(self, get_kernel: Callable[[], Kernel]) -> None:
        class Waitable:
            def __init__(self) -> None:
                self._waiters: list[Strand] = []

            def _wait(self, timeout_s: float | None) -> bool:
                kernel = get_kernel()
                strand = kernel.current
                assert strand is not None
                self._waiters.append(strand)
                try:
                    return kernel.wait(timeout_s)
                finally:
                    if strand in self._waiters:
                        self._waiters.remove(strand)

            def _wake_all(self) -> None:
                for strand in list(self._waiters):
                    get_kernel().wake(strand)

        class Event(Waitable):
            def __init__(self) -> None:
                super().__init__()
                self._is_set = False

            def is_set(self) -> bool:
                return self._is_set

            def set(self) -> None:
                self._is_set = True
                self._wake_all()

            def wait(self, timeout: float | None = None) -> bool:
                if not self._is_set:
                    self._wait(timeout)
                return self._is_set

        class Lock(Waitable):
            def __init__(self) -> None:
                super().__init__()
                self._is_held = False

            def __enter__(self) -> None:
                while self._is_held:
                    self._wait(None)
                self._is_held = True

            def __exit__(self, *_: object) -> None:
                self._is_held = False
                self._wake_all()

        class Thread:
            def __init__(self, target: Callable[[], object], name: str = "", daemon: bool = False) -> None:
                del name, daemon
                self._target, self._ended = target, Event()

            def start(self) -> None:
                kernel = get_kernel()
                assert kernel.process is not None
                kernel.spawn(kernel.process, self._run)

            def _run(self) -> None:
                try:
                    self._target()
                finally:
                    self._ended.set()

            def join(self, timeout: float | None = None) -> None:
                self._ended.wait(timeout)

        self.Event, self.Lock, self.Thread = Event, Lock, Thread
