"""A modelled engine in virtual time: its ranks step together, a step costs as much as its slowest rank.

Exact for its cost model: steps in which no batch changes are taken together and summed in closed form, never skipped. As
TensorRT-LLM 1.2 does (`facts` are its source): new requests go to the rank with the fewest prompt tokens among those with
fewer requests than others; a rank admits first come first served while its KV cache and batch have room; a step holds at
most `max_num_tokens` of a rank; with `balance_steps` ranks wait for one another before a prefill. Deterministic.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from batchgen.simulate.rank import Rank, Running, VirtualRequest
from batchgen.simulate.step_cost import StepCost


@dataclass(frozen=True, slots=True)
class EngineModel:
    """Limits are a rank's. `balance_steps`: how long a rank's prefill waits for the others', 0: not at all."""

    cost: StepCost
    num_ranks: int = 8
    kv_tokens: int = 1 << 40
    max_batch_size: int = 128
    max_num_tokens: int = 8192
    balance_steps: int = 60
    reserves_exactly: bool = False
    reuses_blocks: bool = True

    @property
    def num_slots(self) -> int:
        return self.num_ranks * self.max_batch_size


@dataclass(frozen=True, slots=True)
class Finished:
    """Times are virtual. `cached_tokens` of its prompt were not computed."""

    request: VirtualRequest
    rank: int
    cached_tokens: int
    submitted_at: float
    first_token_at: float
    ended_at: float


class VirtualEngine:
    """See the module. `now` moves with `advance` only. `prompt_tokens` and `cached_tokens` are of prompts that ended."""

    def __init__(self, model: EngineModel, now: float = 0.0) -> None:
        self.model, self.now = model, now
        self.step = 0
        self.total_tokens = 0
        self.prompt_tokens, self.cached_tokens = 0, 0
        self.row_seconds = 0.0
        self.busy_s = 0.0
        self._queue: deque[VirtualRequest] = deque()
        self._submitted: deque[float] = deque()
        self.ranks = [
            Rank(
                model.cost,
                model.kv_tokens,
                model.max_batch_size,
                reserves_exactly=model.reserves_exactly,
                reuses_blocks=model.reuses_blocks,
            )
            for _ in range(model.num_ranks)
        ]
        self._prefill_waits_since: int | None = None

    @property
    def num_inflight(self) -> int:
        return len(self._queue) + sum(rank.num_active for rank in self.ranks)

    @property
    def num_running(self) -> int:
        return sum(rank.num_rows + len(rank.prefilling) for rank in self.ranks)

    def submit(self, request: VirtualRequest) -> None:
        if request.rank is not None:  # pinned strictly: it waits for that rank alone
            self.ranks[request.rank].assign(request, self.now)
        else:
            self._queue.append(request)
            self._submitted.append(self.now)

    def cancel(self, key: Hashable) -> int | None:
        """Tokens it had made; None when it is not in flight."""
        for number, request in enumerate(self._queue):
            if request.key == key:
                del self._queue[number], self._submitted[number]
                return 0
        made = (rank.cancel(key, self.step) for rank in self.ranks)
        return next((tokens for tokens in made if tokens is not None), None)

    def count_tokens(self) -> dict[Hashable, int]:
        """Tokens made so far by each request that decodes."""
        return dict(pair for rank in self.ranks for pair in rank.count_tokens(self.step))

    def advance(self, until: float) -> list[Finished]:
        """Work until the next request ends or `until` is reached, by at most one step more. `now` says which."""
        while self.now < until:
            self._assign()
            for rank in self.ranks:
                if rank.waiting:
                    rank.admit()
            if not any(rank.num_rows or rank.prefilling for rank in self.ranks):
                self.now = until
                return []
            ended = self._take_prefill() if self._may_prefill() else self._take_decode(until)
            if ended:
                return ended
        return []

    # ---- scheduling --------------------------------------------------------------------------------------------------

    def _assign(self) -> None:
        while self._queue:
            total = sum(rank.num_active for rank in self.ranks) + 1
            expected = max(-(-total // len(self.ranks)), max(rank.num_active for rank in self.ranks))
            expected = min(expected, self.model.max_batch_size)
            free = [rank for rank in self.ranks if rank.num_active < expected]
            if not free:
                return
            rank = min(free, key=lambda rank: (rank.prompt_tokens, rank.num_active))
            rank.assign(self._queue.popleft(), self._submitted.popleft())

    def _may_prefill(self) -> bool:
        """Is there a prompt to take in the next step? Notes since when one waits."""
        num_ready = sum(1 for rank in self.ranks if rank.prefilling)
        if not num_ready:
            self._prefill_waits_since = None
            return False
        if self._prefill_waits_since is None:
            self._prefill_waits_since = self.step
        waited = self.step - self._prefill_waits_since
        is_idle = not any(rank.num_rows for rank in self.ranks)
        return num_ready == len(self.ranks) or waited >= self.model.balance_steps or is_idle

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _take_prefill(self) -> list[Finished]:
        slowest, complete = 0.0, []
        for rank in self.ranks:
            if rank.prefilling:
                seconds, done = rank.prefill(max(1, self.model.max_num_tokens - rank.num_rows))
                complete += [(rank, running) for running in done]
            else:
                seconds = 0.0
            slowest = max(slowest, seconds + rank.cost_s)
        self._pass(1, self.model.cost.fixed_s + slowest)
        for rank, running in complete:
            running.first_token_at = self.now
            self.prompt_tokens += running.request.prompt_tokens
            self.cached_tokens += running.cached
            rank.start(running, self.step)
            self.total_tokens += 1
        self._prefill_waits_since = None
        return self._take_ended()

    def _take_decode(self, until: float) -> list[Finished]:
        changes = [change for rank in self.ranks if (change := rank.next_change()) is not None]
        num_steps = min(changes) - self.step
        if self._prefill_waits_since is not None:
            num_steps = min(num_steps, self.model.balance_steps - (self.step - self._prefill_waits_since))
        lines = [(rank.cost_s, rank.slope_s) for rank in self.ranks if rank.num_rows]
        first = self.model.cost.fixed_s + max(lines)[0]
        if first * num_steps > until - self.now:
            num_steps = 1 + int((until - self.now) / first)
        num_steps = max(1, num_steps)
        self._pass(num_steps, num_steps * self.model.cost.fixed_s + sum_of_max(lines, num_steps))
        return self._take_ended()

    def _pass(self, num_steps: int, seconds: float) -> None:
        """All decoding rows get a token in each of the steps."""
        rows = 0
        for rank in self.ranks:
            rows += rank.num_rows
            if rank.num_rows:
                rank.decode(num_steps)
        self.total_tokens += rows * num_steps
        self.row_seconds += self.num_running * seconds
        self.busy_s += seconds
        self.step += num_steps
        self.now += seconds

    def _take_ended(self) -> list[Finished]:
        ended = []
        for number, rank in enumerate(self.ranks):
            change = rank.next_change()
            if change is not None and change <= self.step:
                ended += [self._finish(number, running) for running in rank.take_ended(self.step)]
        return ended

    def _finish(self, rank: int, running: Running) -> Finished:
        return Finished(running.request, rank, running.cached, running.submitted_at, running.first_token_at, self.now)


def sum_of_max(lines: Sequence[tuple[float, float]], count: int) -> float:
    """Sum over j = 0 .. count - 1 of the largest (base + slope * j): one rank is slowest, then maybe another."""
    if count == 1 or len(lines) == 1:
        base, slope = max(lines)
        return count * base + slope * count * (count - 1) / 2
    base, slope = max(lines)
    last = max(base + slope * (count - 1) for base, slope in lines)
    if base + slope * (count - 1) >= last - 1e-12:
        return count * base + slope * count * (count - 1) / 2
    half = count // 2
    return sum_of_max(lines, half) + sum_of_max([(base + slope * half, slope) for base, slope in lines], count - half)
