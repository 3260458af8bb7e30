"""What the driver and a pool of workers say to each other. Frozen values that pickle; rows are never in them."""

from dataclasses import dataclass
from typing import Protocol

from batchgen.batches import BatchStats, FileFooter
from batchgen.queue.orders import Order
from batchgen.queue.suspects import ShardRows
from batchgen.records import JournalRef, Lease, ShardProgress, Share, WorkerInfo


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    info: WorkerInfo


@dataclass(frozen=True, slots=True)
class WorkerStartFailed:
    worker_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The worker is gone (killed, node lost, engine dead). Its leases must be lent again. `inflight`: rows that its engine
    had when it died; None: not known. `has_rows_to_blame`: False where the machine went, or somebody asked for it."""

    worker_id: str
    reason: str
    inflight: tuple[ShardRows, ...] | None = None
    has_rows_to_blame: bool = True


@dataclass(frozen=True, slots=True)
class WorkerLeaving:
    """Its node is being drained: it gets no more leases, journals what it has, and is lost soon."""

    worker_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class EngineRestarted:
    """The engine died with these rows in flight and starts anew by itself. The worker lives; the leases named ended, and
    their finished rows are journaled."""

    worker_id: str
    reason: str
    inflight: tuple[ShardRows, ...]
    batch_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent with every poll, idle or not. `total_tokens` only grows while the engine works; `integral` is the rows x
    seconds in flight since the worker's start. `inflight`: the rows, told when nothing was sent and nothing ended since the
    last heartbeat: then they may hang, and while they change what is told is old when it arrives. `are_hints_useful`: what
    answers say of the rows' length hints; None while there are too few."""

    worker_id: str
    total_tokens: int
    num_inflight: int
    integral: float
    shards: tuple[ShardProgress, ...]
    inflight: tuple[ShardRows, ...] | None = None
    are_hints_useful: bool | None = None

    @property
    def only_waits(self) -> bool:
        """Nothing is left to it but to wait for copies of what others generate."""
        return any(shard.num_waiting for shard in self.shards) and not any(shard.num_unsent for shard in self.shards)


@dataclass(frozen=True, slots=True)
class JournalFlushed:
    """A segment was written: where each shard's rows lie in it. `replaced`: earlier segments of which it holds a shard's
    rows, too. `rows`: which rows these are, by their places in order, 8 bytes each (`claim_table`); told where other rows
    of the run may wait for them."""

    worker_id: str
    refs: tuple[tuple[int, JournalRef], ...]
    replaced: tuple[tuple[int, tuple[str, ...]], ...] = ()
    rows: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerWarned:
    """Something went wrong that the worker goes on after, e.g. the store refused a journal segment."""

    worker_id: str
    message: str


@dataclass(frozen=True, slots=True)
class ShardCommitted:
    """The shard's file exists. `stats` is what this attempt did, with outcome 'superseded' when another attempt's file
    was there first; size, version, footer and its digest are of the file that stands."""

    worker_id: str
    batch_id: str
    stats: BatchStats
    num_bytes: int
    version: str
    footer: FileFooter
    footer_sha256: str


@dataclass(frozen=True, slots=True)
class ShardFailed:
    """The lease ended without a commit, e.g. the store failed or the input changed. `is_fatal` stops the run."""

    worker_id: str
    batch_id: str
    shard_number: int
    reason: str
    is_fatal: bool


@dataclass(frozen=True, slots=True)
class ShardReturned:
    """The lease's rows (`Lease.only`) ended and are journaled; their shard is to be done yet."""

    worker_id: str
    batch_id: str
    shard_number: int


@dataclass(frozen=True, slots=True)
class RowsGiven:
    """The owner's answer to `GiveRows`: so many requests wait in the handoff, and it will not send them. 0: it had none to
    give, and there is no handoff."""

    worker_id: str
    share: Share
    num_requests: int


@dataclass(frozen=True, slots=True)
class ShareEnded:
    """A helper has done with a share. All that it generated is in the journal, by events before this one. `stats` is None
    where it got nowhere; `reason` says why it could not finish."""

    worker_id: str
    share: Share
    stats: BatchStats | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ClaimsMade:
    """A worker is about to send rows that others may have a copy of: may it? Answered by `ClaimsDecided`. 8 bytes a row
    each: half of its fingerprint, its place, and that of the row whose answer was not to be found, or 0 (`claim_table`).
    `shards`: what became of these is asked for, too."""

    worker_id: str
    number: int
    keys: bytes
    places: bytes
    told: bytes
    shards: tuple[int, ...] = ()


PoolEvent = (
    WorkerStarted
    | WorkerStartFailed
    | WorkerLost
    | WorkerLeaving
    | EngineRestarted
    | WorkerWarned
    | Heartbeat
    | JournalFlushed
    | ShardCommitted
    | ShardFailed
    | ShardReturned
    | RowsGiven
    | ShareEnded
    | ClaimsMade
)


class WorkerPool(Protocol):
    """Workers somewhere else. Calls return at once; what came of them arrives as events, in order for each worker.

    A worker may be lost at any time, with everything it had not journaled; `WorkerLost` or `WorkerStartFailed` is then
    its last event. `kill` of an unknown worker is a no-op.
    """

    def start_worker(self, worker_id: str) -> None: ...

    def assign(self, lease: Lease) -> None: ...

    def tell(self, worker_id: str, order: Order) -> None:
        """Of no effect where the worker is gone."""
        ...

    def kill(self, worker_id: str) -> None:
        """End the worker without mercy; no event follows."""
        ...

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        """Events of all workers: at once where there are some, else after at most this long."""
        ...

    def drain(self, timeout_s: float) -> list[PoolEvent]:
        """All workers stop sending, finish what they can in this time, and journal it."""
        ...

    def close(self) -> None:
        """End all workers. Twice is a no-op."""
        ...
