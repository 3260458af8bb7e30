"""Which pool a spec wants. Each is imported only when it is used: Ray is not there on every machine that runs a job."""

from collections.abc import Callable, Iterable

from batchgen.metrics import Point
from batchgen.queue.events import WorkerPool
from batchgen.worker.worker import WorkerSetup


def create_pool(setup: WorkerSetup) -> WorkerPool:
    """A pool without workers yet. Raises what joining the cluster raises."""
    if setup.spec.cluster.pool == "inline":
        from batchgen.driver.inline_pool import InlinePool

        return InlinePool(setup)
    from batchgen.ray_pool import RayPool

    return RayPool(setup)


def create_publisher(setup: WorkerSetup) -> Callable[[Iterable[Point]], None]:
    """Where the driver's metrics go: to Prometheus by way of Ray, or nowhere. After `create_pool`."""
    if setup.spec.cluster.pool == "inline":
        return lambda _: None
    from batchgen.ray_metrics import RayExporter

    return RayExporter({"run": setup.run_name}).export
