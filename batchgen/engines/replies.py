"""What the decode thread tells the callers, each through the event loop it came from.

Answers of one turn reach a loop together, for each call into another thread costs a system call; there they are given out
a few at a time, so that whatever else waits in that loop comes between. A loop that is closed has no caller left.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchgen.errors import BatchgenError, RequestFailed
from batchgen.records import Generation, Request, Usage

if TYPE_CHECKING:
    from batchgen.engines.sampling import Row

# Each answer to a row of a batch takes about 0.1 ms: its result, and the next row sent.
ANSWERS_AT_ONCE = 8
# As often as bulk has a turn among urgent ones.
HOLD_TURNS = 32
Reply = tuple[asyncio.Future[Generation], Generation | BatchgenError]


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way through the thread, and whom to tell. Times are of the monotonic clock. `on_tokens` hears of
    tokens as they come, `num_told` of them so far."""

    request: Request
    row: "Row"
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Generation]
    arrived_at: float
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    on_tokens: Callable[[Sequence[int]], None] | None = None
    num_told: int = 0


def make_answer(job: Job) -> Generation | BatchgenError:
    row = job.row
    if row.finish_reason is None:
        return RequestFailed("cancelled", "the request was cancelled")
    if row.finish_reason == "failed":
        return RequestFailed("bad_logits", "the model's output was not finite")
    return Generation(
        text=row.text,
        token_ids=tuple(row.kept),
        finish_reason=row.finish_reason,
        usage=Usage(len(row.token_ids), len(row.out), 0),
        ttft_s=job.first_token_at - job.arrived_at,
        queued_s=job.admitted_at - job.arrived_at,
        logprobs=tuple(row.logprobs) if row.sampling.logprobs is not None else None,
    )


def tell(job: Job) -> None:
    """Hands new tokens to whoever wants to see them."""
    new = tuple(job.row.kept[job.num_told :])
    if new and job.on_tokens is not None:
        job.num_told += len(new)
        with contextlib.suppress(RuntimeError):
            job.loop.call_soon_threadsafe(job.on_tokens, new)


def answer(values: Sequence[tuple[Job, Generation | BatchgenError]]) -> None:
    replies: dict[asyncio.AbstractEventLoop, list[Reply]] = {}
    for job, value in values:
        replies.setdefault(job.loop, []).append((job.future, value))
    for loop, some in replies.items():
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, loop, some)


class HeldAnswers:
    """Answers to bulk's rows while something urgent is decoded: what their callers do with them is work for the same
    interpreter, as much as the urgent row's own. Held for `HOLD_TURNS` urgent turns at most. Belongs to the thread."""

    def __init__(self) -> None:
        self._held: list[tuple[Job, Generation | BatchgenError]] = []
        self._num_turns = 0

    def add(self, values: Sequence[tuple[Job, Generation | BatchgenError]]) -> None:
        urgent = [each for each in values if each[0].request.is_urgent]
        self._held += [each for each in values if not each[0].request.is_urgent]
        if urgent:
            answer(urgent)

    def note_turn(self, *, is_urgent: bool) -> None:
        """Before each turn."""
        self._num_turns = self._num_turns + 1 if is_urgent else 0
        if not is_urgent or self._num_turns % HOLD_TURNS == 0:
            self.flush()

    def flush(self) -> None:
        held, self._held = self._held, []
        answer(held)


def settle(loop: asyncio.AbstractEventLoop, replies: Sequence[Reply]) -> None:
    """In the loop: the first few now, the rest after whatever else is ready there."""
    for future, value in replies[:ANSWERS_AT_ONCE]:
        if future.done():  # cancelled meanwhile
            continue
        if isinstance(value, BatchgenError):
            future.set_exception(value)
        else:
            future.set_result(value)
    if left := replies[ANSWERS_AT_ONCE:]:
        loop.call_soon(settle, loop, left)
