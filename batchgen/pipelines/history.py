"""What the events of a pipeline's log add up to: its runs, each with its partitions. Pure.

`History` folds events in order; folding the same events gives the same history everywhere. It does not grow with the log:
of runs that ended long ago only how they ended stays, packed (`past`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import TypeAdapter

from batchgen.pipelines.events import (
    Asked,
    AttemptFailed,
    Began,
    Deleted,
    Ended,
    Event,
    FirstSeen,
    Notified,
    PartitionEnded,
    Paused,
    Resumed,
    Retired,
    Submitted,
)
from batchgen.pipelines.past import Past

State = Literal["waiting", "running", "retrying", "succeeded", "failed"]
ENDED: frozenset[State] = frozenset({"succeeded", "failed"})
# Runs that ended are kept in full as long as something may be done with them, and so many of the newest beyond that.
KEPT_RUNS = 500


@dataclass(frozen=True, slots=True)
class Part:
    """One partition of a run. `attempt`: of the last submission, 0 before the first; `order`, `submitter`, `previous`,
    `length_prior`, `max_gpu_hours`: its own; of one that was asked for again `order` and `previous` are those of its last
    attempt before. `num_failed`: attempts that failed; `gpu_hours`: of those that ended."""

    state: State = "waiting"
    attempt: int = 0
    order: str = ""
    submitter: str = ""
    previous: str = ""
    num_failed: int = 0
    retry_at: float = 0.0
    gpu_hours: float = 0.0
    max_gpu_hours: float | None = None
    length_prior: str = ""
    message: str = ""

    @property
    def is_active(self) -> bool:
        return self.state not in ENDED


@dataclass(frozen=True, slots=True)
class Run:
    """One logical date's run. `parts`: by the partitions' names, '' where there are none. `end`: how it ended, and how that
    was told: `hooks` are to be, `notified` are done with. Times are Unix seconds."""

    key: str
    cause: str
    began_at: float
    parts: Mapping[str, Part]
    end: Literal["succeeded", "failed"] | None = None
    ended_at: float | None = None
    message: str = ""
    hooks: tuple[str, ...] = ()
    notified: tuple[str, ...] = ()
    is_retired: bool = False
    is_deleted: bool = False

    @property
    def is_active(self) -> bool:
        return self.end is None

    @property
    def state(self) -> State:
        """Of the partition that is furthest, until the run has ended."""
        states = {part.state for part in self.parts.values()}
        order: tuple[State, ...] = ("running", "retrying", "waiting")
        if self.end is not None:
            return self.end
        return next((state for state in order if state in states), "running")

    @property
    def attempt(self) -> int:
        """The highest number of any attempt."""
        return max((part.attempt for part in self.parts.values()), default=0)

    @property
    def gpu_hours(self) -> float:
        return sum(part.gpu_hours for part in self.parts.values())

    @property
    def last_message(self) -> str:
        """Of its end, or what a partition has to say before it."""
        return self.message or next((part.message for part in self.parts.values() if part.message), "")

    @property
    def hooks_left(self) -> tuple[str, ...]:
        return tuple(hook for hook in self.hooks if hook not in self.notified)

    def list_parts(self, state: State) -> list[str]:
        return [name for name, part in self.parts.items() if part.state == state]

    def with_part(self, name: str, part: Part) -> "Run":
        return replace(self, parts={**self.parts, name: part})


@dataclass(slots=True)
class History:
    """`length`: how many events it was made of. `cursor`: every date at or before it is decided."""

    length: int = 0
    cursor: str = ""
    is_paused: bool = False
    asked: tuple[str, ...] = ()
    runs: dict[str, Run] = field(default_factory=dict)
    past: Past = field(default_factory=Past)
    active: dict[str, bool] = field(default_factory=dict)  # the keys of those runs, in the order in which they began

    def list_active(self) -> list[Run]:
        return [self.runs[key] for key in self.active]

    def get_state(self, key: str) -> State | None:
        run = self.runs.get(key)
        return run.state if run is not None else self.past.get_end(key)

    def count(self, end: Literal["succeeded", "failed"]) -> int:
        return sum(run.end == end for run in self.runs.values()) + self.past.count(end)

    def apply(self, event: Event) -> None:
        """The next event of the log."""
        self.length += 1
        match event:
            case FirstSeen():
                self.cursor = max(self.cursor, event.cursor)
            case Paused() | Resumed():
                self.is_paused = isinstance(event, Paused)
            case Asked():
                self.asked = tuple(dict.fromkeys([*self.asked, *event.keys]))
            case Began():
                self._begin(event)
            case _:
                if (run := self.runs.get(event.key)) is not None:
                    self.runs[event.key] = fold(run, event)
                if isinstance(event, Ended):
                    self.active.pop(event.key, None)
        if isinstance(event, Ended | Notified | Deleted):
            self._shorten()

    def _begin(self, event: Began) -> None:
        attempt = self.past.discard(event.key)
        earlier = self.runs.pop(event.key, None)
        parts = {name: _begin_part(earlier, name, attempt) for name in event.partitions}
        self.runs[event.key] = Run(event.key, event.cause, event.at, parts)
        self.active[event.key] = True
        self.asked = tuple(key for key in self.asked if key != event.key)
        if event.cause == "schedule":
            self.cursor = max(self.cursor, event.key)

    def _shorten(self) -> None:
        if len(self.runs) <= 2 * KEPT_RUNS:
            return
        ended = [key for key, run in self.runs.items() if not run.is_active and run.is_retired == run.is_deleted]
        for key in ended[: len(ended) - KEPT_RUNS]:
            run = self.runs.pop(key)
            self.past.add(key, run.end or "failed", run.attempt)


def _begin_part(earlier: Run | None, name: str, attempt: int) -> Part:
    """Of a date that failed before and was asked for: a partition that succeeded stays as it is, where its outputs do.
    For the others attempts go on being counted, above all of the run's, because their numbers stand in ids and paths; and
    what they may read stays, because their folders hold jobs that were made with it."""
    if earlier is None:
        return Part(attempt=attempt)
    known = earlier.parts.get(name)
    if known is not None and known.state == "succeeded" and not earlier.is_retired:
        return replace(known, gpu_hours=0.0)
    if known is not None and not earlier.is_retired:
        return Part(attempt=earlier.attempt, order=known.order, previous=known.previous)
    return Part(attempt=earlier.attempt)


def fold(run: Run, event: Submitted | AttemptFailed | PartitionEnded | Ended | Notified | Retired | Deleted) -> Run:
    """The run after the event."""
    match event:
        case Submitted() | AttemptFailed() | PartitionEnded():
            part = run.parts.get(event.partition)
            return run if part is None else run.with_part(event.partition, fold_part(part, event))
        case Ended():
            return replace(run, end=event.state, ended_at=event.at, message=event.message, hooks=event.hooks)
        case Notified():
            return replace(run, notified=(*run.notified, event.hook))
        case Retired():
            return replace(run, is_retired=True)
        case Deleted():
            return replace(run, is_deleted=True)


def fold_part(part: Part, event: Submitted | AttemptFailed | PartitionEnded) -> Part:
    match event:
        case Submitted():
            new = replace(part, state="running", attempt=event.attempt, order=event.order, submitter=event.submitter)
            new = replace(new, previous=event.previous, length_prior=event.length_prior)
            return replace(new, max_gpu_hours=event.max_gpu_hours)
        case AttemptFailed():
            new = replace(part, state="retrying", num_failed=part.num_failed + 1, retry_at=event.retry_at)
        case PartitionEnded():
            new = replace(part, state=event.state)
    return replace(new, message=event.message, gpu_hours=part.gpu_hours + event.gpu_hours)


_HISTORY: TypeAdapter[History] = TypeAdapter(History)


def parse_history(raw: bytes) -> History:
    """Raises ValueError."""
    return _HISTORY.validate_json(raw)


def dump_history(history: History) -> bytes:
    return _HISTORY.dump_json(history)
