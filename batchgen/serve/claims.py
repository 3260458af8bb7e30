"""Which conductor works on a batch: the driver's lease once more, under `claims/ID` in the endpoint's store.

One step of one batch is done by one conductor at a time; its job's own lease keeps other runs out besides. A conductor
that is killed is noticed at once on its own machine, and elsewhere after `ttl_s` of silence.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from batchgen.driver.hold import Hold
from batchgen.driver.lease import FOLDER, acquire, read_live_holder
from batchgen.serve.state import State
from batchgen.storage import Storage


class Claims:
    """Remembers what was last seen of others' claims, so that nobody waits for one that is alive."""

    def __init__(self, state: State, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._state, self._ttl_s, self._clock = state, ttl_s, clock
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}

    def _open(self, batch_id: str) -> Storage:
        return Storage(self._state.storage.url(f"claims/{batch_id}"))

    def is_free(self, batch_id: str) -> bool:
        """Never claimed, given back, its holder dead, or silent for a time to live. Only asks the store."""
        holder = read_live_holder(self._open(batch_id))
        if holder is None:
            return True
        sign, now = (holder.epoch, holder.beat), self._clock()
        known = self._seen.get(batch_id)
        if known is None or known[0] != sign:
            self._seen[batch_id] = (sign, now)
            return False
        return now - known[1] > self._ttl_s

    @contextmanager
    def hold(self, batch_id: str) -> Iterator[Hold]:
        """Raises LeaseHeld when another one has it after all."""
        lease = acquire(self._open(batch_id), self._ttl_s)
        hold = Hold(lease, lambda: False)
        try:
            yield hold
        finally:
            hold.release()

    def forget(self, batch_id: str) -> None:
        """The batch is over: its claim means nothing any more."""
        self._seen.pop(batch_id, None)
        storage = self._open(batch_id)
        storage.delete_many(info.path for info in storage.list_files(FOLDER))
