"""What a server's refusal means: a status, its headers and its body become one of our errors. Pure; by status and code,
never by text.

- 400, 413, 422 and every other 4xx without a line below: this row will never be taken.
- 401, 403, redirects: no row will. 404 and 405 too, until a server has answered once: after that it is a server that is
  being replaced (Dynamo forgets a model when its last worker goes).
- 429, 503: not taken. 408, 409, 425 and every other 5xx: taken, and failed.

The server's message may quote the prompt, or the key. It goes into a row's error, and so below OUT, and nowhere else.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from batchgen.engines.openai_wire import parse_json
from batchgen.errors import BatchgenError, EngineDied, EngineUnavailable, RequestFailed, RequestRejected

MAX_MESSAGE_CHARS = 500
# A server that asks for more than this is tried again all the same.
MAX_RETRY_AFTER_S = 600.0
RATE_LIMITED = "rate_limited"
# Codes that servers give a prompt which leaves no room in the context.
TOO_LONG = {"context_length_exceeded", "prompt_too_long"}
SYMBOL = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """What servers say of an error; a code or a type that is no symbol is dropped."""

    message: str
    symbols: tuple[str, ...] = ()


def parse_error_body(data: bytes) -> ErrorBody:
    """OpenAI nests it in `error`; older vLLM, SGLang and trtllm-serve don't; FastAPI says `detail`."""
    try:
        value = parse_json(data)
    except ValueError:
        return ErrorBody("no reason given")
    return make_error_body(value)


def make_error_body(value: Any) -> ErrorBody:
    nested = value.get("error", value) if isinstance(value, dict) else value
    if not isinstance(nested, dict):
        return ErrorBody(nested[:MAX_MESSAGE_CHARS] if isinstance(nested, str) else "no reason given")
    message = nested.get("message") or describe_detail(nested.get("detail"))
    given = [nested.get("code"), nested.get("type")]
    symbols = tuple(name for name in given if isinstance(name, str) and SYMBOL.fullmatch(name))
    return ErrorBody(message[:MAX_MESSAGE_CHARS] if isinstance(message, str) else "no reason given", symbols)


def describe_detail(detail: Any) -> str | None:
    """FastAPI's list of what is wrong with a body: its first entry, without the input that it repeats."""
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):
        return f"{'.'.join(str(part) for part in detail[0].get('loc', ()))}: {detail[0].get('msg')}"
    return detail if isinstance(detail, str) else None


def parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait, from `retry-after-ms` or `Retry-After` (seconds, or a date). `now` is Unix time. None: not said,
    or not understood."""
    milliseconds, said = parse_number(headers.get("retry-after-ms", "")), headers.get("Retry-After", "")
    seconds = parse_number(said) if milliseconds is None else milliseconds / 1000
    if seconds is None:
        try:
            seconds = parsedate_to_datetime(said).timestamp() - now
        except (ValueError, OverflowError):  # neither a number nor a date, or a date in no time zone there is
            return None
    return min(max(0.0, seconds), MAX_RETRY_AFTER_S)


def parse_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def make_error(
    status: int,
    body: ErrorBody,
    *,
    where: str,
    key_env: str,
    is_proven: bool,
    retry_after_s: float | None = None,
) -> BatchgenError:
    """The error for one answer that is none. `where`: the URL that was asked."""
    symbol = body.symbols[0] if body.symbols else f"http_{status}"
    said = f"{where} answered {status}" + (f" ({symbol})" if body.symbols else "")
    if status in (401, 403):
        return EngineDied(f"{said}: the server wants another API key; set {key_env} on every worker")
    if 300 <= status < 400:
        return EngineDied(f"{said}: it redirects; put the address that it points to into engine.base_urls")
    if status in (404, 405):
        if not is_proven:
            return EngineDied(f"{said}: no such API or model there; correct engine.base_urls or engine.model")
        return EngineUnavailable("not_found", said, retry_after_s)
    if status == 429:
        return EngineUnavailable(RATE_LIMITED, said, retry_after_s)
    if status == 503:
        return EngineUnavailable("unavailable", said, retry_after_s)
    if status in (408, 409, 425) or status >= 500:
        return RequestFailed(symbol, f"HTTP {status}: {body.message}", retry_after_s)
    if TOO_LONG.intersection(body.symbols):
        return RequestRejected("prompt_too_long", f"HTTP {status}: {body.message}")
    return RequestRejected(symbol, f"HTTP {status}: {body.message}")
