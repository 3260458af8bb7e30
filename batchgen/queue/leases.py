"""Workers and the leases they hold, as the queue sees them. Values that only the queue changes."""

from dataclasses import dataclass, field

from batchgen.records import Lease, Share, WorkerInfo


@dataclass(frozen=True, slots=True)
class LostLease:
    """A lease that ended without a commit, with the last that was heard of it."""

    lease: Lease
    started_at: float
    ended_at: float
    num_rows_done: int
    reason: str


@dataclass(slots=True)
class OpenLease:
    """A lease that is held, with the last that was heard of it. `is_in_order`: lent by the input's order, not by what is
    expected of it. `num_rows_waiting`: for a copy of another row's answer; its worker's engine needs others meanwhile."""

    lease: Lease
    work: float
    started_at: float
    is_in_order: bool = False
    num_rows_done: int = 0
    num_rows_error: int = 0
    num_unsent: int | None = None
    num_inflight: int = 0
    num_rows_waiting: int = 0

    @property
    def num_unfinished(self) -> int:
        return max(0, self.lease.shard.num_rows - self.num_rows_done - self.num_rows_waiting)

    @property
    def load(self) -> float:
        """What is left of its work."""
        return self.work * self.num_unfinished / self.lease.shard.num_rows


@dataclass(slots=True)
class QueueWorker:
    """A worker as the queue sees it. `num_rows_ended`: rows of leases that it has done with. `share_unsent`: requests of
    each share that it has not sent yet; `total_tokens`, `integral`: its last heartbeat's. `is_apart`: it has suspects, and
    gets nothing beside them; `is_leaving`: it gets nothing any more. `num_in_order`: of its unfinished
    rows, `num_open_in_order` of its leases."""

    info: WorkerInfo
    joined_at: float
    heard_at: float
    progress_at: float
    progress: tuple[int, int] = (0, 0)
    last_shard: int = -2
    num_unfinished: int = 0
    num_in_order: int = 0
    num_open_in_order: int = 0
    load: float = 0.0
    num_rows_ended: int = 0
    num_inflight: int = 0
    total_tokens: int = 0
    integral: float = 0.0
    open: dict[str, OpenLease] = field(default_factory=dict)
    shares: dict[str, Share] = field(default_factory=dict)
    share_unsent: dict[str, int] = field(default_factory=dict)
    is_apart: bool = False
    is_leaving: bool = False

    @property
    def is_busy(self) -> bool:
        return bool(self.open or self.shares)

    def count(self) -> None:
        """Keeps the sums that every lease is decided by; called whenever what is open changed, never in a decision."""
        self.num_unfinished = sum(held.num_unfinished for held in self.open.values())
        in_order = [held.num_unfinished for held in self.open.values() if held.is_in_order]
        self.num_in_order, self.num_open_in_order = sum(in_order), len(in_order)
        self.load = sum(held.load for held in self.open.values())
