"""What a run looks like at a moment: its rates, the time that is left with an interval, its workers, its errors. Pure.

`Pulse` is asked now and then (every second, every few), never at each turn: it remembers what it saw, in bounded memory.
The time left assumes that a worker goes on finishing rows as workers did since the first row, in independent steps: R rows
a worker-second over T worker-seconds, with a variance of s a worker-second, take L = left / R more, give or take
sqrt(s L (1 + L / T)) / R. Nine in ten ends fall within 1.645 of these, where rows still to come are like those that ended
and the tail is short; a handful of very long rows at the end is not foreseen.
"""

import dataclasses
import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from batchgen.queue.leases import QueueWorker
from batchgen.queue.progress import Progress, Tally
from batchgen.queue.roster import Roster
from batchgen.queue.work_queue import WorkQueue

State = Literal["starting", "busy", "idle", "leaving", "silent"]
# In the order in which they are worth a look.
STATES: tuple[State, ...] = ("silent", "leaving", "idle", "starting", "busy")
# The rate "now" is of so long.
NOW_S = 30.0
# A worker is heard of every 2 s.
SILENT_S = 10.0
# Workers that are told one by one; all of them are counted.
MAX_LINES = 40
# Steps that the interval is estimated from; twice as many are thinned to these. Fewer than the least say nothing.
MAX_STEPS, MIN_STEPS = 64, 4
NINE_IN_TEN = 1.645


@dataclass(frozen=True, slots=True)
class WorkerLine:
    """One worker. `tokens_per_s`: completion tokens, over the last seconds."""

    worker: str
    node: str
    state: State
    num_shards: int
    num_inflight: int
    window: int
    tokens_per_s: float | None


@dataclass(slots=True)
class Snapshot(Progress):
    """Progress, and what takes longer to find out. Rates are completion tokens a second: of the last half minute, and since
    the run began. `error_types`: of this run's rows; it lags by a heartbeat. `gpu_hours`: of this run, start-up included;
    `cost`: of these. None is unknown."""

    tokens_per_s: float | None = None
    mean_tokens_per_s: float | None = None
    eta_s: float | None = None
    eta_low_s: float | None = None
    eta_high_s: float | None = None
    gpu_hours: float | None = None
    cost: float | None = None
    error_types: dict[str, int] = field(default_factory=dict)
    worker_states: dict[str, int] = field(default_factory=dict)
    workers: tuple[WorkerLine, ...] = ()


class Mark(NamedTuple):
    """What was known at a look."""

    at: float
    num_tokens: int
    num_rows: int
    ready_worker_s: float


@dataclass(slots=True)
class Pulse:
    """Belongs to one run. `now` only grows from look to look."""

    _recent: deque[Mark] = field(default_factory=deque)
    _steps: list[Mark] = field(default_factory=list)
    _stride_s: float = 0.0
    _tokens: dict[str, deque[tuple[float, int]]] = field(default_factory=dict)

    def look(
        self,
        progress: Progress,
        queue: WorkQueue,
        roster: Roster,
        tally: Tally,
        now: float,
        gpu_hours: float | None,
        gpu_hour_cost: float | None = None,
    ) -> Snapshot:
        fresh = progress.num_rows_done - progress.num_rows_done_before
        self._remember(Mark(now, progress.num_tokens, fresh, roster.ready_worker_s))
        workers = self._list_workers(queue, roster, tally, now)
        low, middle, high = self._foresee(progress)
        return Snapshot(
            **{item.name: getattr(progress, item.name) for item in dataclasses.fields(Progress)},
            tokens_per_s=self._read_rate(),
            mean_tokens_per_s=progress.num_tokens / progress.elapsed_s if progress.elapsed_s > 0 else None,
            eta_s=middle,
            eta_low_s=low,
            eta_high_s=high,
            gpu_hours=gpu_hours,
            cost=None if gpu_hours is None or gpu_hour_cost is None else gpu_hours * gpu_hour_cost,
            error_types=tally.count_error_types(),
            worker_states=dict(Counter(line.state for line in workers)),
            workers=tuple(sorted(workers, key=lambda line: (STATES.index(line.state), line.worker))[:MAX_LINES]),
        )

    # ---- rates -------------------------------------------------------------------------------------------------------

    def _remember(self, mark: Mark) -> None:
        self._recent.append(mark)
        while mark.at - self._recent[0].at > NOW_S and len(self._recent) > 2:
            self._recent.popleft()
        if mark.num_rows <= 0:
            return
        if not self._steps or mark.at - self._steps[-1].at >= self._stride_s:
            self._steps.append(mark)
        if len(self._steps) > 2 * MAX_STEPS:
            self._steps = self._steps[::2]
            self._stride_s = (self._steps[-1].at - self._steps[0].at) / len(self._steps)

    def _read_rate(self) -> float | None:
        first, last = self._recent[0], self._recent[-1]
        return max(0, last.num_tokens - first.num_tokens) / (last.at - first.at) if last.at > first.at else None

    def _foresee(self, progress: Progress) -> tuple[float | None, float | None, float | None]:
        """(least, middle, most) seconds left."""
        left = progress.num_rows - progress.num_rows_done
        if left <= 0:
            return 0.0, 0.0, 0.0
        if len(self._steps) < 2 or progress.num_workers == 0:
            return None, None, None
        spent = self._steps[-1].ready_worker_s - self._steps[0].ready_worker_s
        made = self._steps[-1].num_rows - self._steps[0].num_rows
        if spent <= 0 or made <= 0:
            return None, None, None
        rate = made / spent
        needed = left / rate
        middle = needed / progress.num_workers
        if len(self._steps) <= MIN_STEPS:
            return None, middle, None
        steps = zip(self._steps, self._steps[1:], strict=False)
        off = sum((b.num_rows - a.num_rows - rate * (b.ready_worker_s - a.ready_worker_s)) ** 2 for a, b in steps)
        spread = NINE_IN_TEN * math.sqrt(off / spent * needed * (1 + needed / spent)) / rate / progress.num_workers
        return max(0.0, middle - spread), middle, middle + spread

    # ---- workers -----------------------------------------------------------------------------------------------------

    def _list_workers(self, queue: WorkQueue, roster: Roster, tally: Tally, now: float) -> list[WorkerLine]:
        up = list(queue.look_at_workers())
        names = {worker.info.worker_id for worker in up}
        self._tokens = {name: seen for name, seen in self._tokens.items() if name in names}
        lines = [self._describe(worker, tally, now) for worker in up]
        return lines + [WorkerLine(name, "", "starting", 0, 0, 0, None) for name in roster.starting]

    def _describe(self, worker: QueueWorker, tally: Tally, now: float) -> WorkerLine:
        info = worker.info
        return WorkerLine(
            info.worker_id,
            info.node,
            choose_state(worker, now),
            len(worker.open) + len(worker.shares),
            worker.num_inflight,
            info.window,
            self._rate_worker(info.worker_id, tally.get_tokens(info.worker_id), now),
        )

    def _rate_worker(self, worker_id: str, num_tokens: int, now: float) -> float | None:
        seen = self._tokens.setdefault(worker_id, deque())
        seen.append((now, num_tokens))
        while now - seen[0][0] > NOW_S and len(seen) > 2:
            seen.popleft()
        first_at, first = seen[0]
        return max(0, num_tokens - first) / (now - first_at) if now > first_at else None


def choose_state(worker: QueueWorker, now: float) -> State:
    if now - worker.heard_at > SILENT_S:
        return "silent"
    if worker.is_leaving:
        return "leaving"
    return "busy" if worker.is_busy else "idle"
