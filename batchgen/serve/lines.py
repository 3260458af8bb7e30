"""The lines of a batch's input, one by one: is each a request of this batch? Pure; says which line and what is wrong.

A blank line is no request, wherever it stands; lines may end in CRLF, and the file in no newline at all. What is wrong
with a request's *body* is that row's own 400 later; what is wrong with the line fails the batch, before anything is run.
Messages name fields and never quote the file.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from batchgen.serve.wire import BatchError

MAX_KEY_CHARS = 512
PIECE_BYTES = 2**20
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """`number` counts from 1."""

    number: int
    custom_id: str
    body: dict[str, Any]


class LineTooLong(Exception):
    """A line goes on for longer than any may."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def split_lines(pieces: Iterable[bytes], max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(number, line without its end) of every line that is not blank. Raises LineTooLong."""
    rest, number = b"", 0
    for piece in _cut(pieces):
        *whole, rest = (rest + piece).split(b"\n")
        for raw in whole:
            number += 1
            if len(raw) > max_bytes:
                raise LineTooLong(number)
            if line := _strip(raw, number):
                yield number, line
        if len(rest) > max_bytes:
            raise LineTooLong(number + 1)
    if line := _strip(rest, number + 1):
        yield number + 1, line


def _cut(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Splitting a piece takes its size twice more: so small ones."""
    for piece in pieces:
        for start in range(0, len(piece), PIECE_BYTES):
            yield piece[start : start + PIECE_BYTES]


def _strip(raw: bytes, number: int) -> bytes:
    return (raw.removeprefix(BOM) if number == 1 else raw).strip(b" \t\r")


class LineCheck:
    """All lines of one batch in turn. `models`: the names that the endpoint serves."""

    def __init__(self, endpoint: str, models: Iterable[str]) -> None:
        self._endpoint, self._models = endpoint, frozenset(models)
        self._lines_of: dict[str, int] = {}
        self.model: str | None = None
        self.num_lines = 0

    def check(self, number: int, raw: bytes) -> Line | BatchError:
        self.num_lines += 1
        value = parse_object(raw)
        if value is None:
            return BatchError(code="invalid_json_line", message="This line is not a JSON object in UTF-8.", line=number)
        fault = self._find_fault(value, number)
        if fault is not None:
            param, code, message = fault
            return BatchError(code=code, message=message, line=number, param=param)
        self._lines_of[value["custom_id"]] = number
        self.model = self.model or value["body"]["model"]
        return Line(number, value["custom_id"], value["body"])

    def _find_fault(self, value: dict[str, Any], number: int) -> tuple[str, str, str] | None:
        """(param, code, message) of the first thing wrong."""
        del number
        key = value.get("custom_id")
        if key is None or key == "":
            return "custom_id", "missing_custom_id", "Each line needs a custom_id."
        if not isinstance(key, str) or len(key) > MAX_KEY_CHARS or not is_encodable(key):
            return "custom_id", "invalid_custom_id", f"custom_id must be text of at most {MAX_KEY_CHARS} characters."
        if key in self._lines_of:
            return "custom_id", "duplicate_custom_id", f"Line {self._lines_of[key]} has the same custom_id."
        if value.get("method") != "POST":
            return "method", "invalid_method", "method must be POST."
        if value.get("url") != self._endpoint:
            return "url", "invalid_url", f"url must be the batch's endpoint, {self._endpoint}."
        body = value.get("body")
        if not isinstance(body, dict):
            return "body", "invalid_body", "body must be a JSON object."
        return self._find_model_fault(body.get("model"))

    def _find_model_fault(self, model: object) -> tuple[str, str, str] | None:
        if not isinstance(model, str) or not model:
            return "body.model", "missing_model", "The body needs a model."
        if self.model is not None and model != self.model:
            return "body.model", "mismatched_model", "All lines of a batch must have the same model."
        if model not in self._models:
            return (
                "body.model",
                "model_not_found",
                "This model is not served here; GET /v1/models lists those that are.",
            )
        return None


def parse_object(raw: bytes) -> dict[str, Any] | None:
    """The JSON object, by the standard: NaN and Infinity are no JSON. None for anything else."""
    try:
        value = json.loads(raw.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse(_: str) -> None:
    raise ValueError("no JSON")


def is_encodable(text: str) -> bool:
    """JSON escapes can smuggle in half of a surrogate pair, which no UTF-8 file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
