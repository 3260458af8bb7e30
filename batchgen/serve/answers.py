"""Finished rows become OpenAI's bodies, or errors with the HTTP status that says whose fault it was. Pure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from batchgen.records import Result
from batchgen.serve.wire import CHAT, Json

#: Error types of rows that are no fault of the request: worth another try by whoever sent it.
SERVER_FAULTS = frozenset({"worker_lost", "timed_out", "quarantined", "unreadable_input", "bad_answer"})
CONTEXT = "context_length_exceeded"


class Decode(Protocol):
    """`Tokenizer.decode`."""

    def __call__(self, token_ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class TokenFact:
    """One token's text, its logprob, and the likeliest ones (text, logprob)."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceResult:
    """One finished choice."""

    text: str
    reasoning: str | None
    tool_calls: str | None
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    logprobs: tuple[TokenFact, ...] | None = None


def from_result(result: Result, decode: Decode | None) -> ChoiceResult:
    """Of a generation as the worker has it."""
    answer = result.generation
    assert answer is not None, "a failure has no choice: make_row_error"
    logprobs = None
    if answer.logprobs is not None and decode is not None:
        logprobs = tuple(
            TokenFact(_name(t.token_id, decode), t.logprob, tuple((_name(id_, decode), p) for id_, p in t.top))
            for t in answer.logprobs
        )
    usage = answer.usage
    return ChoiceResult(
        result.text or "",
        result.reasoning,
        answer.tool_calls,
        answer.finish_reason,
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.cached_tokens,
        logprobs,
    )


def from_row(row: Json, decode: Decode | None) -> ChoiceResult:
    """Of a row of `data/*.parquet`."""
    logprobs = None
    if row.get("logprobs") is not None and decode is not None:
        logprobs = tuple(
            TokenFact(
                _name(token["token_id"], decode),
                token["logprob"],
                tuple((_name(top["token_id"], decode), top["logprob"]) for top in token["top"] or ()),
            )
            for token in row["logprobs"]
        )
    return ChoiceResult(
        row["text"] or "",
        row["reasoning"],
        row.get("tool_calls"),
        row["finish_reason"],
        row["prompt_tokens"],
        row["completion_tokens"],
        row["cached_tokens"],
        logprobs,
    )


def _name(token_id: int | None, decode: Decode) -> str:
    return "" if token_id is None else decode([token_id])


def make_body(
    endpoint: str, model: str, id_: str, created: int, choices: Sequence[ChoiceResult], num_prompts: int = 1
) -> Json:
    """A ChatCompletion, or a Completion. `num_prompts`: choices come prompt by prompt, as many of each; a prompt's tokens
    count once."""
    make = _make_chat_choice if endpoint == CHAT else _make_text_choice
    return {
        "id": f"{'chatcmpl' if endpoint == CHAT else 'cmpl'}-{id_}",
        "object": "chat.completion" if endpoint == CHAT else "text_completion",
        "created": created,
        "model": model,
        "choices": [make(number, choice) for number, choice in enumerate(choices)],
        "usage": make_usage(choices, num_prompts),
    }


def make_usage(choices: Sequence[ChoiceResult], num_prompts: int = 1) -> Json | None:
    """None where the engine did not count."""
    firsts = choices[:: max(1, len(choices) // num_prompts)]
    prompt = [choice.prompt_tokens for choice in firsts]
    made = [choice.completion_tokens for choice in choices]
    cached = [choice.cached_tokens for choice in firsts]
    if None in prompt or None in made:
        return None
    num_prompt, num_made = sum(p or 0 for p in prompt), sum(m or 0 for m in made)
    usage: Json = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_made,
        "total_tokens": num_prompt + num_made,
    }
    if None not in cached:
        usage["prompt_tokens_details"] = {"cached_tokens": sum(c or 0 for c in cached)}
    return usage


def _make_chat_choice(index: int, choice: ChoiceResult) -> Json:
    calls = json.loads(choice.tool_calls) if choice.tool_calls else None
    content = None if calls and not choice.text else choice.text
    message: Json = {"role": "assistant", "content": content, "refusal": None}
    if choice.reasoning is not None:
        message["reasoning_content"] = choice.reasoning
    if calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "logprobs": None if choice.logprobs is None else {"content": [_make_logprob(t) for t in choice.logprobs]},
        "finish_reason": choice.finish_reason,
    }


def _make_logprob(token: TokenFact) -> Json:
    return {
        **_make_token(token.text, token.logprob),
        "top_logprobs": [_make_token(text, logprob) for text, logprob in token.top],
    }


def _make_token(text: str, logprob: float) -> Json:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _make_text_choice(index: int, choice: ChoiceResult) -> Json:
    return {
        "index": index,
        "text": choice.text,
        "logprobs": None if choice.logprobs is None else _make_text_logprobs(choice.logprobs),
        "finish_reason": choice.finish_reason,
    }


def _make_text_logprobs(tokens: Sequence[TokenFact]) -> Json:
    offsets, position = [], 0
    for token in tokens:
        offsets.append(position)
        position += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(token.top) for token in tokens],
        "text_offset": offsets,
    }


def make_row_error(error_type: str, message: str, is_retryable: bool) -> tuple[int, dict[str, Any]]:
    """(HTTP status, OpenAI's error) of a failed row."""
    if error_type == "prompt_too_long":
        return 400, {"message": message, "type": "invalid_request_error", "param": None, "code": CONTEXT}
    if is_retryable or error_type in SERVER_FAULTS:
        return 500, {"message": message, "type": "server_error", "param": None, "code": error_type}
    return 400, {"message": message, "type": "invalid_request_error", "param": None, "code": error_type}
