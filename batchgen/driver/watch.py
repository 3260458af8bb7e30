"""Shows a run to whoever watches: its view, and through the store everybody else (`batchgen status --watch`).

What costs more than a few additions is looked at once a second: at 1,000 workers that is 0.2 % of a core.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from batchgen.driver.control import StatusWriter
from batchgen.driver.dispatch import Dispatcher
from batchgen.driver.view import View
from batchgen.metrics import Point, measure_begin, measure_end, measure_run
from batchgen.queue.progress import Progress
from batchgen.queue.pulse import Pulse, Snapshot

LOOK_S = 1.0


class Watch:
    """Called at every turn of one run's loop."""

    def __init__(
        self,
        view: View,
        status: StatusWriter,
        clock: Callable[[], float] = time.monotonic,
        look_s: float = LOOK_S,
        publish: Callable[[Iterable[Point]], None] = lambda _: None,
        run_before: str | None = None,
    ) -> None:
        """`run_before`: what metrics call the run before this one, if there was one."""
        self._publish = publish
        self._view, self._status, self._clock, self._look_s = view, status, clock, min(LOOK_S, look_s)
        self._pulse = Pulse()
        self._next = clock()
        publish(measure_begin(run_before))

    def show(self, dispatcher: Dispatcher, progress: Progress) -> None:
        now = self._clock()
        if now < self._next:
            self._view.show(progress)
            return
        self._next = now + self._look_s
        seen = self._look(dispatcher, progress)
        self._view.show(seen)
        self._publish(measure_run(seen, time.time()))
        self._status.update(dispatcher, seen)

    def sum_up(self, dispatcher: Dispatcher) -> Snapshot:
        """What the run was, now that it has ended: no worker works, and nothing is foreseen."""
        seen = self._look(dispatcher, dispatcher.make_progress())
        over: dict[str, Any] = dict.fromkeys(("tokens_per_s", "eta_s", "eta_low_s", "eta_high_s"))
        return replace(seen, workers=(), worker_states={}, **over)

    def tell_end(self, state: str) -> None:
        """All that a run writes is written. Whoever hears nothing of a run, and not this either, has lost its driver."""
        self._publish(measure_end(state))

    def _look(self, dispatcher: Dispatcher, progress: Progress) -> Snapshot:
        at, tally = dispatcher.clock(), dispatcher.ledger.tally
        hours, price = dispatcher.count_gpu_hours(), dispatcher.spec.cluster.gpu_hour_cost
        return self._pulse.look(progress, dispatcher.queue, dispatcher.roster, tally, at, hours, price)
