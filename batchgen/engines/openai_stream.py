"""A streamed answer put together: server-sent events in, the JSON that the same server sends unstreamed out. Pure.

`StreamedAnswer` takes the body's bytes as they come. A stream that ends before its finish_reason is an error, with
`[DONE]` or without: nothing else tells a whole answer from a cut one.
"""

from collections.abc import Iterator
from typing import Any

from batchgen.engines.openai_wire import parse_json
from batchgen.errors import RequestFailed

DONE = b"[DONE]"
# An event larger than this is no event.
MAX_EVENT_BYTES = 64 * 2**20


class StreamedAnswer:
    """See the module. `num_parts`: events that brought text; one token each, as a rule."""

    def __init__(self) -> None:
        self.num_parts = 0
        self.usage: Any = None
        self.error: Any = None
        self._rest = b""
        self._choice: dict[str, Any] = {}
        self._message: dict[str, Any] = {}

    def feed(self, data: bytes) -> None:
        """The next bytes of the body. Raises RequestFailed("bad_response") for what is no event stream."""
        for event in self._split(data):
            try:
                value = parse_json(event)
            except ValueError:
                raise RequestFailed("bad_response", "the server streamed an event that is not JSON") from None
            if not isinstance(value, dict):
                raise RequestFailed("bad_response", "the server streamed an event that is no object")
            self._add(value)

    def make_answer(self) -> dict[str, Any]:
        """As if it had not been streamed. Raises RequestFailed("bad_response") when the stream broke off."""
        if not self._choice.get("finish_reason"):
            raise RequestFailed("bad_response", "the server's stream broke off before the answer's end")
        choice = {**self._choice, **({"message": self._message} if self._message else {})}
        return {"choices": [choice], "usage": self.usage}

    def _split(self, data: bytes) -> Iterator[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise RequestFailed("bad_response", "the server streamed an event without an end")
        for line in lines:
            name, _, value = line.strip().partition(b":")
            if name == b"data" and value.strip() not in (b"", DONE):
                yield value

    def _add(self, event: dict[str, Any]) -> None:
        self.error = event.get("error") or self.error
        self.usage = event.get("usage") or self.usage
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else []:
            if isinstance(choice, dict):
                self._add_choice(choice)

    def _add_choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta")
        self._choice["finish_reason"] = choice.get("finish_reason") or self._choice.get("finish_reason")
        size = count_text(self._choice) + count_text(self._message)
        append(self._choice, {name: choice[name] for name in ("text", "token_ids", "logprobs") if name in choice})
        if isinstance(delta, dict):
            self._message.setdefault("content", None)
            append(self._message, {name: value for name, value in delta.items() if name not in ("role", "tool_calls")})
            add_tool_calls(self._message, delta.get("tool_calls"))
        self.num_parts += count_text(self._choice) + count_text(self._message) > size


def count_text(fields: dict[str, Any]) -> int:
    return sum(len(value) for value in fields.values() if isinstance(value, str))


def append(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Text and lists grow, objects within grow likewise, anything else is replaced; null adds nothing."""
    for name, value in part.items():
        old = whole.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            append(old, value)
        elif isinstance(old, str) and isinstance(value, str):
            whole[name] = old + value
        elif isinstance(old, list) and isinstance(value, list):
            old.extend(value)
        elif value is not None:
            whole[name] = value


def add_tool_calls(message: dict[str, Any], parts: Any) -> None:
    """Calls come in pieces, each with its call's index: only the arguments are cut, all else comes once."""
    for part in parts if isinstance(parts, list) else []:
        calls: list[dict[str, Any]] = message.setdefault("tool_calls", [])
        index = part.get("index", len(calls)) if isinstance(part, dict) else None
        if not isinstance(index, int) or not 0 <= index <= len(calls):
            raise RequestFailed("bad_response", "the server streamed a tool call out of order")
        if index == len(calls):
            calls.append({})
        call, function = calls[index], part.get("function") or {}
        call |= {name: value for name, value in part.items() if name not in ("index", "function") and value is not None}
        append(call.setdefault("function", {}), {"arguments": function.get("arguments")})
        if function.get("name"):
            call["function"]["name"] = function["name"]
