"""Schedulers in virtual time: the real keepers, log and decisions over a store in memory, a Ray that forgets, clocks that
jump. Every operation on the store may end its scheduler's process, before or after it happened, or lose its reply; and
between any two operations of one scheduler the other one may go on (each look is a greenlet).
"""

import hashlib
import random
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from greenlet import getcurrent, greenlet

from batchgen.errors import AlreadyExists, Conflict, NotFound, StorageError
from batchgen.length_files import LENGTHS
from batchgen.pipelines.calendar import make_key, parse_key
from batchgen.pipelines.decide import Outcome
from batchgen.pipelines.events import Began, Deleted, Ended, PartitionEnded, Retired, Submitted, parse_event
from batchgen.pipelines.graph import make_jobs
from batchgen.pipelines.history import History
from batchgen.pipelines.keeper import Keeper
from batchgen.pipelines.log import make_path
from batchgen.pipelines.orders import open_folder, read_order, read_outcome, write_outcome
from batchgen.pipelines.publish import read_published
from batchgen.pipelines.scheduler import Scheduler
from batchgen.pipelines.spec import HookSpec, PipelineSpec
from batchgen.pipelines.submit import Status, Submission, SubmitterAway
from batchgen.storage import Storage
from batchgen.stores.base import ABSENT, FileInfo, StoreFile

DAY_S = 86_400.0


class Killed(BaseException):
    """The process that did the operation is gone."""


@dataclass
class Faults:
    """Chances for each operation (kills, lost replies, giving way to the other scheduler), or for each hour (the rest)."""

    kills: float = 0.002
    loses: float = 0.002
    yields: float = 0.1
    head_dies: float = 0.002
    clock_jumps: float = 0.003
    job_fails: float = 0.05


def get_top(name: str) -> str:
    """`memory://out/KEY` of what lies below: what is listed is looked for there."""
    return "/".join(name.split("/")[:4])


class MemoryClient:
    """A `stores.base.Client` with strong consistency, as S3's. Only schedulers' operations fail."""

    can_replace = True

    def __init__(self, rng: random.Random, faults: Faults) -> None:
        self.held: dict[str, tuple[bytes, str]] = {}
        self.below: defaultdict[str, set[str]] = defaultdict(set)
        self.rng, self.faults = rng, faults
        self.num_operations = self.num_kills = self.num_of_schedulers = 0
        self.kill_at: tuple[int, bool] | None = None  # at this operation of a scheduler, before it or after it
        self.hub = getcurrent()

    def find(self, folder: str) -> Iterator[FileInfo]:
        inside = f"{folder.rstrip('/')}/"
        names = sorted(self.below[get_top(folder)])
        found = [name for name in names if name.startswith(inside) or name == folder]
        return iter(self._do(lambda: list(self._list(found))))

    def _list(self, names: list[str]) -> Iterator[FileInfo]:
        for name in names:
            if (held := self.held.get(name)) is not None:  # deleted while we gave way
                yield FileInfo(name, len(held[0]), held[1])

    def list_folder(self, folder: str) -> tuple[list[FileInfo], list[str]]:
        raise NotImplementedError(folder)

    def info(self, name: str) -> FileInfo | None:
        def look() -> FileInfo | None:
            held = self.held.get(name)
            return held and FileInfo(name, len(held[0]), held[1])

        found: FileInfo | None = self._do(look)
        return found

    def read(self, name: str) -> tuple[bytes, str]:
        def get() -> tuple[bytes, str]:
            if name not in self.held:
                raise NotFound(name)
            return self.held[name]

        found: tuple[bytes, str] = self._do(get)
        return found

    def read_range(self, name: str, start: int, num_bytes: int, version: str) -> bytes:
        raise NotImplementedError(name)

    def open(self, name: str, block_bytes: int) -> StoreFile:
        raise NotImplementedError(name)

    def write(self, name: str, data: bytes | memoryview, if_version: str | None) -> str:
        def put() -> str:
            standing = self.held.get(name)
            if if_version == ABSENT and standing is not None:
                raise AlreadyExists(name)
            if if_version and (standing is None or standing[1] != if_version):
                raise Conflict(name)
            version = hashlib.md5(bytes(data)).hexdigest()
            self.held[name] = (bytes(data), version)
            self.below[get_top(name)].add(name)
            return version

        version: str = self._do(put)
        return version

    def delete(self, name: str) -> None:
        def drop() -> None:
            self.held.pop(name, None)
            self.below[get_top(name)].discard(name)

        self._do(drop)

    def _do(self, act: Any) -> Any:
        """Threads and jobs (in the hub) always succeed."""
        self.num_operations += 1
        if threading.current_thread() is not threading.main_thread() or getcurrent() is self.hub:
            return act()
        self.num_of_schedulers += 1
        self._kill_at(False)
        self._meet(self.faults.kills / 2, Killed())
        if self.rng.random() < self.faults.yields:
            self.hub.switch()
        value = act()
        self._kill_at(True)
        self._meet(self.faults.loses, StorageError("its reply was lost"))
        self._meet(self.faults.kills / 2, Killed())
        return value

    def _kill_at(self, is_after: bool) -> None:
        if self.kill_at == (self.num_of_schedulers, is_after):
            self.kill_at = None
            self.num_kills += 1
            raise Killed

    def _meet(self, chance: float, error: BaseException) -> None:
        if self.rng.random() < chance:
            self.num_kills += isinstance(error, Killed)
            raise error


@dataclass
class Job:
    submission: Submission
    ends_at: float
    has_ended: bool = False


def get_work(submission: Submission) -> tuple[str, str]:
    return submission.key, submission.partition


@dataclass
class SimRay:
    """A head with a job API. `num_done`: how often the work of a date's partition was carried through."""

    world: "World"
    kind: str = "ray"
    jobs: dict[str, Job] = field(default_factory=dict)
    away_until: float = 0.0
    num_done: Counter[tuple[str, str]] = field(default_factory=Counter)

    def submit(self, submission: Submission) -> None:
        self._knock()
        work = get_work(submission)
        if submission.id not in self.jobs:  # Ray refuses an id that it has
            at_work = [job for job in self.jobs.values() if not job.has_ended and get_work(job.submission) == work]
            assert not at_work, f"{submission.id} is submitted while {at_work[0].submission.id} is at work"
            ends_at = self.world.now + self.world.rng.choice([600.0, 4 * 3600.0, 30 * 3600.0])
            self.jobs[submission.id] = Job(submission, ends_at)

    def get_status(self, submission: Submission) -> Status:
        self._knock()
        job = self.jobs.get(submission.id)
        return "unknown" if job is None else "ended" if job.has_ended else "running"

    def stop(self, submission: Submission) -> None:
        self._knock()
        self.jobs[submission.id].has_ended = True

    def _knock(self) -> None:
        if self.world.now < self.away_until:
            raise SubmitterAway("the head is away")

    def list_at_work(self) -> set[str]:
        """Dates of which a job was submitted that has not ended."""
        return {job.submission.key for job in self.jobs.values() if not job.has_ended}

    def die(self) -> None:
        """With everything on it; another one comes and knows nothing."""
        self.jobs.clear()
        self.away_until = self.world.now + self.world.rng.uniform(0, 6 * 3600.0)

    def step(self) -> None:
        for job in self.jobs.values():
            if not job.has_ended and job.ends_at <= self.world.now:
                job.has_ended = True
                self._finish(job.submission)
        if len(self.jobs) > 200:
            self.jobs = {name: job for name, job in self.jobs.items() if not job.has_ended}

    def _finish(self, submission: Submission) -> None:
        """What `execute` does: nothing where the outcome stands."""
        rng, folder, (key, partition) = self.world.rng, submission.folder, get_work(submission)
        if read_outcome(folder, key, partition, submission.attempt) is not None:
            return
        if rng.random() < self.world.faults.job_fails:
            if rng.random() < 0.5:  # else it is killed and says nothing
                write_outcome(folder, key, partition, submission.attempt, Outcome(False, "it failed"))
            return
        order = read_order(folder, submission.order)
        outputs = {}
        for job in make_jobs(order.spec, parse_key(key), order.previous, only=order.partition):
            outputs[job.name] = {"path": job.output}
            Storage(job.output).put("_SUCCESS", b"{}")
            Storage(job.output).put("data/shard-000000000.parquet", b"rows")
            Storage(job.output).put(LENGTHS, b'{"lengths": "3.4:5"}')
        self.num_done[key, partition] += 1
        write_outcome(folder, key, partition, submission.attempt, Outcome(True, outputs=outputs))


@dataclass
class SimTeller:
    world: "World"
    told: list[tuple[str, str]] = field(default_factory=list)

    def start(self, key: str, hook: HookSpec, payload: dict[str, Any]) -> None:
        if (key, hook.id) not in self.told:
            self.told.append((key, hook.id))
            self.world.num_told[str(payload["id"])] += 1

    def collect(self) -> list[tuple[str, str, str | None]]:
        told, self.told = self.told, []
        return [(key, hook, None) for key, hook in told]


@dataclass
class World:
    """Two schedulers, a store, a Ray, for so many days from `start`."""

    spec: PipelineSpec
    seed: int
    faults: Faults = field(default_factory=Faults)
    step_s: float = 6 * 3600.0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        start = self.spec.schedule.start
        assert start is not None
        self.start = self.now = start.timestamp()
        self.client = MemoryClient(self.rng, self.faults)
        self.ray = SimRay(self)
        self.num_told: Counter[str] = Counter()
        self.num_starts = self.num_priors = 0
        self.offsets = [0.0, 0.0]
        self.back_at = [0.0, 0.0]
        self.schedulers: list[Scheduler | None] = [None, None]

    def run(self, num_days: int) -> None:
        """Then everything is left in peace until nothing is at work any more."""
        end = self.start + num_days * DAY_S
        while self.now < end:
            self.now += self.rng.uniform(0.2, 1.8) * self.step_s
            self._befall()
            self.ray.step()
            self._look()
        self.faults = self.client.faults = Faults(0, 0, 0.1, 0, 0, 0)
        self.offsets = [0.0, 0.0]
        dates = self.list_dates(end)
        for _ in range(20_000):
            self.now += 1800.0
            self.ray.step()
            self._look()
            if self.now > end + 4 * DAY_S and (not self.spec.schedule.catchup or self._has_told(dates)):
                return

    def _has_told(self, dates: list[str]) -> bool:
        """Is nothing left to do for these dates?"""
        history = next(scheduler for scheduler in self.schedulers if scheduler is not None).keepers[0].history
        return len(self.num_told) >= len(dates) and all(history.get_state(key) == "succeeded" for key in dates)

    def _befall(self) -> None:
        hours = self.step_s / 3600
        if self.rng.random() < self.faults.head_dies * hours:
            self.ray.die()
        for number in range(2):
            if self.rng.random() < self.faults.clock_jumps * hours:
                self.offsets[number] = self.rng.choice([0.0, -2 * DAY_S, -600.0, 600.0, 5 * DAY_S])

    def _look(self) -> None:
        """Both, in turns that the store's operations cut."""
        going = []
        for number in range(2):
            if self.schedulers[number] is None and self.now >= self.back_at[number]:
                going.append((number, greenlet(lambda number=number: self._start(number))))
            elif self.schedulers[number] is not None:
                going.append((number, greenlet(lambda number=number: self._tick(number))))
        while going:
            number, look = self.rng.choice(going)
            try:
                look.switch()
            except Killed:
                self.schedulers[number] = None
                self.back_at[number] = self.now + self.rng.choice([0.0, 3600.0, 2 * DAY_S])
            if look.dead:
                going.remove((number, look))

    def _start(self, number: int) -> None:
        self.num_starts += 1
        try:
            keeper = Keeper(self.spec, self.ray, SimTeller(self), lambda: self.now, _quiet, _quiet)
        except StorageError:
            return
        self.schedulers[number] = Scheduler([keeper], _quiet, _quiet)
        self._tick(number)

    def _tick(self, number: int) -> None:
        scheduler = self.schedulers[number]
        assert scheduler is not None
        scheduler.tick(self.now + self.offsets[number], self.now)

    # ---- what came of it ---------------------------------------------------------------------------------------------

    def list_dates(self, until: float) -> list[str]:
        keys = []
        for date in self.spec.schedule.calendar.iterate_after(parse_key(make_key(_at(self.start - 60)))):
            if date.timestamp() > until:
                return keys
            keys.append(make_key(date))
        return keys

    def check_log(self) -> History:
        """The whole log, event by event: no date begun twice, never more runs than allowed, none deleted that readers are
        given, and all attempts at a partition told the same of the run before."""
        folder, history, number = open_folder(self.spec), History(), 0
        begun: Counter[str] = Counter()
        ended: Counter[str] = Counter()
        parts_ended: Counter[tuple[str, str]] = Counter()
        previous: dict[tuple[str, str], str] = {}
        while (raw := self.client.held.get(folder.url(make_path(number := number + 1)))) is not None:
            event = parse_event(raw[0])
            if isinstance(event, Began):
                begun[event.key] += 1
            if isinstance(event, Ended):
                assert history.runs[event.key].is_active
                ended[event.key] += 1
            if isinstance(event, PartitionEnded):
                parts_ended[event.key, event.partition] += 1
            if isinstance(event, Retired | Deleted):
                assert not history.runs[event.key].is_active
            history.apply(event)
            assert len(history.list_active()) <= self.spec.max_active_runs
            if isinstance(event, Submitted):
                at_work = history.runs[event.key].list_parts("running")
                assert len(at_work) <= self.spec.max_active_partitions
                assert previous.setdefault((event.key, event.partition), event.previous) == event.previous
                self._check_prior(event)
        assert not [key for key, count in (begun + Counter()).items() if count > 1]
        assert not [key for key, count in ended.items() if count > 1]
        assert not [part for part, count in parts_ended.items() if count > 1]
        published = read_published(Storage(self.spec.publish or ""))
        assert published is None or not history.runs[published].is_retired
        return history

    def _check_prior(self, event: Submitted) -> None:
        """Lengths of the run before, of the same partition; or of none, where the store failed just then."""
        order = read_order(open_folder(self.spec), event.order)
        assert event.length_prior in ("", event.previous)
        assert order.length_priors == ((order.previous or {}) if event.length_prior else {})
        assert list(order.length_priors) in ([], [f"generate/{event.partition}".rstrip("/")])
        self.num_priors += bool(order.length_priors)


def _at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _quiet(_: str) -> None: ...
