"""Requests of all open shards go to the engine through one in-flight window, and their answers back to their shards.

The window stays full across shard borders: rows are read ahead up to a bound and sent in the order they were pushed. A
retry waits outside the window, with full jitter, so that rows that failed together don't come back together. Invariant:
every request pushed ends in its shard's `add` exactly once, unless it is recalled, the sender is stopped or the engine
dies; then `died_with` says what it had in flight. Rows that wait for a retry count as read ahead: while the engine takes
none, only so many are read and no more.

Requests travel in lanes: as many as the window has rows, each a task that sends one request after another. A task for
each request, and a place in a queue before the window for it, took 7 us a row more than this. One lane at a time is called;
it calls the next when it has taken a request and another waits: so an engine that answers at once keeps one lane busy, and
none is woken in vain for each row.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast

from batchgen.engines.base import Answering
from batchgen.errors import EngineDied, EngineRestarted, EngineUnavailable, RequestFailed, RowError
from batchgen.records import Request, Result
from batchgen.spec import RetrySpec
from batchgen.worker.answer import make_failed, make_result
from batchgen.worker.open_shard import OpenShard
from batchgen.worker.ready import Ready
from batchgen.worker.tasks import TaskGroup
from batchgen.worker.window import Window

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
# How often is looked for requests that have had their time, as a share of it; and never more often than this.
TIMEOUT_SHARE, MIN_LOOK_S = 0.05, 0.05
# Requests that die together are told of in one tick of the loop or two.
RESTART_S = 0.05
APART_LOOK_S = 0.05


def choose_delay_s(retry: RetrySpec, error: RequestFailed, num_tries: int) -> float:
    """How long to wait before a try after `num_tries` of them: what the engine asks for and a little jitter, else full
    jitter over a bound that doubles."""
    if error.retry_after_s is not None:
        return error.retry_after_s + random.uniform(0, retry.backoff_s)
    return random.uniform(0, min(retry.max_backoff_s, retry.backoff_s * 2 ** min(num_tries - 1, 30)))


class Sender:
    """Belongs to one event loop. `on_death` is called with the reason when nothing more can be sent; `on_restart` with
    what was in flight when an engine died that starts anew by itself: these requests are dropped; `on_length` with the
    expected and the actual tokens of each answer where both are known. `num_sent` and the size of `inflight` change with
    whatever is sent or ends."""

    def __init__(
        self,
        engine: Answering,
        max_inflight: int,
        retry: RetrySpec,
        on_death: Callable[[str], None],
        on_restart: Callable[[str, list[Ready]], None],
        on_length: Callable[[float, int], None] = lambda _, __: None,
        window: Window | None = None,
    ) -> None:
        self._engine, self._retry, self._on_death, self._on_restart = engine, retry, on_death, on_restart
        self._on_length = on_length
        self.on_result: Callable[[OpenShard, Request, Result], None] | None = None
        self.num_sent = 0
        self.inflight: dict[Ready, tuple[float, asyncio.Task[None]]] = {}
        self.died_with: list[Ready] | None = None
        self._overdue: set[Ready] = set()
        self._recalled: set[Ready] = set()
        self._restarted: list[Ready] = []
        self.window = window or Window(max_inflight, MAX_INFLIGHT_BYTES)
        self.window.on_room = lambda: self._call_lane() if self._ready else None
        self._max_ready = max(MIN_READY_ROWS, int(READY_WINDOWS * max_inflight))
        self._max_waiting = max(MIN_READY_ROWS, MAX_WAITING_WINDOWS * max_inflight)
        self._ready: deque[Ready] = deque()
        self._num_bytes = self._num_waiting = 0
        self._room = asyncio.Event()
        self.is_stopped = False
        self._lanes = TaskGroup(on_death)
        self._num_lanes = 0
        self._is_lane_called = False
        self._idle: list[asyncio.Future[None]] = []
        self._watching = TaskGroup(on_death)
        self._watching.spawn(self._watch())

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
        self.window.rest()
        self._room.set()
        while self._idle:
            self._wake_lane()

    async def settle(self, timeout_s: float) -> None:
        """After `stop`: give what is in flight this long to be answered, then drop the rest."""
        await self._lanes.wait(timeout_s)
        await self._lanes.cancel()

    async def close(self) -> None:
        self.stop()
        await self._watching.cancel()
        await self._lanes.cancel()

    def recall(self, inflight: Iterable[Ready]) -> None:
        """Stop these where they are. What they answer from here on is nobody's."""
        for ready in inflight:
            self._recalled.add(ready)
            self.inflight[ready][1].cancel()

    async def wait_apart(self) -> None:
        """Until nothing is in flight but rows that are tried apart."""
        while not self.window.is_alone or any(r.shard.is_closed or not r.shard.lease.only for r in self.inflight):
            await asyncio.sleep(APART_LOOK_S)

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
        wait for ever. None while an engine's death is being told: then the shards are closed, and what is sent now would be
        in the way."""
        if self._restarted:
            return None
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
        """One more lane at work, where there is one to be had and none is on its way already."""
        if self._is_lane_called:
            return
        if self._idle:
            self._is_lane_called = True
            self._wake_lane()
        elif self._num_lanes < self.window.max_rows:
            self._is_lane_called = True
            self._num_lanes += 1
            self._lanes.spawn(self._run_lane())

    def _wake_lane(self) -> None:
        waiter = self._idle.pop()
        if not waiter.done():  # a cancelled lane's is
            waiter.set_result(None)

    async def _run_lane(self) -> None:
        lane = cast("asyncio.Task[None]", asyncio.current_task())
        self._is_lane_called = False
        while not self.is_stopped:
            if (ready := self._take()) is not None:
                if self._ready:
                    self._call_lane()
                await self._send(ready, lane)
            else:
                self._idle.append(asyncio.get_running_loop().create_future())
                await self._idle[-1]
                self._is_lane_called = False

    async def _send(self, ready: Ready, lane: "asyncio.Task[None]") -> None:
        sent = time.monotonic()
        waited_s = sent - ready.ready_at
        self.num_sent += 1
        self.inflight[ready] = sent, lane
        ready.shard.note_sent(ready.request.row_id)
        try:
            generation = await self._engine.generate(ready.request)
            latency_s = time.monotonic() - sent
            parse = self._engine.tokenizer.parse if self._engine.tokenizer else None
            result = make_result(ready.request, generation, parse=parse, waited_s=waited_s, latency_s=latency_s)
            self._end(ready, result)
            expected, tokens = ready.request.expected_tokens, generation.usage.completion_tokens
            if expected is not None and tokens is not None:
                self._on_length(expected, tokens)
        except EngineRestarted as error:
            self._note_restart(ready, str(error))
        except RowError as error:
            self._fail(ready, error, waited_s, time.monotonic() - sent)
        except EngineDied as error:
            self._die_with(list(self.inflight))
            self._on_death(str(error))
        except asyncio.CancelledError:
            if ready in self._recalled:
                self.inflight[ready][1].uncancel()
            elif ready in self._overdue:
                self._end_overdue(ready, waited_s, time.monotonic() - sent)
            else:
                raise
        except Exception:  # whatever an engine lets through ends the worker, and this request is the reason
            self._die_with([ready])
            raise
        finally:
            self._recalled.discard(ready)
            del self.inflight[ready]
            ready.shard.num_inflight -= 1
            self.window.leave(ready.num_bytes)

    # ---- what never ends, and what dies ------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """End requests that have had their time. One look at all of them costs less than a timer for each."""
        limit_s = self._retry.request_timeout_s
        while True:
            await asyncio.sleep(max(MIN_LOOK_S, TIMEOUT_SHARE * limit_s))
            late = time.monotonic() - limit_s
            for ready, (sent, lane) in list(self.inflight.items()):
                if sent < late:
                    self._overdue.add(ready)
                    lane.cancel()

    def _end_overdue(self, ready: Ready, waited_s: float, latency_s: float) -> None:
        """The lane goes on."""
        self._overdue.discard(ready)
        self.inflight[ready][1].uncancel()
        error = RequestFailed("timed_out", f"no answer after {self._retry.request_timeout_s:g} s")
        self._end(ready, make_failed(ready.request, error, waited_s=waited_s, latency_s=latency_s))

    def _end(self, ready: Ready, result: Result) -> None:
        ready.shard.add(result)
        if self.on_result is not None:
            self.on_result(ready.shard, ready.request, result)

    def _die_with(self, inflight: list[Ready]) -> None:
        """The first says it: those that follow were told later, when some had left already."""
        if self.died_with is None:
            self.died_with = inflight

    def _note_restart(self, ready: Ready, reason: str) -> None:
        if not self._restarted:
            asyncio.get_running_loop().call_later(RESTART_S, self._tell_restart, reason)
        self._restarted.append(ready)

    def _tell_restart(self, reason: str) -> None:
        self._on_restart(reason, self._restarted)
        self._restarted = []
        if self._ready:
            self._call_lane()

    # ---- retries -----------------------------------------------------------------------------------------------------

    def _fail(self, ready: Ready, error: RowError, waited_s: float, latency_s: float) -> None:
        request = ready.request
        is_refusal = isinstance(error, EngineUnavailable) and ready.num_refusals < MAX_REFUSALS
        if not isinstance(error, RequestFailed) or (not is_refusal and request.attempt >= self._retry.max_attempts):
            self._end(ready, make_failed(request, error, waited_s=waited_s, latency_s=latency_s))
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
