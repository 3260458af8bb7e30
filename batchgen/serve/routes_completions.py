"""`/v1/chat/completions` and `/v1/completions`, answered at once or streamed as server-sent events."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Body
from fastapi.responses import JSONResponse, Response, StreamingResponse

from batchgen.engines.base import Tokenizer
from batchgen.records import Failure, Result
from batchgen.serve.answers import ChoiceResult, from_result, make_body, make_row_error, make_usage
from batchgen.serve.bodies import Asked, read_body
from batchgen.serve.body_sampling import Abilities
from batchgen.serve.deltas import Delta
from batchgen.serve.described import CHAT_ROUTE, TEXT_ROUTE
from batchgen.serve.errors import ApiError, bad_request
from batchgen.serve.interactive import Ask
from batchgen.serve.wire import CHAT, COMPLETIONS, Json

RETRY_AFTER_S = 5
JsonBody = Annotated[dict[str, Any], Body()]


class Completer(Protocol):
    """Answers rows of a model. Raises ApiError."""

    async def answer(self, model: str, ask: Ask) -> list[Result]: ...

    def stream(self, model: str, ask: Ask) -> AsyncIterator[Delta | Result]: ...


def create_completions_router(
    completer: Completer, abilities: Mapping[str, Abilities], tokenizers: Mapping[str, Tokenizer | None]
) -> APIRouter:
    router = APIRouter()

    async def complete(endpoint: str, body: Json) -> Response:
        model = body.get("model")
        if not isinstance(model, str):
            raise bad_request("model is required, and must be text", "model", "missing_required_parameter")
        if model not in abilities:
            raise ApiError(404, "This model is not served here.", param="model", code="model_not_found")
        asked = read_body(endpoint, body, abilities[model])
        ask = Ask(asked.form, asked.rows, asked.has_tools, is_bulk=len(asked.rows) > asked.num_samples)
        tokenizer = tokenizers[model]
        answer = Answer(endpoint, model, asked, tokenizer)
        if not asked.is_stream:
            return JSONResponse(answer.make_whole(await completer.answer(model, ask)))
        events = answer.make_events(completer.stream(model, ask))
        first = await anext(events)  # what is refused is refused with its status, before the stream begins
        return StreamingResponse(join(first, events), media_type="text/event-stream")

    @router.post(CHAT, tags=["completions"], **CHAT_ROUTE)
    async def chat(body: JsonBody) -> Response:
        """OpenAI's chat completion; `stream: true` sends chunks."""
        return await complete(CHAT, body)

    @router.post(COMPLETIONS, tags=["completions"], **TEXT_ROUTE)
    async def text(body: JsonBody) -> Response:
        """OpenAI's completion; a list of prompts is answered in order."""
        return await complete(COMPLETIONS, body)

    return router


async def join(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for event in rest:
        yield event


class Answer:
    """One request's answer, whole or in chunks."""

    def __init__(self, endpoint: str, model: str, asked: Asked, tokenizer: Tokenizer | None) -> None:
        self._endpoint, self._model, self._asked = endpoint, model, asked
        self._decode = None if tokenizer is None else tokenizer.decode
        self._id, self._created = secrets.token_hex(12), int(time.time())
        self._num_prompts = max(1, len(asked.rows) // asked.num_samples)

    def make_whole(self, results: Sequence[Result]) -> Json:
        """Raises ApiError for the first row that failed."""
        choices = [self._read(result) for result in results]
        return make_body(self._endpoint, self._model, self._id, self._created, choices, self._num_prompts)

    async def make_events(self, stream: AsyncIterator[Delta | Result]) -> AsyncIterator[str]:
        """Server-sent events. An error after the first is an event of its own, and the last."""
        ends: dict[int, ChoiceResult] = {}
        has_begun = False
        try:
            async for news in stream:
                for chunk in self._make_pieces(news, ends):
                    yield make_event(chunk)
                    has_begun = True
        except ApiError as error:
            if not has_begun:
                raise
            yield make_event(error.make_body())
            return
        if self._asked.includes_usage:
            choices = [ends[number] for number in sorted(ends)]
            yield make_event(self._make_piece([], usage=make_usage(choices, self._num_prompts)))
        yield "data: [DONE]\n\n"

    def _make_pieces(self, news: Delta | Result, ends: dict[int, ChoiceResult]) -> list[Json]:
        if isinstance(news, Delta):
            return [self._make_piece([self._make_delta(news)])]
        choice = self._read(news)
        number = news.row_id.source_row
        ends[number] = choice
        return [self._make_piece([self._make_end(number, choice)])]

    def _read(self, result: Result) -> ChoiceResult:
        if (failure := result.failure) is not None:
            raise make_row_fault(failure)
        return from_result(result, self._decode)

    def _make_delta(self, delta: Delta) -> Json:
        if self._endpoint != CHAT:
            return {"index": delta.row, "text": delta.text, "logprobs": None, "finish_reason": None}
        fields: Json = {"role": "assistant"}
        if delta.text or not delta.reasoning:
            fields["content"] = delta.text
        if delta.reasoning:
            fields["reasoning_content"] = delta.reasoning
        return {"index": delta.row, "delta": fields, "logprobs": None, "finish_reason": None}

    def _make_end(self, number: int, choice: ChoiceResult) -> Json:
        """Without text, which went before; with what is known at the end only."""
        whole = make_body(self._endpoint, self._model, self._id, self._created, [choice])["choices"][0]
        if self._endpoint != CHAT:
            return {**whole, "index": number, "text": ""}
        delta: Json = {}
        if calls := whole["message"].get("tool_calls"):
            delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(calls)]
        return {"index": number, "delta": delta, "logprobs": whole["logprobs"], "finish_reason": whole["finish_reason"]}

    def _make_piece(self, choices: list[Json], usage: Json | None = None) -> Json:
        is_chat = self._endpoint == CHAT
        chunk: Json = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{self._id}",
            "object": "chat.completion.chunk" if is_chat else "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }
        if self._asked.includes_usage:
            chunk["usage"] = usage
        return chunk


def make_row_fault(failure: Failure) -> ApiError:
    """400 for what the request itself is to blame for; else it may be sent again, so that no 500 is ever its fault."""
    status, body = make_row_error(failure.error_type, failure.message, failure.is_retryable)
    is_ours = status >= 500
    return ApiError(
        503 if is_ours else status,
        body["message"],
        kind=body["type"],
        code=body["code"],
        retry_after_s=RETRY_AFTER_S if is_ours else None,
    )


def make_event(value: Json) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
