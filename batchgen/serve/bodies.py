"""An OpenAI body becomes rows of a job: one for each choice of each prompt. Pure; shared by batches and by whoever answers
at once.

What a field means is decided here, once. A field that the engine can't honour, that is unknown, or whose value is out of
range is a 400 that names it (`ApiError`, with `param`): nothing is dropped silently but what has no bearing on the answer.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from batchgen.errors import BadRow
from batchgen.prompt import make_messages, make_tools
from batchgen.serve.batch_spec import PROMPT_COLUMNS
from batchgen.serve.body_sampling import SAMPLED, UNSUPPORTED, Abilities, read_sampling
from batchgen.serve.errors import ApiError, bad_request
from batchgen.serve.lines import is_encodable
from batchgen.serve.wire import CHAT, Json
from batchgen.specs.sections import PromptForm

# No bearing on what is generated.
INERT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options"}
INERT |= {"prompt_cache_retention"}
COMMON = {"model", "n", "stop", "max_tokens", "logprobs", "stream", "logit_bias", *SAMPLED}
ONLY_CHAT = {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"}
ONLY_CHAT |= {"response_format", "chat_template_kwargs", "reasoning_effort", "modalities", "functions", "function_call"}
ONLY_TEXT = {"prompt", "echo", "suffix", "best_of"}
MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class Asked:
    """What a body asks. Each of `rows` has its form's prompt column, `sampling` and `tools` (JSON text or None); there
    are `num_samples` for each prompt, side by side."""

    form: PromptForm
    rows: tuple[dict[str, Any], ...]
    has_tools: bool
    is_stream: bool
    includes_usage: bool
    num_samples: int = 1


def read_body(endpoint: str, body: Json, can: Abilities) -> Asked:
    """Raises ApiError (400)."""
    _check_depth(body)
    given = {name: value for name, value in body.items() if value is not None}
    is_chat = endpoint == CHAT
    _check_fields(given, is_chat)
    if not is_encodable(json.dumps(given, ensure_ascii=False)):
        raise bad_request("the body holds half of a surrogate pair, which is no text", code="invalid_utf8")
    sampling = read_sampling(given, is_chat, can)
    tools = _read_tools(given, can) if is_chat else None
    form, prompts = _read_messages(given) if is_chat else _read_prompts(given)
    if form not in can.forms:
        raise bad_request(
            f"this model takes no {form.replace('_', ' ')} here", PROMPT_PARAMS[form], "unsupported_value"
        )
    num = _read_count(given, is_chat, can, len(prompts))
    shared = {"sampling": json.dumps(sampling) if sampling else None, "tools": tools}
    rows = tuple({PROMPT_COLUMNS[form]: prompt, **shared} for prompt in prompts for _ in range(num))
    options = given.get("stream_options")
    includes_usage = isinstance(options, Mapping) and options.get("include_usage") is True
    return Asked(form, rows, tools is not None, given.get("stream") is True, includes_usage, num)


def _check_depth(body: Json) -> None:
    """JSON may be nested as deep as Python's stack goes, and whoever walks through it then ends in a RecursionError."""
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return
    raise bad_request(f"the body is nested more than {MAX_DEPTH} levels deep", None, "invalid_value")


PROMPT_PARAMS: dict[PromptForm, str] = {"messages": "messages", "text": "prompt", "token_ids": "prompt"}


def _check_fields(given: Json, is_chat: bool) -> None:
    known = COMMON | INERT | (ONLY_CHAT if is_chat else ONLY_TEXT)
    for name in given:
        if name not in known:
            shown = name if name.isidentifier() and len(name) <= 64 else "a field"
            raise bad_request(f"Unknown parameter: {shown}", shown, "unknown_parameter")
    for name, is_fine in FIXED.items():
        if name in given and not is_fine(given[name]):
            raise bad_request(f"{name} can't be honoured with this value", name, "unsupported_value")


# Fields that are understood, and taken with the value that changes nothing only.
FIXED: dict[str, Callable[[Any], bool]] = {
    "logit_bias": lambda value: value == {},
    "parallel_tool_calls": lambda value: value is True,
    "modalities": lambda value: value == ["text"],
    "functions": lambda value: value == [],
    "function_call": lambda value: value in ("none", "auto"),
    "reasoning_effort": lambda value: value == "none",
    "echo": lambda value: value is False,
    "suffix": lambda value: value == "",
    "stream": lambda value: isinstance(value, bool),
    "stream_options": lambda value: isinstance(value, dict),
}


def _read_count(given: Json, is_chat: bool, can: Abilities, num_prompts: int) -> int:
    num = given.get("n", 1)
    if isinstance(num, bool) or not isinstance(num, int) or num < 1:
        raise bad_request("n must be a number of at least 1", "n", "invalid_value")
    if num * num_prompts > can.max_choices:
        raise bad_request(f"n times prompts may be {can.max_choices} at most", "n", "invalid_value")
    if not is_chat and given.get("best_of", num) != num:
        raise bad_request("best_of can't be honoured; leave it out", "best_of", UNSUPPORTED)
    return num


# ---- prompts ---------------------------------------------------------------------------------------------------------


def _read_tools(given: Json, can: Abilities) -> str | None:
    choice, tools = given.get("tool_choice"), given.get("tools")
    if tools is None or tools == []:
        if choice not in (None, "none", "auto"):
            raise bad_request("tool_choice needs tools", "tool_choice", "invalid_value")
        return None
    if choice not in (None, "auto", "none"):
        raise bad_request(
            "tool_choice must be auto or none: no engine here can be held to a call", "tool_choice", UNSUPPORTED
        )
    try:
        make_tools(tools, "tools")
    except BadRow as error:
        raise bad_request(error.message.replace("column 'tools'", "tools"), "tools", error.error_type) from None
    if choice == "none":
        return None
    if not can.can_use_tools:
        raise bad_request("this model can't be shown tools here", "tools", UNSUPPORTED)
    return json.dumps(tools, ensure_ascii=False)


def _read_messages(given: Json) -> tuple[PromptForm, list[Any]]:
    messages = given.get("messages")
    if messages is None:
        raise bad_request("messages is required", "messages", "missing_required_parameter")
    if not isinstance(messages, list):
        raise bad_request("messages must be a list", "messages", "invalid_type")
    flat = [_flatten(message, number) for number, message in enumerate(messages)]
    try:
        make_messages(flat, "messages")
    except BadRow as error:
        raise bad_request(
            error.message.replace("column 'messages'", "messages"), "messages", error.error_type
        ) from None
    return "messages", [json.dumps(flat, ensure_ascii=False)]


def _flatten(message: Any, number: int) -> Any:
    """Content in parts becomes one text; a part that is no text can't be shown to the model."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            told = f"messages[{number}].content may have parts of type text only"
            raise bad_request(told, "messages", "unsupported_value")
    return {**message, "content": "".join(part["text"] for part in content)}


def _read_prompts(given: Json) -> tuple[PromptForm, list[Any]]:
    prompt = given.get("prompt")
    if prompt is None:
        raise bad_request("prompt is required", "prompt", "missing_required_parameter")
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, str) and part for part in prompt):
            return "text", prompt
        if _are_token_ids(prompt):
            return "token_ids", [prompt]
        if all(_are_token_ids(part) for part in prompt):
            return "token_ids", prompt
    told = "prompt must be text that is not empty, token ids, or a list of either"
    raise bad_request(told, "prompt", "invalid_type")


def _are_token_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and set(map(type, value)) == {int}
        and 0 <= min(value) <= max(value) < 2**31
    )


def make_refusal(error: ApiError) -> str:
    """What a row keeps of its 400, as JSON text."""
    return json.dumps(error.make_body()["error"])
