"""A set of asyncio tasks that can't fail unseen: an exception nobody expected is told to `on_death`.

Its text may quote a prompt, so only its type and place are told.
"""

import asyncio
import traceback
from collections.abc import Callable, Coroutine
from typing import Any


class TaskGroup:
    """Unlike asyncio's, it takes tasks at any time and outlives them."""

    def __init__(self, on_death: Callable[[str], None]) -> None:
        self._on_death = on_death
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    async def wait(self, timeout_s: float | None = None) -> None:
        """Until all tasks ended, or this long."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout_s)

    async def cancel(self) -> None:
        """End all tasks but the calling one, and wait for that."""
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        place = traceback.extract_tb(error.__traceback__)[-1]
        self._on_death(f"unexpected {type(error).__name__} in {place.name} ({place.filename}:{place.lineno})")
