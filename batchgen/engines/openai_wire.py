"""OpenAI's chat and completions APIs as JSON: a request becomes a body, an answer becomes a `Generation`. Pure.

Bodies carry OpenAI's fields, and for what OpenAI has not the names that vLLM, SGLang and trtllm-serve share (top_k,
min_p, repetition_penalty, stop_token_ids, chat_template_kwargs). Answers are checked against the models below; whatever
does not fit raises RequestFailed("bad_response"), and no message of ours quotes an answer. An answer that the server
cut short for its own reasons is a failure, never a short generation.
"""

import json
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from batchgen.errors import RequestFailed, RequestRejected
from batchgen.records import Generation, Guided, Prompt, Request, SamplingParams, TokenLogprob, Usage
from batchgen.specs.engine import OpenAIEngineSpec

# Finish reasons of vLLM, SGLang and TensorRT-LLM for answers that ended because the server did.
CUT_SHORT = {"abort", "error", "cancelled", "timeout"}
THINK_END = "</think>"
TOKEN_ID = "token_id:"
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Wire(BaseModel):
    """Servers add fields as they like."""

    model_config = ConfigDict(extra="ignore")


class WireLogprob(Wire):
    token: str
    logprob: float
    top_logprobs: list["WireLogprob"] = []


class ChatLogprobs(Wire):
    content: list[WireLogprob] | None = None


class TextLogprobs(Wire):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float] | None] | None = None


class Message(Wire):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class Choice(Wire):
    """`message` of the chat API, `text` of the other; `token_ids` is vLLM's (extra_body {return_token_ids: true})."""

    finish_reason: str | None = None
    message: Message | None = None
    text: str | None = None
    logprobs: dict[str, Any] | None = None
    token_ids: list[int] | None = None


class PromptDetails(Wire):
    cached_tokens: int | None = None


class WireUsage(Wire):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class Answer(Wire):
    choices: list[Choice] = Field(min_length=1)
    usage: WireUsage | None = None


# ---- out -------------------------------------------------------------------------------------------------------------


def make_body(request: Request, model: str, spec: OpenAIEngineSpec) -> bytes:
    """The JSON of one request."""
    is_chat = spec.api == "chat"
    body = {
        "model": model,
        **make_prompt_fields(request, is_chat),
        **make_sampling_fields(request.sampling, is_chat),
        **make_guided_fields(request.sampling.guided),
        **({"stream": True, "stream_options": {"include_usage": True}} if spec.measure_ttft else {}),
        **spec.extra_body,
    }
    return json.dumps({name: value for name, value in body.items() if value is not None}, default=str).encode()


def make_prompt_fields(request: Request, is_chat: bool) -> dict[str, Any]:
    prompt = request.prompt or Prompt(token_ids=request.ids)
    if is_chat:
        return {"messages": prompt.messages, "tools": prompt.tools}
    return {"prompt": prompt.text if prompt.text is not None else prompt.token_ids}


def make_sampling_fields(sampling: SamplingParams, is_chat: bool) -> dict[str, Any]:
    """None stands for a field that is left out."""
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "seed": sampling.seed,
        "stop": sampling.stop or None,
        "stop_token_ids": sampling.stop_token_ids or None,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
    }
    if not is_chat:
        return {**fields, "logprobs": sampling.logprobs}
    if sampling.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    if sampling.thinking:
        # DeepSeek's templates read `thinking`, Qwen's `enable_thinking`. Not sent otherwise: OpenAI knows no such field.
        fields["chat_template_kwargs"] = {"thinking": True, "enable_thinking": True}
    return fields


def make_guided_fields(guided: Guided | None) -> dict[str, Any]:
    """OpenAI's field for a schema. Raises RequestRejected for a regex or a grammar, which no field of its API takes."""
    if guided is None:
        return {}
    if guided.json_schema is None:
        raise RequestRejected("bad_sampling", "OpenAI's API takes a JSON schema, and no regex or grammar")
    schema = {"name": "answer", "schema": json.loads(guided.json_schema), "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


# ---- in --------------------------------------------------------------------------------------------------------------


def parse_json(data: bytes) -> Any:
    """The value of a body. Raises ValueError. Half of a surrogate pair, which no UTF-8 file takes, becomes U+FFFD."""
    value = json.loads(data)
    if SURROGATE.search(data):
        text = json.dumps(value, ensure_ascii=False)
        value = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return value


def parse_answer(value: Any, request: Request, ttft_s: float | None) -> Generation:
    """The generation in an answer of either API. Raises RequestFailed("bad_response" or "cut_short")."""
    try:
        answer = Answer.model_validate(value)
        choice = answer.choices[0]
        logprobs = parse_logprobs(choice)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        # An unknown field's name could be text of the answer; names of ours are not.
        where = ".".join(str(part) for part in first["loc"]) if first["type"] == "missing" else first["type"]
        raise RequestFailed("bad_response", f"the server's answer is malformed ({where})") from None
    message = choice.message or Message(content=choice.text)
    if choice.message is None and choice.text is None:
        raise RequestFailed("bad_response", "the server's answer has neither message nor text")
    if not choice.finish_reason:
        raise RequestFailed("bad_response", "the server's answer has no finish_reason")
    if choice.finish_reason in CUT_SHORT:
        raise RequestFailed("cut_short", f"the server ended the answer early (finish_reason {choice.finish_reason})")
    text = message.content or message.refusal or ""
    return Generation(
        text=text,
        token_ids=None if choice.token_ids is None else tuple(choice.token_ids),
        finish_reason=choice.finish_reason,
        usage=parse_usage(answer.usage),
        ttft_s=ttft_s,
        logprobs=logprobs if request.sampling.logprobs is not None else None,
        # The completions API cuts nothing: what was thought is in the text, for us to cut.
        reasoning=find_reasoning(message, text, request, choice.finish_reason) if choice.message else None,
        tool_calls=json.dumps(message.tool_calls, ensure_ascii=False) if message.tool_calls else None,
    )


def find_reasoning(message: Message, text: str, request: Request, finish_reason: str) -> str | None:
    """What the server cut from the answer. None leaves the cutting to us: it has not done it, or there is none."""
    given = message.reasoning_content or message.reasoning
    if given or not request.sampling.thinking:
        return given or None
    # A server that parses reasoning says null where the model did not think; one that doesn't leaves the mark in.
    return None if THINK_END in text or finish_reason == "length" else ""


def parse_usage(usage: WireUsage | None) -> Usage:
    if usage is None:
        return Usage()
    details = usage.prompt_tokens_details
    return Usage(usage.prompt_tokens, usage.completion_tokens, details.cached_tokens if details else None)


def parse_logprobs(choice: Choice) -> tuple[TokenLogprob, ...] | None:
    """Of either API. Raises ValidationError."""
    if choice.logprobs is None:
        return None
    if "content" in choice.logprobs:
        tokens = ChatLogprobs.model_validate(choice.logprobs).content or []
        return tuple(make_logprob(t.token, t.logprob, [(x.token, x.logprob) for x in t.top_logprobs]) for t in tokens)
    found = TextLogprobs.model_validate(choice.logprobs)
    tops = found.top_logprobs or [None] * len(found.tokens)
    return tuple(
        make_logprob(token, logprob, list((top or {}).items()))
        for token, logprob, top in zip(found.tokens, found.token_logprobs, tops, strict=False)
    )


def make_logprob(token: str, logprob: float, top: list[tuple[str, float]]) -> TokenLogprob:
    return TokenLogprob(parse_token_id(token), logprob, tuple((parse_token_id(name), value) for name, value in top))


def parse_token_id(token: str) -> int | None:
    """vLLM writes token_id:17 when told to (return_tokens_as_token_ids); a token's text says nothing sure of its id."""
    number = token.removeprefix(TOKEN_ID)
    return int(number) if number != token and number.isdecimal() else None
