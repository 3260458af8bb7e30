"""Which pool a spec wants. Each is imported only when it is used: Ray is not there on every machine that runs a job."""

from batchgen.queue.events import WorkerPool
from batchgen.worker.worker import WorkerSetup


def create_pool(setup: WorkerSetup) -> WorkerPool:
    """A pool without workers yet. Raises what joining the cluster raises."""
    if setup.spec.cluster.pool == "inline":
        from batchgen.driver.inline_pool import InlinePool

        return InlinePool(setup)
    from batchgen.ray_pool import RayPool

    return RayPool(setup)
