"""Workers that die, with the queue and the inquiry that ship between them: what a driver does with suspected rows, in
milliseconds. Nothing is generated; a row ends when a worker that lives has had it in flight."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

from makers import make_job_spec, make_shard, make_worker_info

from batchgen.journal import JournalIndex
from batchgen.queue.events import EngineRestarted, WorkerLost
from batchgen.queue.inquiry import Inquiry
from batchgen.queue.suspects import ShardRows
from batchgen.queue.trial_queue import TrialQueue
from batchgen.queue.work_queue import QueuedShard
from batchgen.records import Lease
from batchgen.row_ranges import iter_rows, make_ranges, subtract
from batchgen.storage import Storage

Row = tuple[int, int]
WINDOW = 8
# Many times what any court needs.
MAX_TURNS = 1000
_numbers = count()


def group_rows(rows: Iterable[Row]) -> tuple[ShardRows, ...]:
    rows = list(rows)
    numbers = sorted({number for number, _ in rows})
    return tuple((number, make_ranges(row for shard, row in rows if shard == number)) for number in numbers)


def list_rows(rows: Iterable[ShardRows]) -> set[Row]:
    return {(number, row) for number, ranges in rows for row in iter_rows(ranges)}


@dataclass
class Court:
    """`death`: how workers die of `culprits`: their engine starts anew, they are lost and say what was in flight, or they
    vanish; None: each time another way. `num_kills` of workers that have work are killed besides, each turn with `chance`.
    A turn takes up to `turn_s`. Before each, one that was taken for dead may commit a shard (`zombies`), of which those who
    work on it know nothing; or the driver dies, and another goes on with what was written down (`restarts`)."""

    seed: int
    num_shards: int
    shard_rows: int
    num_workers: int
    culprits: frozenset[Row] = frozenset()
    death: str | None = None
    num_kills: int = 0
    chance: float = 0.0
    turn_s: float = 0.0
    zombies: float = 0.0
    restarts: float = 0.0
    now: float = 0.0
    done: set[Row] = field(default_factory=set)
    suspected: set[Row] = field(default_factory=set)
    quarantined: set[Row] = field(default_factory=set)
    elsewhere: set[Row] = field(default_factory=set)
    committed: set[int] = field(default_factory=set)
    num_deaths: int = 0
    num_first_suspects: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        # Not the run's limits: what is tried is who is blamed, not when it is enough.
        retry = {"max_quarantined": 10_000, "max_shard_attempts": 10_000}
        self._spec = make_job_spec(output={"path": f"memory://court-{next(_numbers)}"}, retry=retry)
        ends = [(number * self.shard_rows, (number + 1) * self.shard_rows) for number in range(self.num_shards)]
        self._shards = [make_shard(number, *end) for number, end in enumerate(ends)]
        self.rows = {(number, row) for number, end in enumerate(ends) for row in range(*end)}
        self._worker_numbers, self._epochs = count(1), count(1)
        self._start([*range(self.num_shards)])

    def _start(self, todo: list[int]) -> None:
        """A run of these shards, with workers of its own."""
        spec, shards = self._spec, [QueuedShard(self._shards[number]) for number in todo]
        self.queue = TrialQueue(shards, epoch=next(self._epochs), retry=spec.retry, cluster=spec.cluster)
        storage = Storage(spec.output.path)
        self.inquiry = Inquiry(storage, spec, self.queue, JournalIndex(), lambda _: None, lambda: self.now)
        self.inquiry.load(todo)
        self.open: dict[str, dict[str, Lease]] = {}
        for _ in range(self.num_workers):
            self._add_worker()

    def run(self) -> "Court":
        turns = iter(range(MAX_TURNS))
        while not self.queue.is_done:
            assert next(turns, None) is not None, f"no end after {MAX_TURNS} turns"
            self.now += self.rng.uniform(0.0, self.turn_s)
            if self.zombies and self.rng.random() < self.zombies:
                self._commit_elsewhere(self.rng.randrange(self.num_shards))
            if self.restarts and self.rng.random() < self.restarts:
                self._start([shard.number for shard in self._shards if shard.number not in self.committed])
            self._lend()
            self._look()
            if busy := [worker_id for worker_id, leases in self.open.items() if leases]:
                self._work(self.rng.choice(busy))
            self._look()
        return self

    # ---- the driver's part -------------------------------------------------------------------------------------------

    def _lend(self) -> None:
        for lease in self.inquiry.lend(self.now, num_starting=0):
            self._take(lease)
        while (next_lease := self.queue.lease_next(self.now)) is not None:
            self._take(next_lease)

    def _take(self, lease: Lease) -> None:
        self.open[lease.worker_id][lease.batch_id] = self.inquiry.complete(lease)

    def _add_worker(self) -> None:
        worker_id = f"w{next(self._worker_numbers)}"
        self.open[worker_id] = {}
        self.queue.add_worker(make_worker_info(worker_id, WINDOW), self.now)

    def _end(self, worker_id: str, lease: Lease) -> None:
        del self.open[worker_id][lease.batch_id]
        number = lease.shard.number
        if lease.only:
            self.queue.give_back(worker_id, lease.batch_id, self.now, "its rows are journaled")
        elif self.queue.complete(worker_id, lease.batch_id, number):
            self.committed.add(number)
            self.inquiry.note_committed(number)
        self.inquiry.note_returned(worker_id, lease.batch_id)

    def _commit_elsewhere(self, number: int) -> None:
        is_new = number not in self.committed and not any(shard == number for shard, _ in self.culprits)
        if is_new and self.queue.complete("zombie", "any", number):
            self.committed.add(number)
            self.inquiry.note_committed(number)
            self.elsewhere |= {row for row in self.rows if row[0] == number}

    def _look(self) -> None:
        """No verdict while another suspect is untried: by then each has ended on an engine that lived, or is in it too."""
        self.suspected |= list_rows(rows for group in self.inquiry.state.groups for rows in group.rows)
        # Those of committed shards are forgotten by the next driver: they are rows of a file.
        if judged := list_rows(self.inquiry.state.quarantined) - self.quarantined:
            self.quarantined |= judged
            untried = self.suspected - self.quarantined - self.done - self.elsewhere
            assert not untried, f"{judged} were judged before {untried} were tried"

    # ---- the workers' part -------------------------------------------------------------------------------------------

    def _work(self, worker_id: str) -> None:
        leases = [*self.open[worker_id].values()]
        assert len({bool(lease.only) for lease in leases}) == 1, "suspects have nothing beside them"
        inflight = [row for lease in leases for row in self._list_todo(lease)][:WINDOW]
        is_killed = self.num_kills > 0 and self.rng.random() < self.chance
        self.num_kills -= is_killed
        if is_killed or self.culprits & set(inflight):
            self._die(worker_id, inflight, leases)
            return
        self.done |= set(inflight)
        for lease in leases:
            if not self._list_todo(lease):
                self._end(worker_id, lease)

    def _list_todo(self, lease: Lease) -> list[Row]:
        wanted = lease.only or ((lease.shard.row_start, lease.shard.row_end),)
        rows = ((lease.shard.number, row) for row in iter_rows(subtract(wanted, lease.quarantined)))
        return [row for row in rows if row not in self.done]

    def _die(self, worker_id: str, inflight: Sequence[Row], leases: Sequence[Lease]) -> None:
        death = self.death or self.rng.choice(["restart", "lost", "vanished"])
        self.num_deaths += 1
        if self.num_deaths == 1:
            # Nothing is in this journal: who vanishes leaves all rows of its shards behind as suspects.
            held = sum(lease.shard.num_rows for lease in leases)
            self.num_first_suspects = held if death == "vanished" else len(inflight)
        rows, batch_ids = group_rows(inflight), tuple(lease.batch_id for lease in leases)
        self.suspected |= set() if death == "vanished" else set(inflight)
        if death == "restart":
            self.open[worker_id].clear()
            self.inquiry.note_restart(EngineRestarted(worker_id, "died", rows, batch_ids), WINDOW)
            for batch_id in batch_ids:
                self.queue.give_back(worker_id, batch_id, self.now, "died")
            return
        del self.open[worker_id]
        gone = WorkerLost(worker_id, "died", None if death == "vanished" else rows)
        is_looked_into = self.inquiry.note_loss(gone, WINDOW)
        self.queue.lose(worker_id, self.now, "died", is_counted=not is_looked_into)
        self._add_worker()
