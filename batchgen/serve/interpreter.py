"""The interpreter of a process that answers interactive requests: its threads' turns, what its collector looks at, and what
it does not load.

A request changes threads several times on its way through an engine's process, and each time waits up to the switch
interval for the interpreter beside bulk's. Python's own 5 ms would be most of its time; a tenth costs bulk 2 to 8 % of
its rows. So it is short while such requests come; where none came lately the first one pays for one such wait.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SWITCH_S = 0.0005
SWITCH_MEMORY_S = 2.0


class Switching:
    """`note` each request; `look` now and then. Of the whole process: there is one of it."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        set_interval: Callable[[float], None] = sys.setswitchinterval,
    ) -> None:
        self._clock, self._set = clock, set_interval
        self._usual_s = sys.getswitchinterval()
        self._noted_at: float | None = None

    def note(self) -> None:
        """An interactive request came."""
        if self._noted_at is None:
            self._set(SWITCH_S)
        self._noted_at = self._clock()

    def look(self, num_urgent: int) -> None:
        """So many are here now."""
        if self._noted_at is not None and not num_urgent and self._clock() - self._noted_at > SWITCH_MEMORY_S:
            self._set(self._usual_s)
            self._noted_at = None


def freeze_loaded() -> None:
    """What is loaded by now is there for good: without this the collector goes through all of torch and transformers each
    time, 0.24 s in which nothing else happens."""
    gc.collect()
    gc.freeze()


@contextmanager
def hiding_torch() -> Iterator[None]:
    """Transformers imports torch wherever it is installed, 200 MB of which a tokenizer makes no use. What is imported in
    here finds none; of no effect where it is loaded already."""
    if "torch" in sys.modules:
        yield
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is none
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
