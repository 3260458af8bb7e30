"""Is a text JSON of a schema? In time that its length bounds: patterns are RE2's (`specs.patterns`); nothing is fetched."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from batchgen.specs.patterns import is_match

Test = Callable[[str], bool]


def make_schema_test(schema: str) -> Test:
    """`schema`: as JSON text, without a fault (`sampling.find_fault`, `patterns.find_schema_fault`)."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend, validator_for
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import EMPTY_REGISTRY

    parsed = json.loads(schema)
    bounded = extend(
        validator_for(parsed, default=Draft202012Validator),
        {"pattern": _pattern, "patternProperties": _pattern_properties, "additionalProperties": _additional_properties},
    )
    # With nothing at hand but itself: an address in a `$ref` is never fetched.
    validator = bounded(parsed, registry=EMPTY_REGISTRY)

    def is_fit(text: str) -> bool:
        try:
            return bool(validator.is_valid(json.loads(text)))
        except (ValueError, RecursionError):  # no JSON, or nested beyond what Python reads
            return False
        except Unresolvable:  # a `$ref` that leads nowhere: nothing is of such a schema
            return False

    return is_fit


# ---- keywords, as jsonschema calls them: (validator, the keyword's value, instance, schema) -> errors -------------------


def _pattern(validator: Any, pattern: str, instance: Any, _: Any) -> Iterator[Exception]:
    if validator.is_type(instance, "string") and not is_match(pattern, instance):
        yield _misfit()


def _pattern_properties(validator: Any, by_pattern: dict[str, Any], instance: Any, _: Any) -> Iterator[Exception]:
    if validator.is_type(instance, "object"):
        for pattern, part in by_pattern.items():
            for name in (name for name in instance if is_match(pattern, name)):
                yield from validator.descend(instance[name], part)


def _additional_properties(validator: Any, rest: Any, instance: Any, schema: Any) -> Iterator[Exception]:
    if validator.is_type(instance, "object"):
        known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        for name in (name for name in instance if name not in known):
            if not any(is_match(pattern, name) for pattern in patterns):
                yield from validator.descend(instance[name], rest)


def _misfit() -> Exception:
    from jsonschema import ValidationError

    error: Exception = ValidationError("is not of its schema")
    return error
