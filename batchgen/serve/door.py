"""Where the endpoint's two halves meet: who runs a batch's rows, and who answers an interactive request. Protocols only.

The half without Ray (app, files, batches, conductor) is given a `CreateBulkPool` and any number of routers; the half with
Ray (shared engines, controller, deployments) gives them. Neither imports the other.
"""

from dataclasses import dataclass
from typing import Protocol

from batchgen.queue.events import WorkerPool
from batchgen.worker.setup import WorkerSetup


@dataclass(frozen=True, slots=True)
class BulkJob:
    """What a pool may want to know of the batch that it works for: `model` as the endpoint names it, and when the batch's
    window is over (seconds since the epoch): the earlier, the sooner it is served."""

    batch_id: str
    tenant: str
    model: str
    expires_at: float


class CreateBulkPool(Protocol):
    """A pool for one run of one batch, without workers yet. Called in a thread of the conductor's, once a run; closed by
    the run. Several may be open at once and share engines; the pool's workers are the run's own all the same: their ids,
    events and losses are told to that run only. `setup.spec` is the batch's JobSpec with the model's engine section, so a
    shared engine must be one made of an equal `model` and `engine` section. May raise what joining a cluster raises
    (BatchgenError: the batch stays in progress and is tried again)."""

    def __call__(self, setup: WorkerSetup, bulk: BulkJob) -> WorkerPool: ...
