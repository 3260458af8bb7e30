"""The `retry` section of a spec: what is tried again, and when it is enough. Pure."""

from typing import Literal

from pydantic import Field

from batchgen.specs.sections import Section


class RetrySpec(Section):
    """What is tried again, and when it is enough."""

    max_attempts: int = Field(default=4, ge=1, description="Tries of one request that fails retryably (tries).")
    backoff_s: float = Field(default=1.0, ge=0, description="First wait before a retry; doubles, with jitter (s).")
    max_backoff_s: float = Field(default=60.0, ge=0, description="Longest wait (s).")
    max_shard_attempts: int = Field(
        default=4,
        ge=1,
        description="Leases of one shard lost without progress before its missing rows become error rows (leases).",
    )
    request_timeout_s: float = Field(
        default=14_400.0,
        gt=0,
        description="A request that the engine has not answered after this is given up: an error row, which a later run "
        "tries again (s).",
    )
    max_deaths_alone: int = Field(
        default=2,
        ge=2,
        description="Engines that died with one row alone in flight before the row is quarantined; more where engines die "
        "of other things, too (engines).",
    )
    max_quarantined: int = Field(
        default=100,
        ge=0,
        description="Rows that kill engines and become error rows before the run stops, for then it is the engine (rows).",
    )
    max_start_failures: int = Field(
        default=3, ge=1, description="Workers in a row that fail to start before the run stops (workers)."
    )
    max_error_rate: float = Field(
        default=0.0, ge=0, le=1, description="Share of error rows up to which the job counts as a success."
    )
    errors: Literal["retryable", "all", "none"] = Field(
        default="retryable", description="Which error rows of an earlier run are generated again."
    )
