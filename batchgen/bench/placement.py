"""Rank placement replayed over a whole workload: how much of the prompts' common beginnings is served from cache, and how
even the ranks' load is. Virtual time, no engine; the placement is the very one of production.

The model: each rank decodes up to `slots` rows, one token of each a step, all ranks in lockstep; a row beyond that waits in
its rank's queue. `inflight` rows are sent and not answered. Each rank has a cache of its own, least recently used out
first, that takes a prompt when its row starts and the answer when it ends. Prompts are a prefix, shared by its group, and a
suffix of their own; groups come in random order. Measured against one cache as large as all of them together.
"""

import heapq
import math
import random
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from batchgen.worker.placement import Placer

POLICIES = ("placed", "least loaded", "hashed", "random")


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths are tokens. `sigma` 0: every answer has the mean length. `cache_tokens`: of one rank."""

    num_rows: int = 200_000
    num_prefixes: int = 512
    prefix_tokens: int = 256
    suffix_tokens: int = 256
    mean_tokens: float = 128.0
    sigma: float = 0.0
    num_ranks: int = 8
    slots: int = 128
    inflight: int = 1152
    cache_tokens: int = 1_850_000
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """`served`: prefix tokens from cache, of those that one cache would serve. `imbalance`: mean over time of the most
    tokens that a rank holds over the mean of all, prompts and answers so far of the rows it decodes, while the window is
    full. `idle`: share of slots without a row then."""

    policy: str
    hit_rate: float
    ideal_rate: float
    imbalance: float
    idle: float

    @property
    def served(self) -> float:
        return self.hit_rate / self.ideal_rate if self.ideal_rate else 1.0


class Cache:
    """Least recently used out first, whole prefixes and whole rows at a time."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens, self._num_tokens = max_tokens, 0
        self._held: OrderedDict[object, int] = OrderedDict()

    def touch(self, key: object, num_tokens: int) -> bool:
        """Whether it was there; it is now."""
        was_there = key in self._held
        if was_there:
            self._held.move_to_end(key)
        else:
            self._held[key] = num_tokens
            self._num_tokens += num_tokens
        while self._num_tokens > self._max_tokens:
            self._num_tokens -= self._held.popitem(last=False)[1]
        return was_there


@dataclass(slots=True)
class Rank:
    """`load`: what the tokens of its active rows would have been at step 0; now they are `load + num_active * step`."""

    cache: Cache
    waiting: deque[tuple[int, int, int]] = field(default_factory=deque)
    num_active: int = 0
    load: float = 0.0


# ---- the workload ----------------------------------------------------------------------------------------------------


def iter_rows(load: Workload) -> Iterator[tuple[int, int]]:
    """(group, tokens of the answer) of each row."""
    rng = random.Random(load.seed)
    groups = [row % load.num_prefixes for row in range(load.num_rows)]
    rng.shuffle(groups)
    mu = math.log(load.mean_tokens) - load.sigma**2 / 2
    for group in groups:
        yield group, max(1, round(rng.lognormvariate(mu, load.sigma) if load.sigma else load.mean_tokens))


def make_tokens(load: Workload, group: int, row: int) -> list[int]:
    first = 10**6 * (group + 1)
    own = 10**10 + load.suffix_tokens * row
    return [*range(first, first + load.prefix_tokens), *range(own, own + load.suffix_tokens)]


def measure_ideal(load: Workload) -> float:
    """Share of prefix tokens that one cache as large as all serves."""
    cache, num_hits = Cache(load.cache_tokens * load.num_ranks), 0
    for row, (group, length) in enumerate(iter_rows(load)):
        num_hits += cache.touch(("prefix", group), load.prefix_tokens)
        cache.touch(row, load.suffix_tokens + length)
    return num_hits / load.num_rows


# ---- the replay ------------------------------------------------------------------------------------------------------


class Replay:
    """One policy over one workload. `step` is the time; `total_tokens` all that was ever generated."""

    def __init__(self, load: Workload, policy: str) -> None:
        self._load, self._policy = load, policy
        self._ranks = [Rank(Cache(load.cache_tokens)) for _ in range(load.num_ranks)]
        self._placer = Placer(load.num_ranks, max_rows=load.slots)
        self._rng = random.Random(load.seed + 1)
        self._ending: list[tuple[int, int, int, int]] = []
        self.step = self.total_tokens = self._num_active = self._num_hits = 0
        self._weighed = self._imbalances = self._idle = 0.0

    def run(self) -> Outcome:
        for row, (group, length) in enumerate(iter_rows(self._load)):
            if row >= self._load.inflight:
                self._end_one(is_measured=row >= 2 * self._load.inflight)
            self._send(row, group, length)
        return Outcome(
            self._policy,
            self._num_hits / self._load.num_rows,
            measure_ideal(self._load),
            self._imbalances / self._weighed if self._weighed else 1.0,
            self._idle / self._weighed if self._weighed else 0.0,
        )

    def _send(self, row: int, group: int, length: int) -> None:
        number = self._choose(row, group)
        rank = self._ranks[number]
        rank.waiting.append((row, group, length))
        self._start(number)

    def _start(self, number: int) -> None:
        rank = self._ranks[number]
        while rank.waiting and rank.num_active < self._load.slots:
            row, group, length = rank.waiting.popleft()
            self._num_hits += rank.cache.touch(("prefix", group), self._load.prefix_tokens)
            rank.num_active += 1
            self._num_active += 1
            rank.load += self._load.prefix_tokens + self._load.suffix_tokens - self.step
            heapq.heappush(self._ending, (self.step + length, row, number, length))

    def _end_one(self, *, is_measured: bool) -> None:
        """Time goes on until a row ends."""
        end, row, number, length = heapq.heappop(self._ending)
        if is_measured:
            self._measure(end - self.step)
        self.total_tokens += (end - self.step) * self._num_active
        self.step = end
        rank = self._ranks[number]
        rank.num_active -= 1
        self._num_active -= 1
        rank.load -= self._load.prefix_tokens + self._load.suffix_tokens - (end - length)
        rank.cache.touch(row, self._load.suffix_tokens + length)
        self._placer.release(row, self.total_tokens)
        self._start(number)

    def _measure(self, steps: int) -> None:
        loads = [rank.load + rank.num_active * (self.step + steps / 2) for rank in self._ranks]
        num_slots = self._load.slots * self._load.num_ranks
        self._weighed += steps
        self._imbalances += steps * max(loads) * len(loads) / sum(loads)
        self._idle += steps * (num_slots - self._num_active) / num_slots

    def _choose(self, row: int, group: int) -> int:
        ranks = range(self._load.num_ranks)
        if self._policy == "placed":
            return self._placer.place(row, make_tokens(self._load, group, row), self.total_tokens)
        if self._policy == "hashed":
            return group % self._load.num_ranks
        if self._policy == "random":
            return self._rng.choice(ranks)
        counts = [len(rank.waiting) + rank.num_active for rank in self._ranks]
        return min(ranks, key=lambda each: (counts[each], each))


def make_row(load: Workload, policy: str) -> dict[str, Any]:
    """A line of the table, as plain values."""
    found = Replay(load, policy).run()
    figures = {"served": found.served, "hit_rate": found.hit_rate, "ideal_rate": found.ideal_rate}
    figures |= {"imbalance": found.imbalance, "idle": found.idle}
    return {"prefixes": load.num_prefixes, "policy": policy, **{name: round(each, 3) for name, each in figures.items()}}
