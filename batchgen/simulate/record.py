"""What a virtual cluster is told and what a run on it comes to. Values, and what it needs of a virtual worker."""

from dataclasses import dataclass, field
from typing import Protocol

from batchgen.queue.events import Heartbeat
from batchgen.queue.orders import Order
from batchgen.queue.tail import TailPolicy
from batchgen.records import Lease, WorkerInfo
from batchgen.simulate.open_rows import VirtualEvent
from batchgen.spec import ClusterSpec, RetrySpec


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the cluster does to a run. `startup_s`: from asking for a worker to its first request, the machine's arrival
    included; it varies by `startup_spread` (a share, evenly). `losses_per_hour`: of one worker, for whatever reason."""

    startup_s: float = 600.0
    startup_spread: float = 0.2
    losses_per_hour: float = 0.0


class Working(Protocol):
    """What the loop needs of a virtual worker."""

    info: WorkerInfo

    def assign(self, lease: Lease) -> None: ...

    def obey(self, order: Order) -> None: ...

    def advance(self, until: float) -> None: ...

    def make_heartbeat(self) -> Heartbeat: ...

    def take_events(self) -> list[VirtualEvent]: ...

    def count_tokens(self) -> int:
        """Completion tokens made since its start."""
        ...

    def count_running(self) -> float:
        """Requests that the engine works at."""
        ...

    def count_lost(self) -> int:
        """Tokens that are generated again if it is lost now."""
        ...


@dataclass(frozen=True, slots=True)
class Moment:
    """Of all workers, at a time: tokens made so far, requests in work, workers up and starting."""

    at: float
    tokens: int
    running: float
    num_ready: int
    num_starting: int


@dataclass(slots=True)
class VirtualRun:
    """What a run came to. GPU seconds count from asking for a worker until it is gone, as in production."""

    makespan_s: float = 0.0
    gpu_s: float = 0.0
    num_rows: int = 0
    num_shards: int = 0
    num_losses: int = 0
    num_workers: int = 0
    num_shares: int = 0
    tokens: int = 0
    lost_tokens: int = 0
    moments: list[Moment] = field(default_factory=list)
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class ClusterModel:
    """Where virtual workers run. `beat_s`: how often one is looked at; `tail` None: no shard is split. `moment_s`: how
    often the record notes how things are. `began_at`: the run's start in Unix seconds, for its deadline."""

    cluster: ClusterSpec
    surroundings: Surroundings = field(default_factory=Surroundings)
    retry: RetrySpec = field(default_factory=RetrySpec)
    tail: TailPolicy | None = field(default_factory=TailPolicy)
    n: int = 1
    gpus_per_worker: float = 8.0
    beat_s: float = 2.0
    moment_s: float = 10.0
    began_at: float = 0.0
