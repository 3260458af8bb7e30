"""Interactive requests of one ingress on their way to the shared engines: straight to the actor, least busy first.

The controller says which engines are up; that is asked again every few seconds and whenever an engine is gone. A request
whose engine died before anything was answered is sent to one more engine, once: a request that kills engines must not
kill them all.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from batchgen.errors import EngineDied
from batchgen.records import Result
from batchgen.serve.deltas import Delta
from batchgen.serve.errors import ApiError
from batchgen.serve.interactive import Ask
from batchgen.serve.ray_engines import NAMESPACE

log = logging.getLogger("batchgen.serve")
FRESH_S = 3.0
# A controller that is started anew takes seconds, in which nobody need wait for it.
LOOK_S = 1.0
RETRY_AFTER_S = 5


def make_away() -> ApiError:
    told = "No engine of this model is up just now; try again soon."
    return ApiError(503, told, kind="server_error", code="engine_unavailable", retry_after_s=RETRY_AFTER_S)


class Gateway:
    """Belongs to one event loop. `controller`: the controller deployment's handle."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller
        self._names: dict[str, list[str]] = {}
        self._looked_at = float("-inf")
        self._actors: dict[str, Any] = {}
        self._inflight: Counter[str] = Counter()

    async def answer(self, model: str, ask: Ask) -> list[Result]:
        """Raises ApiError."""
        for is_last in (False, True):
            name = await self._choose(model)
            self._inflight[name] += 1
            try:
                answered: list[Result] | ApiError = await self._get(name).answer.remote(ask)
            except RayError as error:
                log.warning("%s failed a request: %s", name, type(error).__name__)
                self._forget(name)
                if is_last or not is_death(error):
                    raise make_away() from error
                continue
            finally:
                self._inflight[name] -= 1
            if isinstance(answered, ApiError):
                raise answered
            return answered
        raise make_away()

    async def stream(self, model: str, ask: Ask) -> AsyncGenerator[Delta | Result, None]:
        """Raises ApiError, also half way: then the answer breaks off."""
        for is_last in (False, True):
            name, has_begun = await self._choose(model), False
            self._inflight[name] += 1
            try:
                async with aclosing(self._receive(name, ask)) as received:
                    async for news in received:
                        if isinstance(news, ApiError):
                            raise news
                        has_begun = True
                        yield news
                return
            except RayError as error:
                log.warning("%s failed a request: %s", name, type(error).__name__)
                self._forget(name)
                if is_last or has_begun or not is_death(error):
                    raise make_away() from error
            finally:
                self._inflight[name] -= 1

    async def _receive(self, name: str, ask: Ask) -> AsyncGenerator[Delta | Result | ApiError, None]:
        refs = self._get(name).stream.options(num_returns="streaming").remote(ask)
        try:
            async for ref in refs:
                yield await ref
        finally:
            ray.cancel(refs)  # of no effect on one that has ended; else nobody listens any more

    async def _choose(self, model: str) -> str:
        if not (names := self._names.get(model)) or time.monotonic() - self._looked_at > FRESH_S:
            await self._look()
            names = self._names.get(model)
        if not names:
            raise make_away()
        return min(names, key=lambda name: self._inflight[name])

    async def _look(self) -> None:
        """Where the controller is away, the engines that were up are asked all the same: they outlive it."""
        try:
            self._names = await asyncio.wait_for(self._controller.list_engines.remote(), LOOK_S)
        except (RayError, RayServeException, TimeoutError) as error:
            log.warning("the controller does not say which engines are up: %s", type(error).__name__)
        self._looked_at = time.monotonic()

    def _get(self, name: str) -> Any:
        if name not in self._actors:
            try:
                self._actors[name] = ray.get_actor(name, namespace=NAMESPACE)
            except ValueError as error:  # gone since the controller said so
                self._forget(name)
                raise make_away() from error
        return self._actors[name]

    def _forget(self, name: str) -> None:
        self._actors.pop(name, None)
        self._looked_at = float("-inf")
        self._names = {model: [each for each in names if each != name] for model, names in self._names.items()}


def is_death(error: RayError) -> bool:
    """Of the engine or its actor, and no error of the request's own."""
    return not hasattr(error, "cause") or isinstance(error.cause, EngineDied)
