"""Streamed answers put together, whatever pieces their bytes come in."""

import json
import pickle
from typing import Any

import pytest

from batchgen.engines.openai_stream import StreamedAnswer
from batchgen.errors import EngineUnavailable, RequestFailed


def make_stream(*choices: dict[str, Any], end: str = "data: [DONE]\n\n") -> bytes:
    events = [{"choices": [{"index": 0, **choice}]} for choice in choices]
    return "".join(f"data: {json.dumps(event, ensure_ascii=False)}\r\n\r\n" for event in events).encode() + end.encode()


def feed(data: bytes, size: int) -> StreamedAnswer:
    answer = StreamedAnswer()
    for start in range(0, len(data), size):
        answer.feed(data[start : start + size])
    return answer


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_text_reasoning_and_usage(size: int) -> None:
    stream = make_stream(
        {"delta": {"role": "assistant", "content": ""}},
        {"delta": {"reasoning_content": "h"}},
        {"delta": {"reasoning_content": "mé"}},
        {"delta": {"content": "4"}, "logprobs": {"content": [{"token": "4", "logprob": -0.5}]}},
        {"delta": {"content": "2"}, "logprobs": {"content": [{"token": "2", "logprob": -0.1}]}},
        {"delta": {}, "finish_reason": "stop", "logprobs": None},
        end=': a comment\n\ndata: {"choices": [], "usage": {"completion_tokens": 3}}\n\ndata: [DONE]\n\n',
    )
    answer = feed(stream, size)
    whole = answer.make_answer()
    [choice] = whole["choices"]
    assert choice["message"] == {"content": "42", "reasoning_content": "hmé"}
    assert choice["finish_reason"] == "stop"
    assert [token["token"] for token in choice["logprobs"]["content"]] == ["4", "2"]
    assert whole["usage"] == {"completion_tokens": 3}
    assert answer.num_parts == 4


def test_tool_calls_come_in_pieces() -> None:
    def call(index: int, **fields: Any) -> dict[str, Any]:
        return {"delta": {"tool_calls": [{"index": index, **fields}]}}

    stream = make_stream(
        call(0, id="a", type="function", function={"name": "add", "arguments": ""}),
        call(0, function={"arguments": '{"x": '}),
        call(0, id=None, function={"name": None, "arguments": "1}"}),
        call(1, id="b", type="function", function={"name": "sub", "arguments": "{}"}),
        {"delta": {}, "finish_reason": "tool_calls"},
    )
    [choice] = feed(stream, 64).make_answer()["choices"]
    assert choice["message"]["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}},
        {"id": "b", "type": "function", "function": {"name": "sub", "arguments": "{}"}},
    ]


@pytest.mark.parametrize("calls", [[{"index": 3}], [{"index": "x"}], ["text"]])
def test_a_tool_call_out_of_order_is_a_bad_answer(calls: list[Any]) -> None:
    with pytest.raises(RequestFailed, match="out of order"):
        feed(make_stream({"delta": {"tool_calls": calls}}), 64)


def test_a_refusal_keeps_its_time_when_it_is_pickled() -> None:
    error = pickle.loads(pickle.dumps(EngineUnavailable("unavailable", "no room", 2.5)))
    assert (type(error), error.error_type, str(error), error.retry_after_s) == (
        EngineUnavailable,
        "unavailable",
        "no room",
        2.5,
    )
