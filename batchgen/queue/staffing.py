"""Workers come and go: asks the pool for as many as are worth it and as the run's limits allow, finds those to let go.

The decisions are `scaling`'s and `governor`'s; here they get their facts and are carried out.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from batchgen.errors import NoWorkers, RunStopped
from batchgen.queue.events import WorkerPool
from batchgen.queue.governor import RunFacts, Verdict, govern
from batchgen.queue.progress import Progress
from batchgen.queue.roster import Roster
from batchgen.queue.scaling import Facts, choose_num_to_start, choose_to_release
from batchgen.queue.tail import TailPolicy
from batchgen.queue.work_queue import WorkQueue
from batchgen.spec import JobSpec

# So long nobody has anything to do though shards are left. Of our own waits none is longer than half of it: a shard that
# failed is lent again after a minute at most.
MAX_IDLE_S = 120.0


@dataclass(slots=True)
class Staffing:
    """`wall` gives Unix seconds, which a deadline is compared with."""

    spec: JobSpec
    queue: WorkQueue
    pool: WorkerPool
    roster: Roster
    tail: TailPolicy
    on_warning: Callable[[str], None]
    wall: Callable[[], float] = time.time
    _is_warned: bool = False
    _look_at: float = 0.0
    _busy_at: float | None = None

    def start(self, progress: Progress, now: float) -> None:
        """Raises NoWorkers when none can be started, RunStopped at the run's limits and where nothing is lent any more."""
        roster = self.roster
        roster.turn(now)
        self._check_idle(now)
        facts = self._make_facts(progress)
        verdict = self._govern(facts, progress, now)
        if roster.num_start_failures >= self.spec.retry.max_start_failures:
            if not roster.workers and not roster.starting:
                count, reason = roster.num_start_failures, roster.first_start_failure
                raise NoWorkers(f"{count} workers in a row failed to start: {reason}")
            return
        for _ in range(choose_num_to_start(facts, self.spec.cluster, verdict.min_workers, verdict.max_workers)):
            self.pool.start_worker(roster.make_worker_id(now))

    def _check_idle(self, now: float) -> None:
        """A fault of ours that would keep workers up for nothing becomes a stop that can be gone on from."""
        if self._busy_at is None or self.queue.has_leases or self.roster.starting or not self.roster.workers:
            self._busy_at = now
        elif now - self._busy_at > MAX_IDLE_S:
            left = self.queue.num_shards - self.queue.num_done
            raise RunStopped(
                f"no worker has had anything to do for {MAX_IDLE_S:g} s though {left} shards are left; start it again, it "
                "goes on, and tell us of it: that is a fault of batchgen"
            )

    def list_idle(self, now: float) -> list[str]:
        """At the tail: workers that have had nothing to do for a while, above the least number."""
        if self.queue.num_waiting or now < self._look_at:
            return []
        self._look_at = now + self.tail.look_s
        self.roster.note_idle({w.info.worker_id for w in self.queue.look_at_workers() if w.is_busy}, now)
        num_ready, after_s = len(self.roster.workers), self.tail.release_after_s
        return choose_to_release(self.roster.idle_since, now, num_ready, self.spec.cluster, after_s=after_s)

    def _govern(self, facts: Facts, progress: Progress, now: float) -> Verdict:
        known = RunFacts(
            now=self.wall(),
            num_rows_left=facts.num_rows_left,
            num_rows=progress.num_rows,
            num_ready=facts.num_ready,
            num_starting=facts.num_starting,
            gpu_s=self.roster.count_gpu_s(now),
            rows_per_s=facts.rows_per_s,
            startup_s=facts.startup_s,
        )
        verdict = govern(known, self.spec.cluster)
        if verdict.stop is not None:
            raise RunStopped(verdict.stop)
        if verdict.warning is not None and not self._is_warned:
            self._is_warned = True
            self.on_warning(verdict.warning)
        return verdict

    def _make_facts(self, progress: Progress) -> Facts:
        fresh, ready_s = progress.num_rows_done - progress.num_rows_done_before, self.roster.ready_worker_s
        return Facts(
            num_ready=len(self.roster.workers),
            num_starting=len(self.roster.starting),
            num_shards_waiting=self.queue.num_waiting,
            num_rows_left=progress.num_rows - progress.num_rows_done,
            rows_per_s=fresh / ready_s if fresh > 0 and ready_s > 0 else None,
            startup_s=self.roster.mean_startup_s,
        )
