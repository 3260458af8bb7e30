"""An OpenAI body becomes rows of a job: one for each choice of each prompt. Pure; shared by batches and by whoever answers
at once.

What a field means is decided here, once. A field that the engine can't honour, that is unknown, or whose value is out of
range is a 400 that names it (`ApiError`, with `param`): nothing is dropped silently but what has no bearing on the answer.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from batchgen.errors import BadRow
from batchgen.prompt import make_messages, make_tools
from batchgen.serve.batch_spec import PROMPT_COLUMNS
from batchgen.serve.errors import ApiError, bad_request
from batchgen.serve.lines import is_encodable
from batchgen.serve.wire import CHAT, Json
from batchgen.specs.sampling import SamplingSpec
from batchgen.specs.sections import GuidedForm, PromptForm

MAX_STOPS = 16
# No bearing on what is generated.
INERT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options"}
INERT |= {"prompt_cache_retention"}
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids")
SAMPLED += ("presence_penalty", "frequency_penalty", "repetition_penalty")
COMMON = {"model", "n", "stop", "max_tokens", "logprobs", "stream", "logit_bias", *SAMPLED}
ONLY_CHAT = {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"}
ONLY_CHAT |= {"response_format", "chat_template_kwargs", "reasoning_effort", "modalities", "functions", "function_call"}
ONLY_TEXT = {"prompt", "echo", "suffix", "best_of"}


@dataclass(frozen=True, slots=True)
class Abilities:
    """What one served model can do of what a body may ask."""

    forms: frozenset[PromptForm]
    refused: frozenset[str]
    guided_forms: frozenset[GuidedForm]
    has_logprobs: bool
    can_use_tools: bool
    can_think: bool
    max_choices: int = 128


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
    given = {name: value for name, value in body.items() if value is not None}
    is_chat = endpoint == CHAT
    _check_fields(given, is_chat)
    if not is_encodable(json.dumps(given, ensure_ascii=False)):
        raise bad_request("the body holds half of a surrogate pair, which is no text", code="invalid_utf8")
    sampling = _read_sampling(given, is_chat, can)
    tools = _read_tools(given, can) if is_chat else None
    form, prompts = _read_messages(given) if is_chat else _read_prompts(given)
    if form not in can.forms:
        raise bad_request(f"this model takes no {form.replace('_', ' ')} here", PROMPT_PARAMS[form], "unsupported_value")
    num = _read_count(given, is_chat, can, len(prompts))
    shared = {"sampling": json.dumps(sampling) if sampling else None, "tools": tools}
    rows = tuple({PROMPT_COLUMNS[form]: prompt, **shared} for prompt in prompts for _ in range(num))
    options = given.get("stream_options")
    includes_usage = isinstance(options, Mapping) and options.get("include_usage") is True
    return Asked(form, rows, tools is not None, given.get("stream") is True, includes_usage, num)


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


# ---- sampling --------------------------------------------------------------------------------------------------------


def _read_sampling(given: Json, is_chat: bool, can: Abilities) -> Json:
    fields: Json = {name: given[name] for name in SAMPLED if name in given}
    if (most := given.get("max_completion_tokens", given.get("max_tokens"))) is not None:
        fields["max_tokens"] = most
    if (stop := given.get("stop")) is not None:
        fields["stop"] = _read_stop(stop)
    if (logprobs := _read_logprobs(given, is_chat, can)) is not None:
        fields["logprobs"] = logprobs
    if is_chat:
        fields |= _read_guided(given, can) | _read_thinking(given, can)
    for name in fields.keys() & can.refused:
        raise bad_request(f"{PARAMS.get(name, name)} can't be honoured by this model", PARAMS.get(name, name), UNSUPPORTED)
    if not fields:
        return fields
    for name, value in fields.items():  # JSON's own kinds: pydantic would take true for 1 and "0.5" for a half
        if name in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise bad_request(f"{name} must be a number", name, "invalid_type")
    try:
        SamplingSpec.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "body"
        param = PARAMS.get(name, name)
        raise bad_request(f"{param}: {first['msg'].removeprefix('Value error, ')}", param, "invalid_value") from None
    return fields


NUMBERS = frozenset({*SAMPLED, "max_tokens"}) - {"stop_token_ids"}
UNSUPPORTED = "unsupported_parameter"
PARAMS = {"guided": "response_format", "thinking": "chat_template_kwargs"}


def _read_stop(stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise bad_request(f"stop must be text, or a list of at most {MAX_STOPS} texts", "stop", "invalid_type")
    return stops


def _read_logprobs(given: Json, is_chat: bool, can: Abilities) -> int | None:
    value = given.get("logprobs")
    if is_chat:
        top = given.get("top_logprobs")
        if top is not None and value is not True:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs", "invalid_value")
        if value is None or value is False:
            return None
        if value is not True:
            raise bad_request("logprobs must be true or false", "logprobs", "invalid_type")
        value = 0 if top is None else top
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 20:
        name = "top_logprobs" if is_chat else "logprobs"
        raise bad_request(f"{name} must be a number from 0 to 20", name, "invalid_value")
    if not can.has_logprobs:
        raise bad_request("logprobs can't be had from this model here", "logprobs", UNSUPPORTED)
    return value


def _read_guided(given: Json, can: Abilities) -> Json:
    form = given.get("response_format")
    if form is None:
        return {}
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        schema: Any = {"type": "object"}
    elif kind == "json_schema":
        named = form.get("json_schema")
        schema = named.get("schema") if isinstance(named, dict) else None
        if not isinstance(schema, dict):
            where = "response_format.json_schema.schema"
            raise bad_request(f"{where} must be a JSON schema", "response_format", "invalid_type")
    else:
        told = "response_format.type must be text, json_object or json_schema"
        raise bad_request(told, "response_format", "invalid_value")
    if "guided" in can.refused or "json_schema" not in can.guided_forms:
        raise bad_request("this model can't hold answers to a schema here", "response_format", UNSUPPORTED)
    return {"guided": {"json_schema": schema}}


def _read_thinking(given: Json, can: Abilities) -> Json:
    kwargs = given.get("chat_template_kwargs")
    if kwargs is None:
        return {}
    known = {"thinking", "enable_thinking"}
    if not isinstance(kwargs, dict) or not kwargs.keys() <= known or len(set(map(str, kwargs.values()))) > 1:
        raise bad_request("chat_template_kwargs takes thinking: true or false", "chat_template_kwargs", "invalid_value")
    value = next(iter(kwargs.values()), False)
    if not isinstance(value, bool):
        raise bad_request("thinking must be true or false", "chat_template_kwargs", "invalid_type")
    if value and not can.can_think:
        raise bad_request("this model does not think apart from its answer", "chat_template_kwargs", UNSUPPORTED)
    return {"thinking": value}


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
        raise bad_request("tool_choice must be auto or none: no engine here can be held to a call", "tool_choice", UNSUPPORTED)
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
        raise bad_request(error.message.replace("column 'messages'", "messages"), "messages", error.error_type) from None
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
    return isinstance(value, list) and bool(value) and set(map(type, value)) == {int} and 0 <= min(value) <= max(value) < 2**31


def make_refusal(error: ApiError) -> str:
    """What a row keeps of its 400, as JSON text."""
    return json.dumps(error.make_body()["error"])
