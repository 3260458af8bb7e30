"""The actor's end of the wire: requests and answers of one start of the engine, under the eye of `Health`.

`watch` runs from the start to the end of it and says why it ended. Meanwhile `ask` sends requests, once the engine is up.
Invariant: every `ask` ends in an answer or an error, or is still in `tickets` when `watch` has returned; then it is the
caller's to end.
"""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from batchgen.engines.trtllm.errors import UNKNOWN
from batchgen.engines.trtllm.health import Health, Kill, Recycle
from batchgen.engines.trtllm.process import EngineProcess
from batchgen.engines.trtllm.wire import (
    Abort,
    Beat,
    Failed,
    Finished,
    FromEngine,
    Note,
    Start,
    Started,
    StartFailed,
    Submit,
    read_message,
)
from batchgen.errors import BatchgenError, RequestFailed, RequestRejected
from batchgen.records import RowId, SamplingParams

log = logging.getLogger(__name__)

LOOK_S = 0.1
CANARY = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=1)


@dataclass(frozen=True, slots=True)
class End:
    """Why a start of the engine is over. died: it went or had to be killed; recycled: it was worn; spec: it can't be
    started as the spec asks; failed: it could not be started."""

    kind: Literal["died", "recycled", "spec", "failed"]
    reason: str


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that somebody waits for."""

    row_id: RowId
    future: asyncio.Future[Finished]


class Client:
    """See the module. `canary_ids`: a prompt of ours. `num_ranks`: more than one where requests are pinned to them.
    `can_recycle`: asked before it is started anew in order."""

    def __init__(
        self,
        process: EngineProcess,
        health: Health,
        canary_ids: tuple[int, ...],
        *,
        num_ranks: int,
        can_recycle: Callable[[Recycle], bool],
        on_up: Callable[[Started], None],
        on_tokens: Callable[[int], None],
    ) -> None:
        self.tickets: dict[int, Ticket] = {}
        self.is_open = False
        self.recycle: Recycle | None = None
        self._process, self._health, self._canary_ids = process, health, canary_ids
        self._num_ranks = num_ranks
        self._can_recycle, self._on_up, self._on_tokens = can_recycle, on_up, on_tokens
        self._numbers = itertools.count()
        self._canaries: set[int] = set()
        self._num_canaries = 0
        self._num_empty = self._num_unknown = 0
        self._drain_until = 0.0
        self._answered_tokens = self._told_tokens = 0

    # ---- requests ----------------------------------------------------------------------------------------------------

    async def ask(
        self, row_id: RowId, token_ids: tuple[int, ...], sampling: SamplingParams, rank: int | None = None
    ) -> Finished:
        """The answer. Raises RequestRejected, RequestFailed, or whatever the ticket is ended with. Cancelled: the engine
        is told so."""
        number = next(self._numbers)
        ticket = Ticket(row_id, asyncio.get_running_loop().create_future())
        self.tickets[number] = ticket
        self._submit(number, token_ids, sampling, rank)
        try:
            return await ticket.future
        finally:
            if self.tickets.pop(number, None) is not None:
                self._process.send(Abort(number))
                self._health.note_given_up(time.monotonic(), number)

    def end_all(self, choose: Callable[[Ticket], BatchgenError]) -> None:
        """Every request that still waits ends with its error."""
        tickets, self.tickets = self.tickets, {}
        for ticket in tickets.values():
            if not ticket.future.done():
                ticket.future.set_exception(choose(ticket))

    def _submit(self, number: int, token_ids: tuple[int, ...], sampling: SamplingParams, rank: int | None) -> None:
        self._health.note_sent(time.monotonic(), number, sampling.max_tokens)
        self._process.send(Submit(number, token_ids, sampling, rank))

    def _send_canary(self) -> None:
        number = next(self._numbers)
        self._canaries.add(number)
        # To each rank in turn: a request without one would take the pins of all others off.
        rank = self._num_canaries % self._num_ranks if self._num_ranks > 1 else None
        self._num_canaries += 1
        self._submit(number, self._canary_ids, CANARY, rank)

    # ---- its life ----------------------------------------------------------------------------------------------------

    async def watch(self, start: Start) -> End:
        """Until it ends; nothing is sent after that. Raises ValueError for what is no message of ours."""
        self._process.send(start)
        reading = asyncio.create_task(self._read(), name="trtllm-read")
        try:
            while True:
                await asyncio.wait({reading}, timeout=LOOK_S)
                if reading.done():
                    return reading.result()
                if (end := self._look(time.monotonic())) is not None:
                    return end
        finally:
            self.is_open = False
            reading.cancel()
            await asyncio.wait({reading})

    def _look(self, now: float) -> End | None:
        verdict = self._health.judge(now)
        if isinstance(verdict, Kill):
            return self._make_end(verdict.reason)
        self._note_wear(verdict, now)
        if self.recycle is not None and (not self.tickets or now > self._drain_until):
            return End("recycled", self.recycle.reason)
        for number in self._health.list_overdue(now):
            self._give_up(number, now)
        if self.recycle is None and self._health.is_canary_due(now):
            self._send_canary()
        return None

    def _note_wear(self, verdict: Kill | Recycle | None, now: float) -> None:
        if isinstance(verdict, Recycle) and self.recycle is None and self._can_recycle(verdict):
            log.warning("the engine takes nothing new and is started anew: %s", verdict.reason)
            self.recycle, self.is_open = verdict, False
            self._drain_until = now + self._health.section.recycle_drain_s

    def _make_end(self, reason: str) -> End:
        return End("died" if self._health.is_up else "failed", f"{reason}; its log: {self._process.log_path}")

    def _give_up(self, number: int, now: float) -> None:
        self._health.note_given_up(now, number)
        self._process.send(Abort(number))
        if number in self._canaries:
            self._note_bad_canary(number)
        if (ticket := self.tickets.pop(number, None)) is not None and not ticket.future.done():
            told = "no answer came in the time that engine.request_base_s and engine.min_tokens_per_s allow"
            ticket.future.set_exception(RequestFailed("deadline", told))

    async def _read(self) -> End:
        while (message := await read_message(self._process.reader)) is not None:
            if (end := self._take(message)) is not None:
                return end
        told = f"with {len(self.tickets)} requests in flight" if self._health.is_up else "while it started"
        return self._make_end(f"the engine's process ended {told}")

    def _take(self, message: FromEngine) -> End | None:
        now = time.monotonic()
        match message:
            case Note(text):
                log.info("TensorRT-LLM: %s", text)
            case Started():
                self._health.note_up(now)
                self.is_open = True
                self._on_up(message)
            case StartFailed(text, is_spec):
                return End("spec", text) if is_spec else self._make_end(text)
            case Beat(total_tokens, _, rss_bytes, is_healthy):
                self._health.note_beat(now, total_tokens=total_tokens, rss_bytes=rss_bytes, is_healthy=is_healthy)
                self._count_tokens(total_tokens - self._num_canaries)
            case Finished():
                self._take_answer(message, now)
            case Failed():
                return self._take_failure(message, now)
        return None

    # ---- answers -----------------------------------------------------------------------------------------------------

    def _take_answer(self, answer: Finished, now: float) -> None:
        self._health.note_ended(now, answer.number)
        is_empty = is_answer_empty(answer)
        if answer.number in self._canaries:
            self._canaries.discard(answer.number)
            self._health.note_answer(("canary", answer.number), is_empty=is_empty)
            return
        ticket = self.tickets.pop(answer.number, None)
        if ticket is None:  # given up or cancelled meanwhile
            return
        self._health.note_answer(ticket.row_id, is_empty=is_empty)
        self._num_empty += is_empty
        if is_empty and is_power_of_two(self._num_empty):
            log.warning(
                "answers without a token since the engine's start: %d; their rows are sent again", self._num_empty
            )
        self._answered_tokens += count_tokens(answer)
        self._count_tokens(self._answered_tokens)
        if not ticket.future.done():
            ticket.future.set_result(answer)

    def _take_failure(self, failed: Failed, now: float) -> End | None:
        """The end, where only a new engine helps: then the request stays among those that were in flight."""
        is_canary = failed.number in self._canaries
        if failed.blame == "engine":
            return self._make_end(f"TensorRT-LLM failed: {failed.error_type}: {failed.message}")
        self._health.note_ended(now, failed.number)
        if is_canary:
            self._note_bad_canary(failed.number)
        elif (ticket := self.tickets.pop(failed.number, None)) is not None and not ticket.future.done():
            kind = RequestRejected if failed.blame == "request" else RequestFailed
            ticket.future.set_exception(kind(failed.error_type, failed.message))
            if failed.blame == "retry":
                self._note_failure(failed, now)
        return None

    def _note_failure(self, failed: Failed, now: float) -> None:
        """It may fail thousands between two looks."""
        self._health.note_failure()
        self._note_wear(self._health.judge(now), now)
        self._num_unknown += failed.error_type == UNKNOWN
        if failed.error_type == UNKNOWN and is_power_of_two(self._num_unknown):
            told = "TensorRT-LLM raised errors that batchgen does not know, %d since its start; its log: %s"
            log.warning(told, self._num_unknown, self._process.log_path)

    def _note_bad_canary(self, number: int) -> None:
        """As good as an answer without a token."""
        self._canaries.discard(number)
        self._health.note_answer(("canary", number), is_empty=True)

    def _count_tokens(self, num_tokens: int) -> None:
        if num_tokens > self._told_tokens:
            self._on_tokens(num_tokens - self._told_tokens)
            self._told_tokens = num_tokens


def is_answer_empty(answer: Finished) -> bool:
    """Did the engine end it without a token and without a reason? A stop string at its very beginning is a reason."""
    return not answer.token_ids and answer.stop_reason is None and answer.finish_reason in ("stop", "length")


def is_answer_finite(answer: Finished) -> bool:
    """Are the log probabilities numbers, where they were asked for? Nothing else shows logits that were none."""
    return not any(math.isnan(each.logprob) for each in answer.logprobs or ())


def is_power_of_two(number: int) -> bool:
    """So that what happens often is told ever more rarely."""
    return number & (number - 1) == 0


def count_tokens(answer: Finished) -> int:
    """Generated ones, as OpenAI counts them: with the end-of-text token."""
    return len(answer.token_ids) if answer.num_tokens is None else answer.num_tokens
