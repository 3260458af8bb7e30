"""What has happened to a pipeline: events, and what they add up to. Pure.

The log of a pipeline is the only truth about its runs. An event is appended by whoever decided it, and only where the log
is just as long as it was when it was decided: so a decision that was taken on an old view is never written. `History`
folds events in order; folding the same events gives the same history everywhere.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

RunState = Literal["waiting", "running", "retrying", "succeeded", "failed"]
ENDED: frozenset[RunState] = frozenset({"succeeded", "failed"})
# Runs that ended are kept in full as long as something may be done with them, and so many of the newest beyond that.
KEPT_RUNS = 500


@dataclass(frozen=True, slots=True)
class FirstSeen:
    """A scheduler met the pipeline: no logical date at or before `cursor` is due."""

    cursor: str
    at: float
    kind: Literal["first_seen"] = "first_seen"


@dataclass(frozen=True, slots=True)
class Began:
    """The one event that makes a logical date a run. `skipped_from`: dates from this one on were left out for it."""

    key: str
    cause: Literal["schedule", "asked"]
    at: float
    skipped_from: str | None = None
    kind: Literal["began"] = "began"


@dataclass(frozen=True, slots=True)
class Submitted:
    """An attempt is about to be submitted: whoever finds it unknown to where it belongs, submits it under the same id.
    `order`: digest of what it is told; `submitter`: where it belongs; `previous`: the run whose outputs it may read."""

    key: str
    attempt: int
    order: str
    submitter: str
    at: float
    previous: str = ""
    kind: Literal["submitted"] = "submitted"


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """Another attempt follows at `retry_at` (Unix seconds)."""

    key: str
    attempt: int
    message: str
    retry_at: float
    gpu_hours: float
    at: float
    kind: Literal["attempt_failed"] = "attempt_failed"


@dataclass(frozen=True, slots=True)
class Ended:
    """Nothing more happens to the run, but for hooks and retention."""

    key: str
    state: Literal["succeeded", "failed"]
    message: str
    gpu_hours: float
    at: float
    kind: Literal["ended"] = "ended"


@dataclass(frozen=True, slots=True)
class Notified:
    """Hook number `hook` of the run's end was told, or will not be: `is_ok`."""

    key: str
    hook: int
    is_ok: bool
    message: str
    at: float
    kind: Literal["notified"] = "notified"


@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody wants these dates. Those that succeeded or are at work are not begun again; failed ones are."""

    keys: tuple[str, ...]
    at: float
    kind: Literal["asked"] = "asked"


@dataclass(frozen=True, slots=True)
class Paused:
    """Nothing is begun until `Resumed`; what was begun goes on."""

    at: float
    kind: Literal["paused"] = "paused"


@dataclass(frozen=True, slots=True)
class Resumed:
    at: float
    kind: Literal["resumed"] = "resumed"


@dataclass(frozen=True, slots=True)
class Retired:
    """Its outputs are being deleted: it is nobody's to read, to publish or to run again."""

    key: str
    at: float
    kind: Literal["retired"] = "retired"


@dataclass(frozen=True, slots=True)
class Deleted:
    """Its outputs are gone."""

    key: str
    at: float
    kind: Literal["deleted"] = "deleted"


Event = FirstSeen | Began | Submitted | AttemptFailed | Ended | Notified | Asked | Paused | Resumed | Retired | Deleted
_EVENT: TypeAdapter[Any] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


@dataclass(frozen=True, slots=True)
class Run:
    """One logical date's run. `attempt`: of the last submission, 0 before the first; `order`, `submitter`: its own.
    `num_failed`: attempts that failed. `notified`: hooks that are done with. Times are Unix seconds."""

    key: str
    cause: str
    began_at: float
    state: RunState = "waiting"
    attempt: int = 0
    order: str = ""
    submitter: str = ""
    previous: str = ""
    num_failed: int = 0
    retry_at: float = 0.0
    gpu_hours: float = 0.0
    ended_at: float | None = None
    message: str = ""
    notified: tuple[int, ...] = ()
    is_retired: bool = False
    is_deleted: bool = False

    @property
    def is_active(self) -> bool:
        return self.state not in ENDED


@dataclass(slots=True)
class History:
    """`length`: how many events it was made of. `cursor`: every date at or before it is decided. `old`: keys of ended runs
    of which no more than their end is known."""

    length: int = 0
    cursor: str = ""
    is_paused: bool = False
    asked: tuple[str, ...] = ()
    runs: dict[str, Run] = field(default_factory=dict)
    old: dict[str, RunState] = field(default_factory=dict)
    active: dict[str, bool] = field(default_factory=dict)  # the keys of those runs, in the order in which they began

    def list_active(self) -> list[Run]:
        return [self.runs[key] for key in self.active]

    def get_state(self, key: str) -> RunState | None:
        run = self.runs.get(key)
        return run.state if run is not None else self.old.get(key)

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
        self.old.pop(event.key, None)
        earlier = self.runs.pop(event.key, None)  # a failed one that was asked for goes on counting its attempts
        attempt = earlier.attempt if earlier else 0
        self.runs[event.key] = Run(event.key, event.cause, event.at, attempt=attempt)
        self.active[event.key] = True
        self.asked = tuple(key for key in self.asked if key != event.key)
        if event.cause == "schedule":
            self.cursor = max(self.cursor, event.key)

    def _shorten(self) -> None:
        if len(self.runs) <= 2 * KEPT_RUNS:
            return
        ended = [key for key, run in self.runs.items() if not run.is_active and run.is_retired == run.is_deleted]
        for key in ended[: len(ended) - KEPT_RUNS]:
            self.old[key] = self.runs.pop(key).state


def fold(run: Run, event: Submitted | AttemptFailed | Ended | Notified | Retired | Deleted) -> Run:
    """The run after the event."""
    match event:
        case Submitted():
            new = replace(run, state="running", attempt=event.attempt, order=event.order)
            new = replace(new, submitter=event.submitter, previous=event.previous)
        case AttemptFailed():
            new = replace(
                run,
                state="retrying",
                num_failed=run.num_failed + 1,
                retry_at=event.retry_at,
                gpu_hours=run.gpu_hours + event.gpu_hours,
                message=event.message,
            )
        case Ended():
            hours = run.gpu_hours + event.gpu_hours
            new = replace(run, state=event.state, ended_at=event.at, message=event.message, gpu_hours=hours)
        case Notified():
            new = replace(run, notified=(*run.notified, event.hook))
        case Retired():
            new = replace(run, is_retired=True)
        case Deleted():
            new = replace(run, is_deleted=True)
    return new


def parse_event(raw: bytes) -> Event:
    """Raises ValueError for what is no event."""
    event: Event = _EVENT.validate_json(raw)
    return event


def dump_event(event: Event) -> dict[str, Any]:
    fields: dict[str, Any] = _EVENT.dump_python(event, mode="json")
    return fields


_HISTORY: TypeAdapter[History] = TypeAdapter(History)


def parse_history(raw: bytes) -> History:
    """Raises ValueError."""
    return _HISTORY.validate_json(raw)


def dump_history(history: History) -> bytes:
    return _HISTORY.dump_json(history)
