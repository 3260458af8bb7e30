"""A request on its way to the engine, and which rows a number of them are. Values."""

from collections.abc import Iterable
from dataclasses import dataclass

from batchgen.queue.suspects import ShardRows
from batchgen.records import Request
from batchgen.row_ranges import make_ranges
from batchgen.worker.open_shard import OpenShard


@dataclass(frozen=True, slots=True, eq=False)
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


def list_rows(inflight: Iterable[Ready]) -> tuple[ShardRows, ...]:
    """Their rows by shard."""
    rows: dict[int, list[int]] = {}
    for ready in inflight:
        rows.setdefault(ready.shard.lease.shard.number, []).append(ready.request.row_id.source_row)
    return tuple((number, make_ranges(found)) for number, found in sorted(rows.items()))
