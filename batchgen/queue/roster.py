"""The workers of a run: asked for, up, lost, and the GPU time they have cost. Pure: time is an argument.

Start failures in a row end the run; one worker's first token shows that workers can start, and earlier failures count no
more. GPU time runs from where a worker's start-up began (it says how long that took; while it has not come up, from when
it was asked for) until it is gone.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from batchgen.queue.events import Heartbeat
from batchgen.records import WorkerInfo


@dataclass(slots=True)
class WorkerLife:
    """One worker from the time that its GPUs are counted from. `end`: released, lost, start_failed; None while it lives."""

    worker_id: str
    began: float
    ready: float | None = None
    ended: float | None = None
    end: str | None = None
    info: WorkerInfo | None = None


@dataclass(slots=True)
class Roster:
    """`starting` and `since`: when each worker was asked for, and when the GPUs of one that is up began to be used."""

    gpus_per_worker: float
    starting: dict[str, float] = field(default_factory=dict)
    workers: dict[str, WorkerInfo] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)
    idle_since: dict[str, float] = field(default_factory=dict)
    num_made: int = 0
    num_lost: int = 0
    num_released: int = 0
    num_start_failures: int = 0
    num_mute_trials: int = 0
    first_start_failure: str = ""
    window: int = 0
    ready_worker_s: float = 0.0
    lives: dict[str, WorkerLife] = field(default_factory=dict)
    _startups: list[float] = field(default_factory=list)
    _proven: set[str] = field(default_factory=set)
    _ended_s: float = 0.0
    _turned_at: float | None = None

    def turn(self, now: float) -> None:
        """Once a turn: time goes by for all that are up."""
        if self._turned_at is not None:
            self.ready_worker_s += len(self.workers) * (now - self._turned_at)
        self._turned_at = now

    def make_worker_id(self, now: float) -> str:
        self.num_made += 1
        worker_id = f"worker-{self.num_made:04d}"
        self.starting[worker_id] = now
        self.lives[worker_id] = WorkerLife(worker_id, now)
        return worker_id

    def greet(self, info: WorkerInfo, now: float) -> bool:
        """False for one that was given up while it started."""
        asked_at = self.starting.pop(info.worker_id, None)
        if asked_at is None:
            return False
        self._startups.append(now - asked_at)
        self.workers[info.worker_id] = info
        self.since[info.worker_id] = max(asked_at, now - info.startup_s)
        self.lives[info.worker_id] = WorkerLife(info.worker_id, self.since[info.worker_id], now, info=info)
        self.window += info.window
        return True

    def count_start_failure(self, worker_id: str, now: float, reason: str) -> None:
        """Of one that never came up, or that came up and made no token."""
        if (asked_at := self.starting.pop(worker_id, None)) is not None:
            self._ended_s += now - asked_at
            self._end_life(worker_id, now, "start_failed")
        self.num_start_failures += 1
        self.first_start_failure = self.first_start_failure or reason

    def is_failure(self, *, is_trial: bool) -> bool:
        """Is a worker that died without a token one that can't start? While suspects are tried that is what is waited for:
        then every second one counts."""
        self.num_mute_trials += is_trial
        return not is_trial or self.num_mute_trials % 2 == 0

    def note_proof(self, beat: Heartbeat) -> None:
        if beat.total_tokens > 0 and beat.worker_id not in self._proven:
            self._proven.add(beat.worker_id)
            self.num_start_failures, self.num_mute_trials, self.first_start_failure = 0, 0, ""

    def remove(self, worker_id: str, now: float) -> WorkerInfo | None:
        """It is gone; None for one that was not up."""
        info = self.workers.pop(worker_id, None)
        if info is not None:
            self._ended_s += now - self.since.pop(worker_id)
            self.window -= info.window
            self.idle_since.pop(worker_id, None)
            self._end_life(worker_id, now, "lost")
        return info

    def _end_life(self, worker_id: str, now: float, end: str) -> None:
        life = self.lives[worker_id]
        life.ended, life.end = now, end

    def release(self, worker_id: str, now: float) -> None:
        """It was let go."""
        self.remove(worker_id, now)
        self._end_life(worker_id, now, "released")
        self.num_released += 1

    def note_idle(self, busy: Collection[str], now: float) -> None:
        """Which of those that are up have nothing to do, and since when."""
        idle = [worker_id for worker_id in self.workers if worker_id not in busy]
        self.idle_since = {worker_id: self.idle_since.get(worker_id, now) for worker_id in idle}

    def list_overdue(self, now: float, limit_s: float) -> list[str]:
        """Workers that are not up this long after they were asked for."""
        return [worker_id for worker_id, since in self.starting.items() if now - since > limit_s]

    @property
    def mean_startup_s(self) -> float | None:
        return sum(self._startups) / len(self._startups) if self._startups else None

    def count_gpu_s(self, now: float) -> float:
        """GPU-seconds of all workers so far, start-up included."""
        return self.gpus_per_worker * self.count_worker_s(now)

    def count_worker_s(self, now: float) -> float:
        """Worker-seconds so far, start-up included."""
        open_s = sum(now - since for since in (*self.since.values(), *self.starting.values()))
        return self._ended_s + open_s

    def count_startup_s(self, now: float) -> float:
        """Of these, those before a worker was up."""
        ends = ((life, now if life.ended is None else life.ended) for life in self.lives.values())
        return sum((end if life.ready is None else life.ready) - life.began for life, end in ends)
