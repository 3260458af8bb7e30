"""Reads answers of other workers where the driver says they are, one segment or file at a time."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from batchgen.errors import StorageError
from batchgen.queue.events import PoolEvent
from batchgen.records import JournalRef, Slot
from batchgen.reuse.answers import Answer, Answers
from batchgen.reuse.desk import Alike, Source
from batchgen.worker.open_shard import OpenShard

RETRY_S = 1.0

Emit = Callable[[PoolEvent], None]
Spawn = Callable[[Coroutine[Any, Any, None]], None]
OpenShards = Mapping[str, OpenShard]


class Feed(Protocol):
    """`Feeder.feed`."""

    def __call__(self, shard: OpenShard, wanted: Collection[Slot] | None = None) -> Awaitable[None]: ...


@dataclass(frozen=True, slots=True)
class Around:
    """What a worker gives: its name, answers of others, its way to the driver, its tasks, its open shards by batch."""

    worker_id: str
    answers: Answers
    emit: Emit
    spawn: Spawn
    shards: OpenShards


class AskAgain(Protocol):
    """`told`: the row whose answer was not to be found."""

    def __call__(self, alike: Alike, told: int = 0) -> None: ...


class Lookout:
    """`give` an answer to all that wait for it; `part` those whose answer there is none."""

    def __init__(
        self,
        answers: Answers,
        give: Callable[[Alike, Answer], None],
        part: Callable[[Alike], None],
        ask_again: AskAgain,
    ) -> None:
        self._answers, self._give, self._part, self._ask_again = answers, give, part, ask_again

    async def look(self, number: int, source: Source) -> None:
        """Read what is said to be there. What is not, where nobody works on it any more, is asked for again."""
        source.look_at = None
        try:
            if source.is_committed:
                await self._read_file(number, source)
                return
            while source.unread:
                await self._read_segment(source, *source.unread.popitem())
            ended, source.ended = sorted(source.ended), set()
            for place in () if source.is_committed else ended:  # it may be so by now, and is read next
                if (alike := source.places.get(place)) is not None:
                    self._ask_again(alike, place)
        except StorageError:  # the next look may do better
            source.look_at = time.monotonic() + RETRY_S

    async def _read_segment(self, source: Source, ref: JournalRef, places: set[int]) -> None:
        try:
            self._settle(source, await asyncio.to_thread(self._answers.read_segment, ref, places))
        except StorageError:
            source.unread.setdefault(ref, set()).update(places)
            raise

    async def _read_file(self, number: int, source: Source) -> None:
        """All rows are there, so what is not is no answer."""
        if not (wanted := list(source.places)):
            return
        found = await asyncio.to_thread(self._answers.read_file, number, wanted)
        self._settle(source, {**dict.fromkeys(wanted), **found})

    def _settle(self, source: Source, found: Mapping[int, Answer | None]) -> None:
        """None: it has failed. Half a fingerprint may be that of another."""
        for place, answer in found.items():
            if (alike := source.places.get(place)) is None:
                continue
            if answer is not None and answer[1].fingerprint == alike.fingerprint:
                self._give(alike, answer)
            else:
                self._part(alike)
