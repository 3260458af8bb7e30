"""Requests of all open shards go to the engine through one in-flight window, and their answers back to their shards.

The window stays full across shard borders: rows are read ahead up to a bound and sent in the order they were pushed. A
retry waits outside the window, with full jitter, so that rows that failed together don't come back together. Invariant:
every request pushed ends in its shard's `add` exactly once, unless the sender is stopped or the engine dies. Rows that
wait for a retry count as read ahead: while the engine takes none, only so many are read and no more.

Requests travel in lanes: as many as the window has rows, each a task that sends one request after another. A task for
each request, and a place in a queue before the window for it, took 7 us a row more than this.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from batchgen.answer import make_failed, make_result
from batchgen.engines.base import Answering
from batchgen.errors import EngineDied, EngineUnavailable, RequestFailed, RowError
from batchgen.open_shard import OpenShard
from batchgen.records import Request
from batchgen.spec import RetrySpec
from batchgen.tasks import TaskGroup
from batchgen.window import Window

# Prompts in flight and read ahead: what a worker may hold of its input in memory.
MAX_INFLIGHT_BYTES = 512 * 2**20
MAX_READY_BYTES = 128 * 2**20
# Rows read and tokenised ahead of the window, in windows.
READY_WINDOWS = 0.5
MIN_READY_ROWS = 64
# Rows that wait outside the window for a retry, in windows: enough to keep it full beside them, and no more.
MAX_WAITING_WINDOWS = 2
# An engine that refuses one request this often while it answers others is refusing the request.
MAX_REFUSALS = 1000


@dataclass(frozen=True, slots=True)
class Ready:
    """A request that waits for the window since `ready_at` (monotonic seconds). `num_refusals`: how often the engine had
    no room for it, which are no attempts."""

    shard: OpenShard
    request: Request
    num_bytes: int
    ready_at: float
    num_refusals: int = 0

    @property
    def is_again(self) -> bool:
        return self.num_refusals > 0 or self.request.attempt > 1


def choose_delay_s(retry: RetrySpec, error: RequestFailed, num_tries: int) -> float:
    """How long to wait before a try after `num_tries` of them: what the engine asks for and a little jitter, else full
    jitter over a bound that doubles."""
    if error.retry_after_s is not None:
        return error.retry_after_s + random.uniform(0, retry.backoff_s)
    return random.uniform(0, min(retry.max_backoff_s, retry.backoff_s * 2 ** min(num_tries - 1, 30)))


class Sender:
    """Belongs to one event loop. `on_death` is called once with the reason when nothing more can be sent, `on_length` with
    the expected and the actual tokens of each answer where both are known."""

    def __init__(
        self,
        engine: Answering,
        max_inflight: int,
        retry: RetrySpec,
        on_death: Callable[[str], None],
        on_length: Callable[[float, int], None] = lambda _, __: None,
    ) -> None:
        self._engine, self._retry, self._on_death, self._on_length = engine, retry, on_death, on_length
        self.window = Window(max_inflight, MAX_INFLIGHT_BYTES)
        self._max_ready = max(MIN_READY_ROWS, int(READY_WINDOWS * max_inflight))
        self._max_waiting = max(MIN_READY_ROWS, MAX_WAITING_WINDOWS * max_inflight)
        self._ready: deque[Ready] = deque()
        self._num_bytes = 0
        self._num_waiting = 0
        self._room = asyncio.Event()
        self.is_stopped = False
        self._lanes = TaskGroup(on_death)
        self._num_lanes = 0
        self._idle: list[asyncio.Future[None]] = []

    async def push(self, shard: OpenShard, requests: Iterable[Request]) -> None:
        """Queue the requests in order, each as soon as there is room to read ahead. Returns without the rest when shard or
        sender are closed."""
        for request in requests:
            while self._is_full() and not shard.is_closed and not self.is_stopped:
                self._room.clear()
                await self._room.wait()
            if self.is_stopped or shard.is_closed:
                return
            self._put(Ready(shard, request, request.num_bytes, time.monotonic()))

    def stop(self) -> None:
        """Send nothing more; what is in flight goes on."""
        self.is_stopped = True
        self._room.set()
        while self._idle:
            self._wake_lane()

    async def settle(self, timeout_s: float) -> None:
        """After `stop`: give what is in flight this long to be answered, then drop the rest."""
        await self._lanes.wait(timeout_s)
        await self._lanes.cancel()

    async def close(self) -> None:
        self.stop()
        await self._lanes.cancel()

    # ---- ready rows --------------------------------------------------------------------------------------------------

    def _is_full(self) -> bool:
        return (
            len(self._ready) >= self._max_ready
            or self._num_waiting >= self._max_waiting
            or self._num_bytes >= MAX_READY_BYTES
        )

    def _put(self, ready: Ready) -> None:
        self._num_bytes += ready.num_bytes
        self._ready.append(ready)
        self._call_lane()

    def _take(self) -> Ready | None:
        """The next row that is still wanted, if the window has room for it; a large one is never overtaken, or it would
        wait for ever."""
        while self._ready and self.window.fits(self._ready[0].num_bytes):
            ready = self._ready.popleft()
            self._num_bytes -= ready.num_bytes
            if 2 * len(self._ready) <= self._max_ready:  # else whoever pushes would be woken for each row
                self._room.set()
            if not ready.shard.is_closed and ready.shard.wants(*ready.request.row_id.slot, is_again=ready.is_again):
                self.window.enter(ready.num_bytes)
                return ready
        return None

    # ---- lanes -------------------------------------------------------------------------------------------------------

    def _call_lane(self) -> None:
        """One more lane at work, where there is one to be had."""
        if self._idle:
            self._wake_lane()
        elif self._num_lanes < self.window.max_rows:
            self._num_lanes += 1
            self._lanes.spawn(self._run_lane())

    def _wake_lane(self) -> None:
        waiter = self._idle.pop()
        if not waiter.done():  # a cancelled lane's is
            waiter.set_result(None)

    async def _run_lane(self) -> None:
        while not self.is_stopped:
            if (ready := self._take()) is not None:
                if self._ready and self._idle:  # an answer may have left room for the bytes of many
                    self._wake_lane()
                await self._send(ready)
            else:
                self._idle.append(asyncio.get_running_loop().create_future())
                await self._idle[-1]

    async def _send(self, ready: Ready) -> None:
        sent = time.monotonic()
        waited_s = sent - ready.ready_at
        ready.shard.note_sent(ready.request.row_id)
        try:
            generation = await self._engine.generate(ready.request)
        except RowError as error:
            self._fail(ready, error, waited_s, time.monotonic() - sent)
        except EngineDied as error:
            self._on_death(str(error))
        else:
            latency_s = time.monotonic() - sent
            parse = self._engine.tokenizer.parse if self._engine.tokenizer else None
            result = make_result(ready.request, generation, parse=parse, waited_s=waited_s, latency_s=latency_s)
            ready.shard.add(result)
            expected, tokens = ready.request.expected_tokens, generation.usage.completion_tokens
            if expected is not None and tokens is not None:
                self._on_length(expected, tokens)
        finally:
            ready.shard.num_inflight -= 1
            self.window.leave(ready.num_bytes)

    # ---- retries -----------------------------------------------------------------------------------------------------

    def _fail(self, ready: Ready, error: RowError, waited_s: float, latency_s: float) -> None:
        request = ready.request
        is_refusal = isinstance(error, EngineUnavailable) and ready.num_refusals < MAX_REFUSALS
        if not isinstance(error, RequestFailed) or (not is_refusal and request.attempt >= self._retry.max_attempts):
            ready.shard.add(make_failed(request, error, waited_s=waited_s, latency_s=latency_s))
            return
        if is_refusal:
            again = replace(ready, num_refusals=ready.num_refusals + 1)
            delay_s = choose_delay_s(self._retry, error, again.num_refusals)
        else:
            again = replace(ready, request=replace(request, attempt=request.attempt + 1))
            delay_s = choose_delay_s(self._retry, error, request.attempt)
        self._num_waiting += 1
        self._num_bytes += ready.num_bytes
        asyncio.get_running_loop().call_later(delay_s, self._put_again, again)

    def _put_again(self, waited: Ready) -> None:
        self._num_waiting -= 1
        self._num_bytes -= waited.num_bytes
        self._put(replace(waited, ready_at=time.monotonic()))
