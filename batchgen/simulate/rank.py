"""One attention-DP rank of a modelled engine: what waits for it, what it prefills, what it decodes. Pure bookkeeping.

The engine counts its steps; all ranks take them together. A decoding row gets one token a step, so its end is known as a
step number when its prefill ends, and only steps that change a batch need looking at. Admission reserves KV cache for
prompt + `max_tokens` (GUARANTEED_NO_EVICT); with `reserves_exactly` for what the row will really take, an ideal that no
engine can know, as a bound to compare with. Blocks are counted by single tokens.

A prefix is cached from the end of the first prefill that computed it, while a request that holds it is admitted, and
after that for as long as the KV cache has room that nobody uses (least recently used goes first). What is reserved and not
used yet does not evict it, as in the vendor's cache. A prefix may be a row's own: what a continued answer begins with.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass

from batchgen.simulate.step_cost import StepCost


@dataclass(frozen=True, slots=True)
class VirtualRequest:
    """`output_tokens` is what it will generate, at most `max_tokens`; `rank` pins it; the first `prefix_tokens` of the
    prompt are shared with all of the same `prefix`. `leaves`: its prompt and answer stay cached under this name."""

    key: Hashable
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    rank: int | None = None
    prefix: Hashable | None = None
    prefix_tokens: int = 0
    leaves: Hashable | None = None


@dataclass(slots=True)
class Running:
    """An admitted request. `from_step`: the step after its prefill; `context` what it attends to then."""

    request: VirtualRequest
    reserved: int
    submitted_at: float
    done: int = 0
    cached: int = 0
    first_token_at: float = 0.0
    from_step: int = 0
    is_low: bool = True


class Prefixes:
    """Which prefixes one rank holds. See the module."""

    def __init__(self) -> None:
        self._held: dict[Hashable, int] = {}
        self._computed: set[Hashable] = set()
        self._idle: OrderedDict[Hashable, int] = OrderedDict()
        self._idle_tokens = 0

    def hold(self, request: VirtualRequest) -> None:
        prefix = request.prefix
        if prefix is None:
            return
        self._held[prefix] = self._held.get(prefix, 0) + 1
        if prefix in self._idle:
            self._idle_tokens -= self._idle.pop(prefix)

    def count_cached(self, request: VirtualRequest) -> int:
        """Tokens that need not be computed. The last one of a prompt always is: its logits choose the answer's first."""
        is_cached = request.prefix is not None and request.prefix in self._computed
        return min(request.prefix_tokens, request.prompt_tokens - 1) if is_cached else 0

    def note_computed(self, request: VirtualRequest) -> None:
        if request.prefix is not None:
            self._computed.add(request.prefix)

    def leave(self, request: VirtualRequest) -> None:
        """It ended: its prompt and answer are there to be gone on with."""
        if request.leaves is not None:
            self._computed.add(request.leaves)
            self._rest(request.leaves, request.prompt_tokens + request.output_tokens)

    def release(self, request: VirtualRequest, room: int) -> None:
        """`room`: tokens of the KV cache that nobody uses now."""
        prefix = request.prefix
        if prefix is not None:
            self._held[prefix] -= 1
            if not self._held[prefix]:
                del self._held[prefix]
                if prefix in self._computed:
                    self._rest(prefix, request.prefix_tokens)
        self.fit(room)

    def _rest(self, name: Hashable, num_tokens: int) -> None:
        """Nobody holds it now. A part that goes on leaves under the name of what it began with, and more of it."""
        before = self._idle.pop(name, 0)
        self._idle[name] = max(before, num_tokens)
        self._idle_tokens += self._idle[name] - before

    def fit(self, room: int) -> None:
        while self._idle and self._idle_tokens > room:
            prefix, tokens = self._idle.popitem(last=False)
            self._idle_tokens -= tokens
            self._computed.discard(prefix)


class Rank:
    """See the module. `cost_s` is of the next decode step without its fixed part, and grows by `slope_s` a step."""

    def __init__(
        self, cost: StepCost, kv_tokens: int, max_batch_size: int, *, reserves_exactly: bool, reuses_blocks: bool
    ) -> None:
        self._cost, self._kv_tokens, self._max_rows = cost, kv_tokens, max_batch_size
        self._reserves_exactly, self._reuses_blocks = reserves_exactly, reuses_blocks
        self.waiting: deque[tuple[float, VirtualRequest]] = deque()
        self.prefilling: deque[Running] = deque()
        self._ends: list[tuple[int, int, Running]] = []
        self._knees: list[tuple[int, int, Running]] = []
        self._prefixes = Prefixes()
        self._num_made = 0
        self.reserved = 0
        self.num_active = 0
        self.prompt_tokens = 0
        self.num_rows = 0
        self._low_rows, self._low, self._high = 0, 0, 0
        self.cost_s, self.slope_s = 0.0, 0.0

    # ---- in ----------------------------------------------------------------------------------------------------------

    def assign(self, request: VirtualRequest, now: float) -> None:
        self.waiting.append((now, request))
        self.num_active += 1
        self.prompt_tokens += request.prompt_tokens

    def admit(self) -> None:
        """First come first served: one that does not fit holds up all behind it, as in the vendor's scheduler."""
        while self.waiting and self.num_rows + len(self.prefilling) < self._max_rows:
            submitted_at, request = self.waiting[0]
            output = request.output_tokens if self._reserves_exactly else request.max_tokens
            need = request.prompt_tokens + output
            if self.reserved + need > self._kv_tokens and (self.num_rows or self.prefilling):
                return
            self.waiting.popleft()
            self.reserved += need
            self._prefixes.hold(request)
            self.prefilling.append(Running(request, need, submitted_at, done=-1))

    def prefill(self, room: int) -> tuple[float, list[Running]]:
        """Take prompts up to `room` tokens, in order: (seconds, those whose prompt is complete now)."""
        seconds, complete = 0.0, []
        for running in self.prefilling:
            if room <= 0:
                break
            if running.done < 0:
                running.cached = self._prefixes.count_cached(running.request) if self._reuses_blocks else 0
                running.done = running.cached
            end = min(running.request.prompt_tokens, running.done + room)
            seconds += self._cost.prefill_s(running.done, end)
            room -= end - running.done
            running.done = end
            if end == running.request.prompt_tokens:
                complete.append(running)
        for running in complete:
            self._prefixes.note_computed(running.request)
        self._prefixes.fit(self._count_unused())
        return seconds, complete

    # ---- decode ------------------------------------------------------------------------------------------------------

    def start(self, running: Running, step: int) -> None:
        """Its prompt is complete and its first token made; `step` is the next one."""
        self.prefilling.popleft()
        running.from_step = step
        context = running.request.prompt_tokens + 1
        running.is_low = context < self._cost.top_k
        self._add(running, context, 1)
        self._num_made += 1
        heapq.heappush(self._ends, (step + running.request.output_tokens - 1, self._num_made, running))
        if running.is_low and running.request.output_tokens > self._cost.top_k - context:
            heapq.heappush(self._knees, (step + self._cost.top_k - context, self._num_made, running))

    @property
    def num_context(self) -> int:
        """Tokens of prompts and answers that its decoding rows hold."""
        return self._low + self._high

    def next_change(self) -> int | None:
        """The step before which its batch changes next."""
        if not self._ends:
            return None
        return min(self._ends[0][0], self._knees[0][0]) if self._knees else self._ends[0][0]

    def decode(self, num_steps: int) -> None:
        self._low += self._low_rows * num_steps
        self._high += (self.num_rows - self._low_rows) * num_steps
        self.cost_s += self.slope_s * num_steps

    def take_ended(self, step: int) -> list[Running]:
        """Rows with all their tokens before `step`; they leave."""
        while self._knees and self._knees[0][0] <= step:
            running = heapq.heappop(self._knees)[2]
            context = self._context(running, step)
            self._add(running, context, -1)
            running.is_low = False
            self._add(running, context, 1)
        ended = []
        while self._ends and self._ends[0][0] <= step:
            running = heapq.heappop(self._ends)[2]
            self._add(running, self._context(running, step), -1)
            self._prefixes.leave(running.request)
            self._release(running)
            ended.append(running)
        return ended

    def _context(self, running: Running, step: int) -> int:
        return running.request.prompt_tokens + 1 + step - running.from_step

    def _add(self, running: Running, context: int, sign: int) -> None:
        self.num_rows += sign
        if running.is_low:
            self._low_rows += sign
            self._low += sign * context
        else:
            self._high += sign * context
        attended = self._low + (self.num_rows - self._low_rows) * self._cost.top_k
        self.cost_s = self._cost.decode_s(self.num_rows, attended, self._low + self._high)
        self.slope_s = self._cost.context_s * self._low_rows + self._cost.index_s * self.num_rows

    def _release(self, running: Running) -> None:
        self.reserved -= running.reserved
        self.num_active -= 1
        self.prompt_tokens -= running.request.prompt_tokens
        self._prefixes.release(running.request, self._count_unused())

    def _count_unused(self) -> int:
        """Tokens of the KV cache that hold nothing of an admitted request."""
        return self._kv_tokens - self._low - self._high - sum(max(0, running.done) for running in self.prefilling)

    # ---- taken away --------------------------------------------------------------------------------------------------

    def cancel(self, key: Hashable, step: int) -> int | None:
        """Stop one request, wherever it is: tokens that it has made; None when it is not here."""
        for waiting in self.waiting:
            if waiting[1].key == key:
                self.waiting.remove(waiting)
                self.num_active -= 1
                self.prompt_tokens -= waiting[1].prompt_tokens
                return 0
        for running in self.prefilling:
            if running.request.key == key:
                self.prefilling.remove(running)
                self._release(running)
                return 0
        found = next((entry for entry in self._ends if entry[2].request.key == key), None)
        if found is None:
            return None
        self._ends.remove(found)
        heapq.heapify(self._ends)
        self._knees = [entry for entry in self._knees if entry[2] is not found[2]]
        heapq.heapify(self._knees)
        self._add(found[2], self._context(found[2], step), -1)
        self._release(found[2])
        return 1 + step - found[2].from_step

    def count_tokens(self, step: int) -> list[tuple[Hashable, int]]:
        """(key, tokens made) of every row that decodes."""
        return [(running.request.key, 1 + step - running.from_step) for _, _, running in self._ends]
