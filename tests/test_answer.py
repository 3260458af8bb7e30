"""Answers and errors become results, with the times they took and the words the user reads."""

import dataclasses

import pytest
from makers import make_lease, make_request

from batchgen.engines.simulated import ByteTokenizer
from batchgen.errors import BadRow, RequestFailed, RequestRejected
from batchgen.records import Failure, Generation, Timing, Usage
from batchgen.worker.answer import Parsed, make_failed, make_given_up, make_result, split_reasoning

ANSWER = Generation("because</think>so", (1, 2), "stop", Usage(3, 2, 1), ttft_s=0.5, queued_s=0.25)
PARSE = ByteTokenizer().parse


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("answer", False, ("answer", None)),
        ("a</think>b", False, ("a</think>b", None)),
        ("because</think>so", True, ("so", "because")),
        ("cut by max_tok", True, ("", "cut by max_tok")),
        ("", True, ("", "")),
        ("</think>so", True, ("so", "")),
        ("a</think>b</think>c", True, ("b</think>c", "a")),
        ("a</think>", True, ("", "a")),
    ],
)
def test_reasoning_is_what_stands_before_the_first_mark(
    text: str, thinking: bool, expected: tuple[str, str | None]
) -> None:
    assert split_reasoning(text, thinking=thinking, think_end="</think>") == expected


def test_the_mark_is_the_models_own() -> None:
    assert split_reasoning("a[/T]b</think>", thinking=True, think_end="[/T]") == ("b</think>", "a")
    assert split_reasoning("all of it", thinking=True, think_end=None) == ("all of it", None)


@pytest.mark.parametrize(
    ("answer", "stored"),
    [
        ("fine é", "fine é"),
        ("a\ud800b", "a\ufffdb"),
        ("\udc00", "\ufffd"),
        ("x\ud83d\ude00", "x\N{GRINNING FACE}"),
        ("\ud800é", "\ufffdé"),
    ],
)
def test_half_a_surrogate_pair_is_replaced_and_nothing_else_lost(answer: str, stored: str) -> None:
    generation = dataclasses.replace(ANSWER, text=f"{answer}</think>{answer}")
    request = make_request(thinking=True)
    result = make_result(request, generation, parse=PARSE, waited_s=0.0, latency_s=0.0)
    assert (result.text, result.reasoning) == (stored, stored)
    failed = make_failed(request, RequestFailed("busy", answer), waited_s=0.0, latency_s=0.0)
    assert failed.failure is not None
    assert failed.failure.message == stored


def test_an_answer_keeps_the_whole_generation_and_adds_both_waits() -> None:
    request = make_request(4, 1, attempt=3, thinking=True)
    result = make_result(request, ANSWER, parse=PARSE, waited_s=2.0, latency_s=7.0)
    assert (result.row_id, result.num_attempts, result.failure) == (request.row_id, 3, None)
    assert (result.text, result.reasoning) == ("so", "because")
    assert result.generation is ANSWER
    assert result.timing == Timing(queued_s=2.25, ttft_s=0.5, latency_s=7.0)


def test_what_the_engine_does_not_tell_is_unknown() -> None:
    silent = dataclasses.replace(ANSWER, ttft_s=None, queued_s=None)
    result = make_result(make_request(), silent, parse=None, waited_s=2.0, latency_s=7.0)
    assert result.timing == Timing(2.0, None, 7.0)


def parse_calls(text: str, *, thinking: bool, has_tools: bool) -> Parsed:
    """Of a model that writes what it calls in brackets."""
    assert not thinking
    return Parsed("", None, text[1:-1]) if has_tools and text.startswith("[") else Parsed(text, None)


@pytest.mark.parametrize(
    ("finish_reason", "given", "has_tools", "expected"),
    [
        ("stop", None, True, ("", "tool_calls", "f")),
        ("length", None, True, ("", "length", "f")),
        ("stop", None, False, ("[f]", "stop", None)),
        ("stop", "theirs", True, ("[f]", "stop", "theirs")),
    ],
)
def test_calls_that_we_read_end_an_answer_as_openai_says_it(
    finish_reason: str, given: str | None, has_tools: bool, expected: tuple[str, str, str | None]
) -> None:
    answer = Generation("[f]", (1,), finish_reason, Usage(), tool_calls=given)
    request = dataclasses.replace(make_request(), has_tools=has_tools)
    result = make_result(request, answer, parse=parse_calls, waited_s=0.0, latency_s=0.0)
    assert result.generation is not None
    assert (result.text, result.generation.finish_reason, result.generation.tool_calls) == expected


def test_reasoning_that_a_server_cut_is_kept_beside_our_parsing() -> None:
    answer = Generation("[f]", (1,), "stop", Usage(), reasoning="because")
    request = dataclasses.replace(make_request(thinking=True), has_tools=True)
    result = make_result(request, answer, parse=parse_calls, waited_s=0.0, latency_s=0.0)
    assert (result.text, result.reasoning) == ("", "because")


def test_half_a_surrogate_pair_in_a_call_is_replaced() -> None:
    request = dataclasses.replace(make_request(), has_tools=True)
    parse = lambda text, **_: Parsed(text, None, '"\ud800"')  # noqa: E731
    result = make_result(request, ANSWER, parse=parse, waited_s=0.0, latency_s=0.0)
    assert result.generation is not None
    assert result.generation.tool_calls == '"\ufffd"'


@pytest.mark.parametrize(
    ("error", "is_retryable"),
    [
        (RequestFailed("busy", "later"), True),
        (RequestRejected("busy", "later"), False),
        (BadRow("busy", "later"), False),
    ],
)
def test_a_failure_is_retryable_as_its_class_says(error: RequestFailed, is_retryable: bool) -> None:
    result = make_failed(make_request(attempt=2), error, waited_s=1.0, latency_s=3.0)
    assert result.failure == Failure("busy", "later", is_retryable)
    assert (result.num_attempts, result.prompt_tokens, result.generation, result.text) == (2, 3, None, None)
    assert result.timing == Timing(1.0, None, 3.0)


def test_a_row_given_up_says_why_and_may_be_tried_by_another_run() -> None:
    lease = make_lease(attempt=5, is_last_resort=True, reason="node gone")
    result = make_given_up(make_request(7), lease)
    assert result.failure == Failure("worker_lost", "given up at attempt 5, the last one lost: node gone", True)
    assert (result.num_attempts, result.prompt_tokens, result.timing) == (0, 3, Timing())
