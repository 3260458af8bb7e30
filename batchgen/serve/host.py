"""One engine that outlives jobs: workers of several jobs on it, and interactive requests beside them. No Ray.

A worker is a batch job's own `Worker`, made for one run of one job, with the engine borrowed and its window shared
(`places`). Invariant: what one job's worker does or suffers ends that worker only; the engine's own death ends all.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from batchgen.engines import create_engine, get_engine_kind
from batchgen.engines.base import Engine, Tokenizer
from batchgen.errors import EngineDied, Refusal
from batchgen.records import Generation, Request, Result, WorkerInfo
from batchgen.serve.batch_spec import make_served_spec
from batchgen.serve.deltas import Delta
from batchgen.serve.errors import ApiError
from batchgen.serve.interactive import Ask, Interactive
from batchgen.serve.places import Places, SharedWindow
from batchgen.serve.spec import ServedModel
from batchgen.worker.worker import Worker, WorkerSetup

# Interactive requests at once, in places: those beyond wait in the engine, and more are refused.
MAX_URGENT_WINDOWS = 2
Left = Literal["idle", "busy", "dead", "unknown"]


@dataclass(frozen=True, slots=True)
class HostReport:
    """What an engine is doing. `death`: why it is no more."""

    num_workers: int
    num_bulk: int
    num_urgent: int
    total_tokens: int
    num_answered: int
    death: str | None


class Borrowed:
    """The engine as a worker has it: `open` and `close` are the host's. Tells the host of a death."""

    def __init__(self, engine: Engine, on_death: Callable[[str], None]) -> None:
        self._engine, self._on_death = engine, on_death
        self.kind, self.version = engine.kind, engine.version

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._engine.tokenizer

    @property
    def max_model_len(self) -> int | None:
        return self._engine.max_model_len

    @property
    def total_tokens(self) -> int:
        return self._engine.total_tokens

    @total_tokens.setter
    def total_tokens(self, _: int) -> None:
        raise AttributeError("the engine's own")

    async def open(self) -> None:
        """It is open."""

    async def close(self) -> None:
        """It stays."""

    async def generate(self, request: Request) -> Generation:
        try:
            return await self._engine.generate(request)
        except EngineDied as error:
            self._on_death(str(error))
            raise

    async def generate_streaming(
        self, request: Request, on_tokens: Callable[[Sequence[int]], None] | None
    ) -> Generation:
        engine: Any = self._engine
        try:
            generation: Generation = await engine.generate_streaming(request, on_tokens)
        except EngineDied as error:
            self._on_death(str(error))
            raise
        return generation


class EngineHost:
    """All methods belong to one event loop."""

    def __init__(self, served: ServedModel, node: str) -> None:
        self._served, self._node = served, node
        self._workers: dict[str, tuple[Worker, SharedWindow]] = {}
        self._places: Places | None = None
        self._death: str | None = None
        self._num_answered = 0

    async def open(self) -> None:
        """Load the engine. Raises EngineDied with the reason."""
        try:
            engine = create_engine(make_served_spec(self._served))
            await engine.open()
        except EngineDied:
            raise
        except Exception as error:  # a vendor may fail with anything, and nothing was sent yet
            raise EngineDied(name_reason(error)) from error
        self._engine = Borrowed(engine, self._note_death)
        self._own = engine
        self._interactive = Interactive(self._served, self._engine)
        num, kind = self._served.engine.max_inflight, get_engine_kind(self._served.engine.kind)
        self._places = Places(num, MAX_URGENT_WINDOWS * num, has_urgency=kind.capabilities.has_urgency)

    async def attach(self, key: str, setup: WorkerSetup, deadline: float) -> WorkerInfo:
        """A worker of one run, known here by its key: its id is the run's own.
        Raises EngineDied with the reason, whatever it is."""
        places = self._check_alive()
        window = places.join(deadline)
        worker = Worker(setup, self._engine, self._node, window)
        try:
            info = await worker.open()
        except Exception as error:  # told to the run that asked; the engine is none the worse
            places.leave(window)
            raise EngineDied(name_reason(error)) from error
        self._workers[key] = worker, window
        return info

    def get_worker(self, key: str) -> Worker:
        """Raises EngineDied for one that is not here (any more)."""
        if key not in self._workers:
            raise EngineDied(f"{key} is not on this engine any more")
        return self._workers[key][0]

    async def detach(self, key: str) -> Left:
        """End the worker, without a drain. What it was doing, or that the engine is dead. Twice is a no-op."""
        found = self._workers.pop(key, None)
        if found is None:
            return "dead" if self._death else "unknown"
        worker, window = found
        was_idle = window.num_rows == 0
        await worker.close()
        if self._places is not None:
            self._places.leave(window)
        if self._death:
            return "dead"
        return "idle" if was_idle else "busy"

    async def detach_all(self) -> None:
        """Whoever drove them is gone: journal what they finished, and end them."""
        for key, (worker, _) in list(self._workers.items()):
            await worker.drain(0.0)
            await self.detach(key)

    async def answer(self, ask: Ask) -> list[Result]:
        """Raises EngineDied, ApiError (429)."""
        async with self._check_alive().urgent():
            results = await self._interactive.answer(ask)
        self._num_answered += 1
        return results

    async def stream(self, ask: Ask) -> AsyncIterator[Delta | Result | ApiError]:
        """As `Interactive.stream`; a refusal is the first and only word."""
        places = self._check_alive()
        try:
            async with places.urgent():
                async for news in self._interactive.stream(ask):
                    yield news
        except ApiError as error:
            yield error
        else:
            self._num_answered += 1

    def make_report(self) -> HostReport:
        if (places := self._places) is None:  # it loads
            return HostReport(0, 0, 0, 0, 0, None)
        tokens = self._engine.total_tokens
        return HostReport(
            len(self._workers), places.num_bulk, places.num_urgent, tokens, self._num_answered, self._death
        )

    async def close(self) -> None:
        for key in list(self._workers):
            await self.detach(key)
        await self._own.close()

    def _check_alive(self) -> Places:
        if self._death is not None or self._places is None:
            raise EngineDied(self._death or "it is not open yet")
        return self._places

    def _note_death(self, reason: str) -> None:
        self._death = self._death or reason


def name_reason(error: Exception) -> str:
    return str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
