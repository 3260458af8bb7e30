"""The exclusive hold of an output folder during a run, by the strongest means its store has.

A probe decides: conditional writes work -> the driver's lease lies in the folder itself; they don't -> it lies at
`output.lock_url` where one is given; else a named actor keeps other drivers of the same Ray cluster out, or, without
Ray, nothing does, and the run says what is and isn't promised.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from batchgen.driver_lease import DriverLease, acquire
from batchgen.errors import OutputError
from batchgen.job import Job
from batchgen.storage import Storage
from batchgen.store_probe import StoreAbilities, probe

Say = Callable[[str], None]


@contextmanager
def hold_folder(job: Job, say: Say, warn: Say) -> Iterator[tuple[DriverLease, Storage]]:
    """(lease, storage that suits the store's abilities) while the folder is ours. Raises LeaseHeld, OutputError."""
    spec, abilities = job.spec, probe(job.storage)
    storage = Storage(spec.output.path, is_exclusive=abilities.is_exclusive, can_replace=abilities.can_replace)
    with ExitStack() as stack:
        if not abilities.is_exclusive and spec.output.lock_url is None:
            _hold_by_cluster(job, abilities, stack, warn)
        lease = acquire(_open_lock(job, storage), spec.cluster.lease_ttl_s, on_wait=say)
        # Released last, and also when planning fails: the next run must not wait for a lease that nobody uses.
        stack.callback(lease.release)
        yield lease, storage


def _open_lock(job: Job, storage: Storage) -> Storage:
    if storage.can_create_exclusively or job.spec.output.lock_url is None:
        return storage
    lock = Storage(f"{job.spec.output.lock_url.rstrip('/')}/{job.spec.fingerprint()}")
    if not probe(lock).is_exclusive:
        raise OutputError(f"output.lock_url: {lock.root} has no conditional writes either; choose a store that has")
    return lock


def _hold_by_cluster(job: Job, abilities: StoreAbilities, stack: ExitStack, warn: Say) -> None:
    root = job.storage.root
    if job.spec.cluster.pool == "ray":
        from batchgen.ray_pool import hold_name

        stack.enter_context(hold_name(job.spec.cluster, root))
        scope = "runs from other clusters are not kept out"
    else:
        scope = "other runs are not kept out"
    warn(
        f"{root}: the store has no conditional writes ({abilities.reason}); each shard is still one whole file, "
        f"but {scope}, so it could be generated twice; set output.lock_url to a store that has them"
    )
