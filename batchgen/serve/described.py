"""The two interactive routes in the OpenAPI description: what a body may hold, and what comes back. Pure.

`bodies` decides what a field means and refuses in its own words; nothing is parsed by these. A test holds them against each
other: every field that is known there stands here, and every answer fits.
"""

from typing import Any, Literal

from batchgen.serve.wire import Json, Wire

NUMBER, WHOLE, TEXT, FLAG = {"type": "number"}, {"type": "integer"}, {"type": "string"}, {"type": "boolean"}
PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": TEXT},
    "required": ["type", "text"],
}
MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "minLength": 1},
        "content": {"anyOf": [TEXT, {"type": "array", "items": PART}, {"type": "null"}]},
    },
    "required": ["role"],
}
TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": TEXT, "description": TEXT, "parameters": {"type": "object"}},
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
FORMAT = {
    "type": "object",
    "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": {"type": "object"}},
    "required": ["type"],
}
TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
PROMPT = {"type": "string", "minLength": 1}
COMMON: Json = {
    "model": TEXT,
    "n": {"type": "integer", "minimum": 1},
    "stop": {"anyOf": [PROMPT, {"type": "array", "items": PROMPT, "maxItems": 16}]},
    "max_tokens": {"type": "integer", "minimum": 1},
    "temperature": {"type": "number", "minimum": 0, "maximum": 5},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": WHOLE,
    "min_p": NUMBER,
    "seed": WHOLE,
    "stop_token_ids": {"type": "array", "items": WHOLE},
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "repetition_penalty": NUMBER,
    "logit_bias": {"type": "object"},
    "stream": FLAG,
    "stream_options": {"type": "object", "properties": {"include_usage": FLAG}},
    "user": TEXT,
    "metadata": {"type": "object"},
    "store": FLAG,
    "service_tier": TEXT,
    "safety_identifier": TEXT,
    "prompt_cache_key": TEXT,
    "prompt_cache_retention": TEXT,
}
CHAT_FIELDS: Json = {
    **COMMON,
    "messages": {"type": "array", "items": MESSAGE, "minItems": 1},
    "max_completion_tokens": {"type": "integer", "minimum": 1},
    "logprobs": FLAG,
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
    "tools": {"type": "array", "items": TOOL},
    "tool_choice": {"enum": ["none", "auto"]},
    "parallel_tool_calls": FLAG,
    "response_format": FORMAT,
    "chat_template_kwargs": {"type": "object", "properties": {"thinking": FLAG, "enable_thinking": FLAG}},
    "reasoning_effort": TEXT,
    "modalities": {"type": "array", "items": TEXT},
    "functions": {"type": "array"},
    "function_call": TEXT,
}
TEXT_FIELDS: Json = {
    **COMMON,
    "prompt": {
        "anyOf": [
            PROMPT,
            TOKEN_IDS,
            {"type": "array", "items": PROMPT, "minItems": 1},
            {"type": "array", "items": TOKEN_IDS, "minItems": 1},
        ]
    },
    "logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
    "echo": FLAG,
    "suffix": TEXT,
    "best_of": {"type": "integer", "minimum": 1},
}


def describe_body(fields: Json, *required: str) -> Json:
    """For `openapi_extra`. A field that is null counts as left out."""
    optional = {
        name: field if name in required else {"anyOf": [field, {"type": "null"}]} for name, field in fields.items()
    }
    schema = {"type": "object", "properties": optional, "required": list(required), "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


# ---- answers


class PromptDetails(Wire):
    cached_tokens: int


class Usage(Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class FunctionCall(Wire):
    name: str
    arguments: str


class ToolCall(Wire):
    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(Wire):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class TokenLogprob(Wire):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Wire):
    content: list[ContentLogprob]


class ChatChoice(Wire):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str


class TextLogprobs(Wire):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Wire):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str


class ChatCompletion(Wire):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None


class Completion(Wire):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None


EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}
CHAT_ROUTE: dict[str, Any] = {
    "openapi_extra": describe_body(CHAT_FIELDS, "model", "messages"),
    "responses": {200: {"model": ChatCompletion, "content": EVENTS}},
}
TEXT_ROUTE: dict[str, Any] = {
    "openapi_extra": describe_body(TEXT_FIELDS, "model", "prompt"),
    "responses": {200: {"model": Completion, "content": EVENTS}},
}
