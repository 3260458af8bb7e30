"""What a body says of sampling, and what a model can do of it. Pure: see `bodies`."""

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from batchgen.serve.errors import bad_request
from batchgen.serve.wire import Json
from batchgen.specs.sampling import SamplingSpec
from batchgen.specs.sections import GuidedForm, PromptForm

MAX_STOPS = 16
SAMPLED = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
NUMBERS = frozenset({*SAMPLED, "max_tokens"}) - {"stop_token_ids"}
UNSUPPORTED = "unsupported_parameter"
PARAMS = {"guided": "response_format", "thinking": "chat_template_kwargs"}


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


def read_sampling(given: Json, is_chat: bool, can: Abilities) -> Json:
    fields: Json = {name: given[name] for name in SAMPLED if name in given}
    names = {**PARAMS, **({"max_tokens": "max_completion_tokens"} if "max_completion_tokens" in given else {})}
    if (most := given.get("max_completion_tokens", given.get("max_tokens"))) is not None:
        fields["max_tokens"] = most
    if (stop := given.get("stop")) is not None:
        fields["stop"] = _read_stop(stop)
    if (logprobs := _read_logprobs(given, is_chat, can)) is not None:
        fields["logprobs"] = logprobs
    if is_chat:
        fields |= _read_guided(given, can) | _read_thinking(given, can)
    for name in fields.keys() & can.refused:
        param = names.get(name, name)
        raise bad_request(f"{param} can't be honoured by this model", param, UNSUPPORTED)
    if not fields:
        return fields
    for name, value in fields.items():  # JSON's own kinds: pydantic would take true for 1 and "0.5" for a half
        if name in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            param = names.get(name, name)
            raise bad_request(f"{param} must be a number", param, "invalid_type")
    try:
        SamplingSpec.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "body"
        param = names.get(name, name)
        raise bad_request(f"{param}: {first['msg'].removeprefix('Value error, ')}", param, "invalid_value") from None
    return fields


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
