"""The `input` section of a spec: which rows, in which order, and which of them need not be generated. Pure."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from batchgen.specs.sections import Section, Url


class InputSpec(Section):
    """Which rows."""

    paths: Annotated[tuple[Url, ...], Field(min_length=1)] = Field(
        description="Parquet files, folders (searched recursively) or globs: local paths, s3:// or any fsspec URL. "
        "A single string is taken as a list of one."
    )
    custom_id: str | None = Field(
        default=None, description="Column with the user's key, text or integer. Made from file and row when absent."
    )
    passthrough: tuple[str, ...] = Field(default=(), description="Input columns copied to the output, types kept.")
    check_unique: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Refuse duplicate custom_id before the start. auto: scan up to 10 million rows; beyond that the "
        "report says 'not checked'.",
    )
    limit: int | None = Field(
        default=None, ge=1, description="Only the first N rows (rows). May be raised later: finished rows are kept."
    )
    length_hint: str | None = Field(
        default=None,
        description="Column with a row's expected completion (tokens): long rows start first. Wrong or null costs nothing "
        "but time at the end.",
    )
    length_prior: Url | None = Field(
        default=None,
        description="output.path of an earlier run over prompts like these: what it measured is expected where no hint is. "
        "Absent: in a pipeline what the same stage measured in the run before; the first of reuse_from that has measured "
        "any.",
    )
    length_template: str | None = Field(
        default=None,
        description="Column that names a row's template (its task), text or integer; one of passthrough. Lengths are "
        "measured for each template by itself, and expected of the next run's rows. Absent: all rows are of one.",
    )
    reuse_from: tuple[Url, ...] = Field(
        default=(),
        description="output.path of earlier runs: a row whose request is the same (model, rendered prompt, sampling) takes "
        "its generation from the first that has it. A single string is taken as a list of one.",
    )
    duplicates: Literal["auto", "copy", "generate"] = Field(
        default="auto",
        description="Rows that ask exactly the same: generated once a run and copied (copy), each by itself "
        "(generate); auto: copied where sampling is greedy.",
    )

    @model_validator(mode="after")
    def _copies_template(self) -> "InputSpec":
        if self.length_template is not None and self.length_template not in self.passthrough:
            raise ValueError("length_template names a column that the output must have; name it in passthrough, too")
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        single = [name for name in ("paths", "reuse_from") if isinstance(value.get(name), str)]
        return {**value, **{name: [value[name]] for name in single}}
