"""The `gates` section of a spec: when a run stops early, or ends without `_SUCCESS`, for what its rows are. Pure.

Every rate is a share of the rows looked at, errors among them. A limit that is not given is not looked at.
"""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from batchgen.specs.patterns import find_pattern_fault
from batchgen.specs.sampling import make_schema_text
from batchgen.specs.sections import Section

Rate = Annotated[float, Field(ge=0, le=1)]


class RateLimits(Section):
    """What both gates may look at."""

    max_error_rate: Rate | None = Field(default=None, description="Share of error rows.")
    max_truncation_rate: Rate | None = Field(default=None, description="Share of answers cut off by max_tokens.")
    max_refusal_rate: Rate | None = Field(
        default=None, description="Share of answers that match one of gates.refusals."
    )
    max_schema_failure_rate: Rate | None = Field(
        default=None, description="Share of answers that are no JSON of the schema (gates.json_schema)."
    )


class CanaryGate(RateLimits):
    """Looked at when the first rows of the job are done; they go first. The run stops where one is exceeded."""

    rows: int = Field(default=500, ge=1, le=1_000_000, description="How many input rows, from the first (rows).")


class FinalGate(RateLimits):
    """Looked at when every row is done, before `_SUCCESS`."""

    min_rows_ok: int | None = Field(default=None, ge=0, description="Generations there must be at least (output rows).")
    min_mean_tokens: float | None = Field(default=None, ge=0, description="Mean completion, at least (tokens).")
    max_mean_tokens: float | None = Field(default=None, ge=0, description="Mean completion, at most (tokens).")
    min_p50_tokens: float | None = Field(
        default=None, ge=0, description="Median completion, at least (tokens); p50 and p99 are known to a tenth."
    )
    max_p99_tokens: float | None = Field(
        default=None, ge=0, description="Completion that 99 of 100 answers don't exceed, at most (tokens)."
    )
    max_duplicate_rate: Rate | None = Field(
        default=None, description="Share of answers whose text another answer has, too, each text's first not counted."
    )


class GatesSpec(Section):
    """Limits that fail a run (exit code 4) whose command did all it was asked."""

    canary: CanaryGate | None = Field(default=None, description="Absent: none.")
    final: FinalGate | None = Field(default=None, description="Absent: none.")
    refusals: tuple[str, ...] = Field(
        default=(),
        description="Regular expressions (RE2's, searched anywhere in the text): what a refusal looks like.",
    )
    json_schema: dict[str, Any] | str | None = Field(
        default=None, description="What answers must be. Absent: sampling.guided.json_schema."
    )

    @field_validator("json_schema", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return value if value is None else make_schema_text(value)

    @field_validator("refusals")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for number, pattern in enumerate(patterns):
            if (fault := find_pattern_fault(pattern)) is not None:
                raise ValueError(f"number {number} {fault}; mend it")
        return patterns

    @model_validator(mode="after")
    def _has_refusals(self) -> "GatesSpec":
        if not self.refusals and any(gate.max_refusal_rate is not None for gate in self.gates):
            raise ValueError("max_refusal_rate goes by refusals, and there are none; give what a refusal looks like")
        return self

    @property
    def gates(self) -> tuple[RateLimits, ...]:
        return tuple(gate for gate in (self.canary, self.final) if gate is not None)

    @property
    def wants_texts(self) -> bool:
        """Are texts compared with each other?"""
        return self.final is not None and self.final.max_duplicate_rate is not None

    @property
    def wants_schema(self) -> bool:
        return any(gate.max_schema_failure_rate is not None for gate in self.gates)
