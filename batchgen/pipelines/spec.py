"""`PipelineSpec`: one pipeline, frozen. Knows no YAML and no files: see `load`.

The jobs of its stages are templates: plain trees, because what stands in them is a job spec only once a logical date is
put into it. Nothing secret belongs here: a webhook whose address is a secret is named by an environment variable.
"""

import hashlib
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, AwareDatetime, BeforeValidator, Field, model_validator

from batchgen.pipelines.calendar import Calendar, check_cron, check_timezone
from batchgen.queue.governor import parse_deadline
from batchgen.specs.sections import Section
from batchgen.urls import check_url

NAME = r"^[a-z][a-z0-9_-]{0,62}$"


def check_plain(text: str) -> str:
    """Raises ValueError for what looks like a template where none is rendered."""
    if "{{" in text:
        raise ValueError(f"'{text}' is the same for every date; write it without {{{{ }}}}")
    return text


Url = Annotated[str, AfterValidator(check_url)]
PlainUrl = Annotated[Url, AfterValidator(check_plain)]
Name = Annotated[str, Field(pattern=NAME)]


def parse_duration(value: object) -> object:
    """Seconds of '8h', '1d12h', '90m', '30s'; other values as they are."""
    if not isinstance(value, str):
        return value
    epoch = datetime(2000, 1, 1, tzinfo=UTC)
    try:
        seconds = (parse_deadline(value, epoch) - epoch).total_seconds()
    except ValueError:
        seconds = -1.0
    if seconds < 0 or ":" in value:
        raise ValueError(f"'{value}' is no duration; write 8h, 1d12h, 90m or 30s")
    return seconds


Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0, le=366 * 86_400.0)]


class ScheduleSpec(Section):
    """When."""

    cron: Annotated[str, AfterValidator(check_cron)] = Field(
        description="Five fields: minute, hour, day of month, month, day of week; or @hourly, @daily, @weekly, @monthly."
    )
    timezone: Annotated[str, AfterValidator(check_timezone)] = Field(
        default="UTC", description="IANA time zone in which the fields are read, such as Europe/Berlin."
    )
    start: AwareDatetime | None = Field(
        default=None,
        description="No logical date before this (a time with its UTC offset). Absent: since a scheduler first saw it.",
    )
    end: AwareDatetime | None = Field(default=None, description="No logical date after this.")
    catchup: bool = Field(
        default=False,
        description="When several dates are due at once: run all of them, oldest first (true), or only the newest (false).",
    )

    @model_validator(mode="after")
    def _has_dates(self) -> "ScheduleSpec":
        if self.start is not None and self.end is not None and self.end < self.start:
            raise ValueError("end lies before start, so there is no date; correct one of them")
        return self

    @property
    def calendar(self) -> Calendar:
        return Calendar(self.cron, self.timezone)


class RetriesSpec(Section):
    """What becomes of a run, or one partition of it, that failed."""

    max: int = Field(default=2, ge=0, le=100, description="So many more attempts; each goes on where the last stopped.")
    delay: Duration = Field(default=300.0, description="Wait before the next (s, or 5m).")


class WaitSpec(Section):
    """One thing that must be there before a run starts: a marker object, or a listing that no longer changes."""

    marker: Url | None = Field(default=None, description="An object that is written when the input is complete.")
    stable: Url | None = Field(
        default=None, description="A folder or glob: it has files, and its listing stayed the same for a while."
    )
    unchanged_for: Duration = Field(default=600.0, description="That while (s, or 10m). Goes with stable.")

    @model_validator(mode="after")
    def _exactly_one(self) -> "WaitSpec":
        if (self.marker is None) == (self.stable is None):
            raise ValueError("give marker or stable, one of them")
        return self


class HookSpec(Section):
    """What is told of a run's end: an HTTP POST with a JSON body, or a command with the same JSON on its standard input."""

    webhook: PlainUrl | None = Field(default=None, description="http(s) address.")
    webhook_env: str | None = Field(
        default=None, description="Environment variable of the scheduler that holds the address, where it is a secret."
    )
    command: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Program and arguments, run where the scheduler runs. No shell."
    )
    timeout: Duration = Field(default=30.0, description="Of one try (s). There are four.")

    @property
    def id(self) -> str:
        """The same for the same hook, wherever it stands in the file."""
        return hashlib.sha256(self.model_dump_json(exclude={"timeout"}).encode()).hexdigest()[:16]

    @model_validator(mode="after")
    def _exactly_one(self) -> "HookSpec":
        if sum(value is not None for value in (self.webhook, self.webhook_env, self.command)) != 1:
            raise ValueError("give webhook, webhook_env or command, one of them")
        if self.webhook is not None and urlsplit(self.webhook).scheme not in ("http", "https"):
            raise ValueError("webhook is an http:// or https:// address; write one")
        return self


class StageInput(Section):
    """Rows of an earlier stage."""

    stage: Name = Field(description="The stage whose output is read; of the same partition.")
    filter: str | None = Field(
        default=None,
        description="One DuckDB SQL expression over the columns of that output, `{{ ... }}` put in as it stands; rows for "
        "which it isn't true stay behind.",
    )


class StageSpec(Section):
    """One job."""

    name: Name
    input: StageInput | None = Field(
        default=None, description="Read an earlier stage; its files are `{{ input }}` in the job."
    )
    job: dict[str, Any] = Field(description="A job spec, or the path of a file with one. Text may hold `{{ ... }}`.")


class RetentionSpec(Section):
    """Which outputs are deleted."""

    keep: int = Field(ge=1, le=400, description="Outputs of so many of the newest successful runs stay.")


class PipelineSpec(Section):
    """A whole pipeline."""

    name: Name
    state: PlainUrl = Field(description="Folder for the records of its runs, on a store with conditional writes.")
    schedule: ScheduleSpec
    partitions: dict[Name, Annotated[tuple[str, ...], Field(min_length=1)]] = Field(
        default={},
        description="Names with their values: each combination is a partition, with own attempts; `{{ name }}` in jobs.",
    )
    wait_for: tuple[WaitSpec, ...] = Field(default=(), description="What must have arrived before a run starts.")
    wait_deadline: Duration = Field(
        default=6 * 3600.0, description="The run fails when it has not arrived so long after the run began (s, or 6h)."
    )
    max_active_runs: int = Field(
        default=1, ge=1, le=1000, description="Runs begun and not ended, those that wait for their input included."
    )
    max_active_partitions: int = Field(
        default=1, ge=1, le=1000, description="Partitions of one run that are at work at the same time."
    )
    retries: RetriesSpec = RetriesSpec()
    deadline: Duration | None = Field(
        default=None,
        description="A run fails when it has not ended so long after it began, all its attempts (s, or 10h).",
    )
    max_gpu_hours: float | None = Field(
        default=None, gt=0, description="Of one run: all its stages, partitions and attempts (GPU-hours)."
    )
    stages: tuple[StageSpec, ...] = Field(min_length=1)
    publish: PlainUrl | None = Field(
        default=None, description="Folder for latest.json and dates/KEY.json, which name the outputs of whole runs."
    )
    retention: RetentionSpec | None = None
    on_success: tuple[HookSpec, ...] = ()
    on_failure: tuple[HookSpec, ...] = ()

    def list_hooks(self, is_success: bool) -> tuple[HookSpec, ...]:
        return self.on_success if is_success else self.on_failure
