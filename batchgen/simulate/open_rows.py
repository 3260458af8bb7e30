"""Rows of leases and shares on virtual workers, and what of them outlives a worker. Values."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

from batchgen.queue.events import RowsGiven, ShareEnded
from batchgen.records import Lease, ShardProgress, Share
from batchgen.simulate.workload import VirtualRow

# Batch, place of a row in its shard, sample: a request in flight.
Key = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class VirtualTokens(Sequence[int]):
    """Token ids of a row's prompt without holding them: a prefix of its group's, then ids of its own."""

    row: VirtualRow

    def __len__(self) -> int:
        return self.row.prompt_tokens

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        places = range(self.row.prompt_tokens)[index]
        return self._name(places) if isinstance(places, int) else tuple(map(self._name, places))

    def _name(self, place: int) -> int:
        if self.row.prefix is not None and place < self.row.prefix_tokens:
            return -1 - place - self.row.prefix_tokens * self.row.prefix
        return place + self.row.prompt_tokens * self.row.number


@dataclass(slots=True, eq=False)
class OpenRows:
    """A lease and its rows. `left`: how many requests of each row are to be finished, `sent` how many were sent; `done`
    the tokens of those that were cut off and go on; `away`: rows not to be sent, for others make them or made them."""

    lease: Lease
    rows: list[VirtualRow]
    left: list[int]
    sent: list[int]
    num_left: int
    num_unsent: int
    share: Share | None = None
    is_closed: bool = False
    done: dict[tuple[int, int], int] = field(default_factory=dict)
    away: set[int] = field(default_factory=set)

    @property
    def progress(self) -> ShardProgress:
        return ShardProgress(self.lease.batch_id, len(self.rows) - self.num_left, 0, self.num_unsent)


@dataclass(slots=True)
class VirtualStore:
    """What outlives a worker: finished rows of each shard by place, which rows a share holds, and how many tokens rows had
    that were moved."""

    journal: dict[int, set[int]] = field(default_factory=dict)
    handoffs: dict[str, list[int]] = field(default_factory=dict)
    begun: dict[int, dict[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Committed:
    at: float
    lease: Lease


VirtualEvent = Committed | RowsGiven | ShareEnded
