"""The part of the sampling section that holds answers to a form: a JSON schema, a regular expression or a grammar. Pure.

A schema is kept as compact JSON text, however it was written, and is checked against the standard that it names, so that
no engine meets a broken one. Regex and grammar are dialects of the engines: only they can tell whether one is good.
"""

import json
from functools import lru_cache
from typing import Any

from pydantic import Field, field_validator, model_validator

from batchgen.sections import GuidedForm, Section

FORMS: tuple[GuidedForm, ...] = ("json_schema", "regex", "grammar")


class GuidedSpec(Section):
    """What every answer is held to. Exactly one of json_schema, regex and grammar is given."""

    json_schema: dict[str, Any] | str | None = Field(
        default=None, description="Answers are JSON of this schema: a mapping, or the same as JSON text."
    )
    regex: str | None = Field(default=None, min_length=1, description="Answers match this, in the engine's dialect.")
    grammar: str | None = Field(default=None, min_length=1, description="Answers are of this grammar (EBNF).")

    @field_validator("json_schema", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return value if value is None else make_schema_text(value)

    @model_validator(mode="after")
    def _exactly_one(self) -> "GuidedSpec":
        given = [name for name in FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(FORMS)}; found {' and '.join(given) or 'none'}")
        return self

    @property
    def form(self) -> GuidedForm:
        """Which of them it is."""
        return next(name for name in FORMS if getattr(self, name) is not None)


def make_schema_text(value: Any) -> str:
    """The schema as compact JSON text, keys in the order given: answers follow it. Raises ValueError."""
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError):
        raise ValueError("is not JSON; write a JSON Schema, as a mapping or as JSON text") from None
    if not isinstance(schema, dict):
        raise ValueError("must be a JSON Schema object, as in {type: object}")
    if (fault := find_fault(text)) is not None:
        raise ValueError(fault)
    return text


# Most jobs have one schema for all of their rows, and checking takes a millisecond.
@lru_cache(maxsize=256)
def find_fault(text: str) -> str | None:
    """What is wrong with a schema, by the standard that its `$schema` names, else that of 2020-12; None if nothing.
    Names keywords of the standard only: all else in it is the row's own."""
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for

    schema = json.loads(text)
    named = isinstance(schema.get("$schema"), str)
    validator = validator_for(schema, default=Draft202012Validator) if named else Draft202012Validator
    try:
        validator.check_schema(schema)
    except SchemaError as error:
        keywords = [part for part in error.absolute_path if isinstance(part, str) and part in validator.VALIDATORS]
        return f"is no valid JSON Schema: what stands under '{keywords[-1] if keywords else '$'}' is wrong; mend that"
    except RecursionError:
        return "is nested too deeply"
    return None
