"""What happens to a pipeline: the events of its log, and nothing of what they add up to (`history`). Pure.

The log of a pipeline is the only truth about its runs. An event is appended by whoever decided it, and only where the log
is just as long as it was when it was decided: so a decision that was taken on an old view is never written.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter


@dataclass(frozen=True, slots=True)
class FirstSeen:
    """A scheduler met the pipeline: no logical date at or before `cursor` is due."""

    cursor: str
    at: float
    kind: Literal["first_seen"] = "first_seen"


@dataclass(frozen=True, slots=True)
class Began:
    """The one event that makes a logical date a run. `skipped_from`: dates from this one on were left out for it.
    `partitions`: their names, which stay what they are however the file is changed; ('',) where it has none."""

    key: str
    cause: Literal["schedule", "asked"]
    at: float
    skipped_from: str | None = None
    partitions: tuple[str, ...] = ("",)
    kind: Literal["began"] = "began"


@dataclass(frozen=True, slots=True)
class Submitted:
    """An attempt at a partition is about to be submitted: whoever finds it unknown to where it belongs, submits it under
    the same id. `order`: digest of what it is told; `submitter`: where it belongs; `previous`: the run whose outputs it may
    read; `length_prior`: the one whose lengths its jobs expect without saying so, '' for none; `max_gpu_hours`: of the
    run's, lent to it."""

    key: str
    attempt: int
    order: str
    submitter: str
    at: float
    previous: str = ""
    partition: str = ""
    max_gpu_hours: float | None = None
    length_prior: str = ""
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
    partition: str = ""
    kind: Literal["attempt_failed"] = "attempt_failed"


@dataclass(frozen=True, slots=True)
class PartitionEnded:
    """No further attempt at it. `gpu_hours`: of the last one."""

    key: str
    partition: str
    state: Literal["succeeded", "failed"]
    message: str
    gpu_hours: float
    at: float
    kind: Literal["partition_ended"] = "partition_ended"


@dataclass(frozen=True, slots=True)
class Ended:
    """All its partitions have ended, and a run that succeeded is published. Nothing more happens to it, but for retention
    and the hooks that are named here: one that is written into the file later is not told of it."""

    key: str
    state: Literal["succeeded", "failed"]
    message: str
    at: float
    hooks: tuple[str, ...] = ()
    kind: Literal["ended"] = "ended"


@dataclass(frozen=True, slots=True)
class Notified:
    """A hook of the run's end was told, or will not be: `is_ok`."""

    key: str
    hook: str
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


Event = (
    FirstSeen
    | Began
    | Submitted
    | AttemptFailed
    | PartitionEnded
    | Ended
    | Notified
    | Asked
    | Paused
    | Resumed
    | Retired
    | Deleted
)
_EVENT: TypeAdapter[Any] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def parse_event(raw: bytes) -> Event:
    """Raises ValueError for what is no event."""
    event: Event = _EVENT.validate_json(raw)
    return event


def dump_event(event: Event) -> dict[str, Any]:
    fields: dict[str, Any] = _EVENT.dump_python(event, mode="json")
    return fields
