"""The exclusive hold of an output folder during a run, by the strongest means its store has.

A probe decides: conditional writes work -> the driver's lease lies in the folder itself; they don't -> it lies at
`output.lock_url` where one is given; else a named actor keeps other drivers of the same Ray cluster out, or, without
Ray, nothing does, and the run says what is and isn't promised.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from batchgen.driver.job import Job
from batchgen.driver.lease import DriverLease, acquire, make_cancel_path
from batchgen.errors import Cancelled, LeaseLost, OutputError, StorageError
from batchgen.manifest import LOCK, write_json
from batchgen.storage import Storage
from batchgen.stores.probe import StoreAbilities, probe

Say = Callable[[str], None]


class Hold:
    """The lease, kept alive by a thread of its own: whatever the run is busy with, it stays renewed, and a store that
    hangs is noticed. The thread also looks whether somebody asked this run to stop."""

    def __init__(self, lease: DriverLease, is_cancel_requested: Callable[[], bool]) -> None:
        self.epoch = lease.epoch
        self._lease, self._is_cancel_requested = lease, is_cancel_requested
        self._is_over = threading.Event()
        self._lost: LeaseLost | None = None
        self._is_cancelled = False
        self._thread = threading.Thread(target=self._keep, name="driver-lease", daemon=True)
        self._thread.start()

    def check_lease(self) -> None:
        """Raises LeaseLost when the folder is not ours any more."""
        if self._lost is not None:
            raise self._lost
        self._lease.check()

    def check(self) -> None:
        """Raises LeaseLost as above, Cancelled when the run was asked to stop."""
        self.check_lease()
        if self._is_cancelled:
            raise Cancelled("cancelled by: batchgen cancel")

    def release(self) -> None:
        """Waits for a renewal under way, which would undo it, however long the store takes."""
        self._is_over.set()
        self._lease.release()
        self._thread.join(self._lease.renew_interval_s)

    def _keep(self) -> None:
        while not self._is_over.wait(self._lease.renew_interval_s):
            try:
                self._lease.renew()
                self._is_cancelled = self._is_cancelled or self._is_cancel_requested()
            except LeaseLost as error:
                self._lost = error
                return
            except StorageError:
                continue  # asked again at the next renewal


@contextmanager
def hold_folder(job: Job, say: Say, warn: Say) -> Iterator[tuple[Hold, Storage]]:
    """(hold, storage that suits the store's abilities) while the folder is ours. Raises LeaseHeld, OutputError."""
    spec, abilities = job.spec, probe(job.storage)
    storage = Storage(spec.output.path, is_exclusive=abilities.is_exclusive, can_replace=abilities.can_replace)
    with ExitStack() as stack:
        if not abilities.is_exclusive and spec.output.lock_url is None:
            _hold_by_cluster(job, abilities, stack, warn)
        lease = acquire(_open_lock(job, storage), spec.cluster.lease_ttl_s, on_wait=say)
        hold = Hold(lease, lambda: storage.info(make_cancel_path(lease.epoch)) is not None)
        # Also when planning fails: the next run must not wait for a lease that nobody uses.
        stack.callback(hold.release)
        yield hold, storage


def _open_lock(job: Job, storage: Storage) -> Storage:
    if storage.can_create_exclusively or job.spec.output.lock_url is None:
        return storage
    name = hashlib.sha256(storage.root.encode()).hexdigest()[:16]
    lock = Storage(f"{job.spec.output.lock_url.rstrip('/')}/{name}")
    if not probe(lock).is_exclusive:
        raise OutputError(f"output.lock_url: {lock.root} has no conditional writes either; choose a store that has")
    write_json(storage, LOCK, {"root": lock.root})
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
