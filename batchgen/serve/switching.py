"""How often the threads of an engine's process take turns: often while interactive requests come, else as Python has it.

A request changes threads several times on its way through that process, and each time waits up to this long for the
interpreter beside bulk's. Python's own 5 ms would be most of its time; a tenth of it costs bulk 2 to 8 % of its rows.
Where none came lately the first one pays for one such wait.
"""

import sys
import time
from collections.abc import Callable

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
