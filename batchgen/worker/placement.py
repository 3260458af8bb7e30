"""Which rank of an engine a request goes to: where the beginning of its prompt is cached, unless another rank has less to
do. Pure; belongs to one engine, knows no clock and no engine.

With attention data parallelism each rank has a KV cache of its own: a prefix that one rank has is a miss on the others. So
every request is pinned to a rank (the engine holds to a pin only while all requests have one), and those that begin alike
go to the same rank. What is alike is seen in the token ids: a prompt is cut into blocks as the engine's cache is, and each
leading run of blocks remembers the ranks it was sent to. When load asks, a request goes to another rank, which from then on
has its beginning, too: so a large group spreads over as many ranks as it needs.

Load asks when a rank could decode one more row and others could not, or when ranks with room differ in the tokens that
they hold. Where all are full a request waits wherever it goes: it goes where its beginning is. So an engine that is sent a
little more than it can decode at once needs hardly a prefix twice. Tokens are those in flight, generated ones included: all
rows of an engine are decoded in lockstep, so what it has generated since a row came is shared by the rows that were there.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

BLOCK_TOKENS = 32
# Runs of blocks remembered, all prompts together: about 25 MB. Those of shared beginnings are used often and stay.
MAX_RUNS = 131_072
# A prompt's first blocks are remembered one by one, longer runs in steps of a quarter: no rank is chosen by the last few
# tokens of a long common beginning.
MAX_SINGLE_BLOCKS = 64
# A rank with room may have this much more than the mean before its requests go elsewhere.
SLACK = 0.03


@dataclass(slots=True)
class Placed:
    """A request in flight on `rank`: its tokens when it came and the engine's steps then."""

    rank: int
    num_tokens: int
    since_step: float


class Placer:
    """`max_rows`: requests that a rank can decode at once; beyond that they go to ranks with room, while there are any.
    `total_tokens`, everywhere: what the engine has ever generated, which serves as the clock."""

    def __init__(
        self,
        num_ranks: int,
        *,
        max_rows: int | None = None,
        slack: float = SLACK,
        block_tokens: int = BLOCK_TOKENS,
        max_runs: int = MAX_RUNS,
    ) -> None:
        if num_ranks < 1:
            raise ValueError(f"an engine has at least one rank, not {num_ranks}")
        self.num_ranks, self.max_rows, self.slack = num_ranks, max_rows, slack
        self._block_tokens, self._max_runs = block_tokens, max_runs
        # Run of leading blocks -> the ranks it was sent to, a bit each; the least recently used first.
        self._runs: OrderedDict[int, int] = OrderedDict()
        self._placed: dict[Hashable, Placed] = {}
        self._num_rows = [0] * num_ranks
        # Tokens in flight on a rank: a sum that stands, and each row's steps since it came.
        self._standing = [0.0] * num_ranks
        self._steps = 0.0
        self._seen_tokens = 0

    def place(self, key: Hashable, token_ids: Sequence[int], total_tokens: int) -> int:
        """The rank for a new request, which counts as in flight until `release`."""
        self._advance(total_tokens)
        runs = self._list_runs(token_ids)
        rank = self._choose(self._match(runs), len(token_ids))
        self._remember(runs, rank)
        self._add(key, rank, len(token_ids))
        return rank

    def place_again(self, key: Hashable, rank: int, num_tokens: int, total_tokens: int) -> None:
        """A request goes on where it was, `num_tokens` of prompt and answer long."""
        self._advance(total_tokens)
        self._add(key, rank, num_tokens)

    def release(self, key: Hashable, total_tokens: int) -> None:
        """The request is no longer in flight. A no-op for one that isn't."""
        self._advance(total_tokens)
        placed = self._placed.pop(key, None)
        if placed is not None:
            self._num_rows[placed.rank] -= 1
            self._standing[placed.rank] -= placed.num_tokens - placed.since_step

    def list_loads(self) -> list[float]:
        """Tokens in flight on each rank."""
        return [standing + rows * self._steps for standing, rows in zip(self._standing, self._num_rows, strict=True)]

    # ---- load --------------------------------------------------------------------------------------------------------

    def _advance(self, total_tokens: int) -> None:
        if self._placed:
            self._steps += max(0, total_tokens - self._seen_tokens) / len(self._placed)
        self._seen_tokens = max(total_tokens, self._seen_tokens)

    def _add(self, key: Hashable, rank: int, num_tokens: int) -> None:
        if key in self._placed:
            raise ValueError(f"{key} is in flight already")
        self._placed[key] = Placed(rank, num_tokens, self._steps)
        self._num_rows[rank] += 1
        self._standing[rank] += num_tokens - self._steps

    def _choose(self, matched: Sequence[int], num_tokens: int) -> int:
        """The rank that has the most of the prompt, among those that can take it; of equals the one with the least load."""
        loads = self.list_loads()
        free = [rank for rank in range(self.num_ranks) if self._has_room(rank)]
        if free:
            # Its own tokens on top: in an engine that is nearly empty any request is a large share.
            limit = (1 + self.slack) * sum(loads) / self.num_ranks + num_tokens
            free = [rank for rank in free if loads[rank] <= limit] or free
        else:
            # All are full: it waits wherever it goes, and no rank holds a token more for it.
            free = list(range(self.num_ranks))
        return min(free, key=lambda rank: (-matched[rank], loads[rank], rank))

    def _has_room(self, rank: int) -> bool:
        return self.max_rows is None or self._num_rows[rank] < self.max_rows

    # ---- beginnings --------------------------------------------------------------------------------------------------

    def _list_runs(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """(hash of a leading run of blocks, its number of blocks), shortest first. Equal beginnings have equal hashes in
        any process; a collision would cost a cache miss."""
        runs = []
        size, run, wanted = self._block_tokens, 0, 1
        for number in range(1, len(token_ids) // size + 1):
            run = hash((run, tuple(token_ids[(number - 1) * size : number * size])))
            if number == wanted:
                runs.append((run, number))
                wanted += 1 if number < MAX_SINGLE_BLOCKS else number // 4
        return runs

    def _match(self, runs: Sequence[tuple[int, int]]) -> list[int]:
        """How many leading blocks each rank was sent before."""
        matched = [0] * self.num_ranks
        left = (1 << self.num_ranks) - 1
        for run, num_blocks in runs:
            left &= self._runs.get(run, 0)
            if not left:
                break
            for rank in range(self.num_ranks):
                if left >> rank & 1:
                    matched[rank] = num_blocks
        return matched

    def _remember(self, runs: Sequence[tuple[int, int]], rank: int) -> None:
        # The longest first: what is forgotten first of a prompt is its end.
        for run, _ in reversed(runs):
            self._runs[run] = self._runs.get(run, 0) | 1 << rank
            self._runs.move_to_end(run)
        while len(self._runs) > self._max_runs:
            self._runs.popitem(last=False)
