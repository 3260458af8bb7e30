"""The `sampling` section of a spec: how tokens are drawn, and what answers are held to. Pure.

A schema is kept as compact JSON text, however it was written, and is checked against the standard that it names, so that
no engine meets a broken one. Regex and grammar are dialects of the engines: only they can tell whether one is good.
"""

import json
from functools import lru_cache
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from batchgen.specs.sections import GuidedForm, Section

FORMS: tuple[GuidedForm, ...] = ("json_schema", "regex", "grammar")
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
# Engines count in 32 bits or in floats, and one that meets a number of 400 digits ends, with all that is in flight.
MOST = 2**31


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


class SamplingSpec(Section):
    """How tokens are drawn. The defaults are those of the DeepSeek-V3.2 model card."""

    temperature: float = Field(default=1.0, ge=0.0, le=5.0, description="0 is greedy.")
    top_p: float = Field(default=0.95, gt=0.0, le=1.0, description="Nucleus mass.")
    max_tokens: int = Field(default=1024, ge=1, lt=MOST, description="Completion tokens at most (tokens).")
    top_k: int | None = Field(default=None, ge=1, lt=MOST, description="Keep the k likeliest tokens.")
    min_p: float | None = Field(
        default=None, ge=0.0, le=1.0, description="Keep tokens of at least this share of the best."
    )
    n: int = Field(default=1, ge=1, le=1024, description="Generations a row; sent as n requests with a shared prefix.")
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**63,
        description="Each request gets a seed made from this, its row and its sample, so that a rerun repeats.",
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="Strings that end a completion; not part of the text."
    )
    stop_token_ids: tuple[Annotated[int, Field(ge=0, lt=MOST)], ...] = Field(
        default=(), description="Token ids that end a completion."
    )
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0, description="As OpenAI's.")
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0, description="As OpenAI's.")
    repetition_penalty: float | None = Field(
        default=None, ge=0.01, le=10.0, description="As Hugging Face's; 1 is neutral."
    )
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Return each token's logprob and this many of the likeliest ones."
    )
    thinking: bool = Field(default=False, description="Ask the chat template for reasoning; kept in its own column.")
    guided: GuidedSpec | None = Field(default=None, description="Hold every answer to a JSON schema, regex or grammar.")


def make_schema_text(value: Any) -> str:
    """The schema as compact JSON text, keys in the order given: answers follow it. Raises ValueError."""
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError):
        raise ValueError("is not JSON; write a JSON Schema, as a mapping or as JSON text") from None
    if not isinstance(schema, dict):
        raise ValueError("must be a JSON Schema object; write it as in {type: object}")
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
        return _find_lost_reference(schema, str(validator.META_SCHEMA["$schema"]))
    except SchemaError as error:
        keywords = [part for part in error.absolute_path if isinstance(part, str) and part in validator.VALIDATORS]
        return f"is no valid JSON Schema: what stands under '{keywords[-1] if keywords else '$'}' is wrong; mend that"
    except RecursionError:
        return "is nested too deeply"


def _find_lost_reference(schema: dict[str, Any], standard: str) -> str | None:
    """A `$ref` that leads nowhere: to nothing in the schema, or to an address, for nothing is ever fetched."""
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import specification_with

    root = specification_with(standard).create_resource(schema)
    waiting = [(root, Registry().resolver_with_root(root))]
    while waiting:
        part, resolver = waiting.pop()
        for keyword in REFERENCES:
            target = part.contents.get(keyword) if isinstance(part.contents, dict) else None
            try:
                is_there = target is None or isinstance(resolver.lookup(target).contents, dict | bool)
            except (Unresolvable, ValueError, TypeError):  # no URL; a path through what has no members
                is_there = False
            if not is_there:
                return f"has a '{keyword}' that leads nowhere; put what it names under $defs"
        waiting += [(sub, resolver.in_subresource(sub)) for sub in part.subresources()]
    return None
