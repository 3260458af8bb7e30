"""How far a run is, in figures that are kept as events come instead of summed at every turn. Pure.

Rows are input rows, tokens completion tokens; rows of open shards count as their workers' heartbeats tell.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from batchgen.queue.events import Heartbeat
from batchgen.queue.suspects import ShardRows


@dataclass(slots=True)
class Progress:
    """What a view or the status object shows of a run."""

    num_rows: int
    num_shards: int
    num_shards_done: int
    num_rows_done: int
    num_rows_error: int
    num_rows_done_before: int
    num_tokens: int
    num_workers: int
    num_starting: int
    num_inflight: int
    window: int
    num_lost: int
    elapsed_s: float


@dataclass(slots=True)
class Tally:
    """Sums over heartbeats and commits. Tokens of workers that are gone still count."""

    num_tokens: int = 0
    num_inflight: int = 0
    num_results: int = 0
    num_errors: int = 0
    error_types: Counter[str] = field(default_factory=Counter)
    _beats: dict[str, Heartbeat] = field(default_factory=dict)

    def hear(self, beat: Heartbeat) -> None:
        last = self._beats.get(beat.worker_id)
        self.num_tokens += beat.total_tokens - (last.total_tokens if last else 0)
        self.num_inflight += beat.num_inflight - (last.num_inflight if last else 0)
        self._beats[beat.worker_id] = beat

    def forget(self, worker_id: str) -> Heartbeat | None:
        """Its last heartbeat."""
        last = self._beats.pop(worker_id, None)
        self.num_inflight -= last.num_inflight if last else 0
        return last

    def get_inflight(self, worker_id: str) -> tuple[ShardRows, ...] | None:
        """Rows that the worker's engine has, where its last heartbeat told them."""
        last = self._beats.get(worker_id)
        return last.inflight if last is not None else None

    def get_tokens(self, worker_id: str) -> int:
        """What the worker has made."""
        last = self._beats.get(worker_id)
        return last.total_tokens if last is not None else 0

    def commit(self, num_ok: int, num_error: int, error_types: Mapping[str, int] | None = None) -> None:
        self.num_results += num_ok + num_error
        self.num_errors += num_error
        self.error_types.update(error_types or {})

    def count_error_types(self) -> dict[str, int]:
        """Of committed shards, and of those that are open as they were last heard of; most frequent first."""
        found = Counter(self.error_types)
        for beat in self._beats.values():
            for shard in beat.shards:
                found.update(dict(shard.error_types))
        return dict(found.most_common())
