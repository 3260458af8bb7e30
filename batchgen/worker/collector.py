"""Python's collector of cyclic garbage, in a process that is a worker's own.

What a worker makes for a row has no cycles and goes by its reference count. The collector looks all the same: at the young
objects at every 700 new ones, 3 % of a worker's CPU time with an engine without latency, and now and then at the hundreds
of thousands that were there before the first row, which holds up all rows in flight for 60 ms, and for longer where a large
library is loaded. Cycles are still collected, a little later.
"""

import gc

# New objects before the young are looked at: some hundred rows' worth, a few MB.
MIN_NEW_OBJECTS = 10_000


def calm_collector() -> None:
    """What is there by now, modules and the engine, is not looked at any more, and what comes less often. Not for a process
    that is somebody else's, too."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(MIN_NEW_OBJECTS, *gc.get_threshold()[1:])
