"""Regular expressions that are looked for in answers: RE2's, whose time grows with the text's length and no faster. Pure.

Python's own may take hours over a text that almost matches, and hold the whole process meanwhile. RE2 knows no lookaround
and no back-reference: a pattern with one is refused before anything starts.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

# Of a schema's keywords those that jsonschema looks at with Python's own engine, whatever we put in its place.
UNBOUNDED = {"patternProperties", "unevaluatedProperties"}


def find_pattern_fault(pattern: str) -> str | None:
    """What is wrong with a pattern; None if nothing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        pc.match_substring_regex(pa.array([""]), pattern=pattern)
    except (pa.ArrowInvalid, UnicodeEncodeError) as error:
        told = str(error).removeprefix("Invalid regular expression: ").partition(":")[0]
        return f"is no regular expression of RE2 ({told}; lookaround and back-references are none)"
    return None


def match_any(texts: Any, patterns: Iterable[str]) -> Any:
    """For each text of an Arrow array: is any of the patterns found in it? False for null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pa.array([False] * len(texts), pa.bool_())
    for pattern in patterns:
        found = pc.or_(found, pc.fill_null(pc.match_substring_regex(texts, pattern=pattern), False))
    return found


def is_match(pattern: str, text: str) -> bool:
    """Is the pattern found in the text? JSON may hold half a surrogate, which Arrow can't."""
    import pyarrow as pa

    return bool(match_any(pa.array([text.encode(errors="replace").decode()]), [pattern])[0].as_py())


def find_schema_fault(schema: str) -> str | None:
    """What of a JSON Schema (its text) could not be looked at in bounded time; None if nothing. Names keywords of the
    standard only."""
    names: set[str] = set()
    for name, pattern in _iter_patterns(json.loads(schema), names):
        if find_pattern_fault(pattern) is not None:
            return (
                f"what stands under '{name}' is no regular expression of RE2 (lookaround and back-references are none)"
            )
    if names >= UNBOUNDED:
        return "patternProperties and unevaluatedProperties together are not looked at"
    return None


def _iter_patterns(schema: Any, names: set[str]) -> Iterator[tuple[str, str]]:
    """(keyword, pattern) of each pattern. `names`: takes in all keys."""
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            names.update(value)
            waiting += value.values()
            if isinstance(pattern := value.get("pattern"), str):
                yield "pattern", pattern
            if isinstance(by_pattern := value.get("patternProperties"), dict):
                yield from (("patternProperties", pattern) for pattern in by_pattern)
