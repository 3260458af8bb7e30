"""All that a worker is made of. Pickles."""

from dataclasses import dataclass

import pyarrow as pa

from batchgen.lengths import LengthPrior
from batchgen.names import make_run_name
from batchgen.spec import JobSpec
from batchgen.storage import Storage


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker needs to be made, in any process. `prior`: what an earlier run measured of lengths. `num_requests`:
    how many of the run's fall to one worker, if it has all that it may have; None where that is not known."""

    worker_id: str
    spec: JobSpec
    epoch: int
    storage: Storage
    passthrough: pa.Schema
    prior: LengthPrior | None = None
    num_requests: int | None = None

    @property
    def run_name(self) -> str:
        """What metrics call the run."""
        return make_run_name(self.spec.fingerprint(), self.epoch)
