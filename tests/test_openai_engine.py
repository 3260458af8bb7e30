"""The openai engine against a real server that misbehaves in every way a server can, and whole jobs over it."""

import asyncio
import dataclasses
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pytest
from jobs_util import check_conserved, check_output, make_tree, read_rows, run, write_file
from openai_server import KEY, MODEL, OpenAIServer

from batchgen.driver.job import open_job, render_first_prompt
from batchgen.engines.openai import OpenAIEngine
from batchgen.errors import BatchgenError, EngineDied, EngineUnavailable, RequestFailed, RequestRejected
from batchgen.records import Generation, Guided, Prompt, Request, RowId, SamplingParams
from batchgen.spec import ModelSpec
from batchgen.specs.engine import OpenAIEngineSpec
from batchgen.specs.load import make_spec
from batchgen.storage import Storage

T = TypeVar("T")
SECRET = "my prompt of the day"
DEAD = "http://127.0.0.1:9/v1"


@pytest.fixture
def server(openai_server: OpenAIServer) -> OpenAIServer:
    return openai_server


def make_engine(server: OpenAIServer, **changes: Any) -> OpenAIEngine:
    fields = {"base_urls": server.base_url, "model": MODEL, "max_inflight": 8, "open_timeout_s": 0.5, **changes}
    return OpenAIEngine(ModelSpec(), OpenAIEngineSpec(kind="openai", **fields))


def use(server: OpenAIServer, work: Callable[[OpenAIEngine], Awaitable[T]], **changes: Any) -> T:
    async def main() -> T:
        engine = make_engine(server, **changes)
        await engine.open()
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


def chat(text: str, **sampling: Any) -> Request:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 60, **sampling})
    return Request(RowId("f", 0, 0), None, params, prompt=Prompt(messages=({"role": "user", "content": text},)))


def ask(server: OpenAIServer, request: Request, **changes: Any) -> Generation:
    return use(server, lambda engine: engine.generate(request), **changes)


def fail(server: OpenAIServer, *, times: int = 1, text: str = SECRET, **changes: Any) -> list[BatchgenError]:
    """What each of so many requests, one after the other, raises."""

    async def work(engine: OpenAIEngine) -> list[BatchgenError]:
        errors = []
        for _ in range(times):
            with pytest.raises(BatchgenError) as caught:
                await engine.generate(chat(text))
            errors.append(caught.value)
        return errors

    return use(server, work, **changes)


async def until(is_so: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < give_up_at
        await asyncio.sleep(0.02)


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure_ttft", [False, True])
def test_a_chat_is_answered_with_all_the_server_says(server: OpenAIServer, measure_ttft: bool) -> None:
    answer = ask(server, chat("What is 17 + 25?"), measure_ttft=measure_ttft)
    assert (answer.text, answer.finish_reason, answer.reasoning, answer.tool_calls) == ("42", "stop", None, None)
    assert dataclasses.astuple(answer.usage) == (14, 3, 0)
    assert (answer.ttft_s is not None) == measure_ttft
    [body] = server.read()["bodies"]
    assert body["messages"] == [{"role": "user", "content": "What is 17 + 25?"}]
    assert set(body) == {"model", "messages", "temperature", "top_p", "max_tokens"} | (
        {"stream", "stream_options"} if measure_ttft else set()
    )


@pytest.mark.parametrize("measure_ttft", [False, True])
def test_completions_take_text_and_token_ids(server: OpenAIServer, measure_ttft: bool) -> None:
    text = "<｜User｜>2 + 3 = ?<｜Assistant｜></think>"
    how = {"api": "completions", "measure_ttft": measure_ttft}
    params = SamplingParams(temperature=0.0)
    assert ask(server, Request(RowId("f", 0, 0), None, params, prompt=Prompt(text=text)), **how).text == "5"

    async def send_ids(engine: OpenAIEngine) -> Generation:
        assert engine.tokenizer is not None
        return await engine.generate(Request(RowId("f", 0, 0), tuple(engine.tokenizer.encode(text)), params))

    assert use(server, send_ids, send_token_ids=True, **how).text == "5"
    bodies = server.read()["bodies"]
    assert bodies[0]["prompt"] == text
    assert all(isinstance(token, int) for token in bodies[1]["prompt"])


@pytest.mark.parametrize(("api", "measure_ttft"), [("chat", False), ("chat", True), ("completions", False)])
def test_logprobs_and_ids_where_the_server_names_them(server: OpenAIServer, api: str, measure_ttft: bool) -> None:
    request = chat("What is 17 + 25?", logprobs=2)
    if api == "completions":
        text = Prompt(text="<｜User｜>What is 17 + 25?<｜Assistant｜></think>")
        request = dataclasses.replace(request, prompt=text)
    named = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    answer = ask(server, request, api=api, measure_ttft=measure_ttft, extra_body=named)
    assert answer.logprobs is not None
    ids = [token.token_id for token in answer.logprobs]
    assert len(ids) == 2
    assert None not in ids
    assert [len(token.top) for token in answer.logprobs] == [2, 2]
    assert measure_ttft or answer.token_ids == tuple(ids)
    plain = ask(server, request, api=api, measure_ttft=measure_ttft)
    assert plain.logprobs is not None
    assert [token.token_id for token in plain.logprobs] == [None, None]
    assert [token.logprob for token in plain.logprobs] == [token.logprob for token in answer.logprobs]
    assert plain.token_ids is None


def test_thinking_is_asked_for_and_cut_by_us_where_the_server_does_not(server: OpenAIServer) -> None:
    answer = ask(server, chat("What is 17 + 25?", thinking=True))
    assert answer.reasoning is None
    assert answer.text.endswith("</think>42")
    assert server.read()["bodies"][0]["chat_template_kwargs"] == {"thinking": True, "enable_thinking": True}


def test_what_the_server_says_of_itself(server: OpenAIServer) -> None:
    async def work(engine: OpenAIEngine) -> tuple[str, int | None]:
        return engine.version, engine.max_model_len

    assert use(server, work) == ("tests", 1024)


def test_a_server_that_lists_no_model_is_asked_all_the_same(server: OpenAIServer) -> None:
    server.misbehave("unlisted", times=1, match="nothing that is sent")
    assert ask(server, chat("What is 17 + 25?"), open_timeout_s=2.0).text == "42"


def test_connections_are_pooled_and_requests_bounded(server: OpenAIServer) -> None:
    async def work(engine: OpenAIEngine) -> list[Generation]:
        for number in range(5):
            await engine.generate(chat(f"What is {number} + 1?"))
        assert len(server.read()["peers"]) == 1
        return list(await asyncio.gather(*(engine.generate(chat(f"What is {n} + 31?")) for n in range(60))))

    assert [answer.text for answer in use(server, work)] == [str(number + 31) for number in range(60)]
    counts = server.read()
    assert counts["max_inflight"] <= 8
    assert len(counts["peers"]) <= 8
    assert counts["num_calls"] == 65


def test_a_cancelled_request_ends_at_the_server(server: OpenAIServer) -> None:
    async def work(engine: OpenAIEngine) -> None:
        server.misbehave("hang", match="stay")
        task = asyncio.create_task(engine.generate(chat("stay")))
        await until(lambda: server.read()["num_inflight"] == 1)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await until(lambda: server.read()["num_inflight"] == 0)

    use(server, work)


# ---- refusals --------------------------------------------------------------------------------------------------------

STATUSES = [
    (400, "bad_value", RequestRejected, "bad_value"),
    (400, "context_length_exceeded", RequestRejected, "prompt_too_long"),
    (413, "too_large", RequestRejected, "too_large"),
    (418, "teapot", RequestRejected, "teapot"),
    (422, "no symbol at all", RequestRejected, "invalid_request_error"),
    (401, "invalid_api_key", EngineDied, None),
    (403, "forbidden", EngineDied, None),
    (404, "model_not_found", EngineDied, None),
    (307, "moved", EngineDied, None),
    (408, "slow", RequestFailed, "slow"),
    (409, "conflict", RequestFailed, "conflict"),
    (500, "oops", RequestFailed, "oops"),
    (502, "gateway", RequestFailed, "gateway"),
    (504, "late", RequestFailed, "late"),
    (429, "busy", EngineUnavailable, "rate_limited"),
    (503, "loading", EngineUnavailable, "unavailable"),
]


@pytest.mark.parametrize(("status", "code", "error_class", "error_type"), STATUSES)
def test_statuses(
    server: OpenAIServer, status: int, code: str, error_class: type[BatchgenError], error_type: str | None
) -> None:
    server.misbehave("refuse", status=status, code=code, message=f"you said: {SECRET} {'x' * 1000}")
    [error] = fail(server)
    assert type(error) is error_class
    assert getattr(error, "error_type", None) == error_type
    is_rows_own = error_class in (RequestRejected, RequestFailed)
    assert (SECRET in str(error)) == is_rows_own, "a server's message is for a row's own error, and nothing else"
    assert len(str(error)) < 600


@pytest.mark.parametrize(
    ("how", "least", "most"),
    [
        ({"headers": {"Retry-After": "7"}}, 7, 7),
        ({"headers": {"Retry-After": "0.5"}}, 0.5, 0.5),
        ({"headers": {"retry-after-ms": "1500", "Retry-After": "9"}}, 1.5, 1.5),
        ({"after_date_s": 30}, 27, 30),
        ({"after_date_s": -30}, 0, 0),
        ({"headers": {"Retry-After": "1e9"}}, 600, 600),
        ({"headers": {"Retry-After": "soon"}}, None, None),
        ({"headers": {"Retry-After": "nan"}}, None, None),
        ({"headers": {"Retry-After": "Fri, 31 Dec 2027 23:59:59 +99999999999999"}}, None, None),
        ({}, None, None),
    ],
)
@pytest.mark.parametrize("status", [429, 503, 500])
def test_retry_after(
    server: OpenAIServer, status: int, how: dict[str, Any], least: float | None, most: float | None
) -> None:
    server.misbehave("refuse", status=status, **how)
    [error] = fail(server)
    assert isinstance(error, RequestFailed)
    if least is None or most is None:
        assert error.retry_after_s is None
    else:
        assert error.retry_after_s is not None
        assert least <= error.retry_after_s <= most


def test_the_servers_own_limit_makes_prompt_too_long(server: OpenAIServer) -> None:
    [error] = fail(server, text="word " * 2000)
    assert isinstance(error, RequestRejected)
    assert error.error_type == "prompt_too_long"
    assert "HTTP 400" in error.message


def test_a_404_is_a_wrong_name_at_first_and_a_missing_worker_later(server: OpenAIServer) -> None:
    [error] = fail(server, model="other")
    assert isinstance(error, EngineDied)
    assert "correct engine.base_urls or engine.model" in str(error)

    async def work(engine: OpenAIEngine) -> None:
        await engine.generate(chat("1 + 1 = ?"))
        server.misbehave("refuse", status=404)
        with pytest.raises(EngineUnavailable):
            await engine.generate(chat("1 + 1 = ?"))

    use(server, work)


# ---- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.require_key()
    with pytest.raises(EngineDied, match="set OPENAI_API_KEY on every worker") as caught:
        ask(server, chat("1 + 1 = ?"))
    assert KEY not in str(caught.value)
    monkeypatch.setenv("MY_KEY", KEY)
    assert ask(server, chat("1 + 1 = ?"), api_key_env="MY_KEY").text == "2"
    with pytest.raises(EngineDied, match="OTHER_KEY is not set on"):
        ask(server, chat("1 + 1 = ?"), api_key_env="OTHER_KEY")
    assert KEY not in caplog.text


def test_a_key_that_is_taken_back_ends_the_engine(server: OpenAIServer) -> None:
    async def work(engine: OpenAIEngine) -> None:
        await engine.generate(chat("1 + 1 = ?"))
        server.require_key()
        for _ in range(2):
            with pytest.raises(EngineDied, match="OPENAI_API_KEY"):
                await engine.generate(chat("1 + 1 = ?"))
        assert server.read()["num_calls"] == 2

    use(server, work)


# ---- answers that are none -------------------------------------------------------------------------------------------

OK = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": ""}}
BAD_BODIES = [
    "",
    "{",
    "null",
    "[]",
    "{}",
    '{"choices": []}',
    '{"choices": [{}]}',
    '{"choices": [{"finish_reason": "stop"}]}',
    json.dumps({"choices": [{**OK, "finish_reason": None}]}),
    json.dumps({"choices": [{**OK, "message": {"content": [SECRET]}}]}),
    json.dumps({"choices": [{**OK, "logprobs": {"content": [{"token": SECRET}]}}]}),
    "\xff",
]


@pytest.mark.parametrize("body", BAD_BODIES)
def test_a_malformed_answer_may_be_tried_again(server: OpenAIServer, body: str) -> None:
    server.misbehave("body", body=body)
    [error] = fail(server)
    assert type(error) is RequestFailed
    assert error.error_type == "bad_response"
    assert SECRET not in str(error)


def test_a_page_instead_of_an_answer(server: OpenAIServer) -> None:
    server.misbehave("body", times=2, body=f"<html>{SECRET}</html>", content_type="text/html")
    for measure_ttft in (False, True):
        [error] = fail(server, measure_ttft=measure_ttft)
        assert (getattr(error, "error_type", None), SECRET in str(error)) == ("bad_response", False)


@pytest.mark.parametrize("reason", ["abort", "error", "cancelled", "timeout"])
def test_an_answer_that_the_server_cut_short_is_no_answer(server: OpenAIServer, reason: str) -> None:
    server.misbehave("body", body=json.dumps({"choices": [{**OK, "finish_reason": reason}]}))
    [error] = fail(server)
    assert getattr(error, "error_type", None) == "cut_short"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": ""}, ("", None, None)),
        ({"content": None}, ("", None, None)),
        ({"content": "a", "reasoning_content": "r"}, ("a", "r", None)),
        ({"content": "a", "reasoning": "r"}, ("a", "r", None)),
        ({"content": None, "refusal": "no"}, ("no", None, None)),
        ({"content": None, "tool_calls": [{"id": "é"}]}, ("", None, '[{"id": "é"}]')),
        ({"content": "half \ud83d of \ud83d\ude00"}, ("half \ufffd of 😀", None, None)),
    ],
)
def test_what_a_message_may_hold(server: OpenAIServer, message: dict[str, Any], expected: tuple[Any, ...]) -> None:
    server.misbehave("body", body=json.dumps({"choices": [{**OK, "finish_reason": "odd one", "message": message}]}))
    answer = ask(server, chat("x"))
    assert (answer.text, answer.reasoning, answer.tool_calls) == expected
    assert answer.finish_reason == "odd one"
    assert dataclasses.astuple(answer.usage) == (None, None, None)


def test_an_error_in_a_200_is_an_error(server: OpenAIServer) -> None:
    told = {"error": {"message": SECRET, "code": 400, "type": "BadRequestError"}}
    server.misbehave("body", body=json.dumps(told))
    server.misbehave("body", body=f"data: {json.dumps(told)}\n\n", content_type="text/event-stream")
    for measure_ttft in (False, True):
        [error] = fail(server, measure_ttft=measure_ttft)
        assert isinstance(error, RequestRejected)
        assert error.error_type == "BadRequestError"


EVENT = {"choices": [{"index": 0, "delta": {"content": "4"}}]}


@pytest.mark.parametrize(
    "body",
    [
        "",
        "data: [DONE]\n\n",
        f"data: {json.dumps(EVENT)}\n\n",
        f"data: {json.dumps(EVENT)}\n\ndata: [DONE]\n\n",
        f"data: {json.dumps(EVENT)}\n\ndata: {{\n\n",
        "data: 5\n\n",
    ],
)
def test_a_stream_that_breaks_off_is_no_answer(server: OpenAIServer, body: str) -> None:
    server.misbehave("body", body=body, content_type="text/event-stream")
    [error] = fail(server, measure_ttft=True)
    assert getattr(error, "error_type", None) == "bad_response"


# ---- connections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure_ttft", [False, True])
def test_a_reset_in_mid_answer_may_be_tried_again_and_counts(server: OpenAIServer, measure_ttft: bool) -> None:
    kind = "text/event-stream" if measure_ttft else "application/json"
    server.misbehave("reset", content_type=kind, body=f"data: {json.dumps(EVENT)}\n\n")
    [error] = fail(server, measure_ttft=measure_ttft)
    assert type(error) is RequestFailed
    assert error.error_type == "connection_lost"


def test_a_server_that_hangs_is_timed_out_and_a_slow_one_waited_for(server: OpenAIServer) -> None:
    server.misbehave("hang")
    [error] = fail(server, request_timeout_s=0.3)
    assert type(error) is RequestFailed
    assert error.error_type == "timeout"
    server.misbehave("slow", seconds=0.5)
    assert ask(server, chat("2 + 2 = ?")).text == "4"


def test_the_wait_for_a_place_is_no_part_of_a_requests_time(server: OpenAIServer) -> None:
    server.misbehave("slow", times=9, seconds=0.25)

    async def work(engine: OpenAIEngine) -> list[Generation]:
        return list(await asyncio.gather(*(engine.generate(chat("2 + 2 = ?")) for _ in range(9))))

    assert len(use(server, work, max_inflight=1, request_timeout_s=2.0)) == 9


def test_nobody_there_costs_no_attempt_and_is_not_asked_for_ever(server: OpenAIServer) -> None:
    async def work(engine: OpenAIEngine) -> None:
        server.go_away(2.0)
        waits = [await get_wait(engine) for _ in range(8)]
        assert waits[:5] == [None] * 5
        assert all(0 < (wait_s or 0) <= 1 for wait_s in waits[5:])
        while await get_wait(engine) != 0:
            await asyncio.sleep(0.05)

    async def get_wait(engine: OpenAIEngine) -> float | None:
        """0 when it was answered."""
        try:
            await engine.generate(chat("1 + 1 = ?"))
        except EngineUnavailable as error:
            return error.retry_after_s
        return 0

    use(server, work)
    assert server.read()["num_calls"] == 1


def test_it_is_given_up_when_all_are_gone_for_too_long(server: OpenAIServer) -> None:
    async def work(engine: OpenAIEngine) -> None:
        server.go_away(1.5)
        deaths = []
        while not deaths:
            try:
                await engine.generate(chat(SECRET))
            except EngineUnavailable:
                await asyncio.sleep(0.02)
            except EngineDied as error:
                deaths.append(str(error))
        assert deaths[0].startswith("no server has answered for 0.5 s (engine.give_up_s)")
        assert SECRET not in deaths[0]

    started = time.monotonic()
    use(server, work, give_up_s=0.5)
    time.sleep(max(0.0, started + 2.5 - time.monotonic()))  # it comes back, for the next test


def test_a_full_server_is_not_given_up_while_it_works_for_us(server: OpenAIServer) -> None:
    async def work(engine: OpenAIEngine) -> None:
        server.misbehave("slow", match="patience", seconds=1.0)
        server.misbehave("refuse", times=10**6, match="crowd", status=429)
        first = asyncio.create_task(engine.generate(chat("patience")))
        await until(lambda: server.read()["num_inflight"] == 1)
        while not first.done():
            with pytest.raises(EngineUnavailable):
                await engine.generate(chat("crowd"))
            await asyncio.sleep(0.05)
        await first

    use(server, work, give_up_s=0.3)


def test_of_two_servers_the_one_that_is_there_does_the_work(server: OpenAIServer) -> None:
    async def work(engine: OpenAIEngine) -> int:
        num_refused = 0
        for number in range(20):
            try:
                await engine.generate(chat(f"What is {number} + 1?"))
            except EngineUnavailable:
                num_refused += 1
        return num_refused

    assert use(server, work, base_urls=[DEAD, server.base_url]) == 5


def test_open_waits_for_a_server_that_loads_and_says_when_there_is_none(server: OpenAIServer) -> None:
    server.misbehave("loading", times=2)
    assert ask(server, chat("2 + 2 = ?"), open_timeout_s=60).text == "4"
    with pytest.raises(EngineDied, match=r"no server answered within 0\.5 s; the first: http://127.*can't be reached"):
        ask(server, chat("x"), base_urls=DEAD)


# ---- whole jobs ------------------------------------------------------------------------------------------------------


def make_job(tmp_path: Path, server: OpenAIServer, num_rows: int, **over: Any) -> tuple[dict[str, Any], list[Any]]:
    table = pa.table({"prompt": [f"What is {number % 50} + {number % 49}?" for number in range(num_rows)]})
    name = write_file(tmp_path / "in/part.parquet", table)
    engine = {"kind": "openai", "base_urls": server.base_url, "model": MODEL, "max_inflight": 8}
    tree = make_tree(tmp_path / "in", tmp_path / "out", **over)
    # All of retry's and the engine's own defaults, not those of jobs_util.
    return {**tree, "engine": engine, "retry": {}, "sampling": {"temperature": 0, "max_tokens": 32}}, [(name, num_rows)]


def right(row: dict[str, Any]) -> bool:
    number = row["source_row"]
    return bool(row["text"] == str(number % 50 + number % 49))


def test_a_server_that_goes_away_and_comes_back_costs_no_row(tmp_path: Path, server: OpenAIServer) -> None:
    tree, files = make_job(tmp_path, server, 160, cluster={"workers": {"min": 1, "max": 1}})
    server.misbehave("slow", times=10**6, seconds=0.1)

    async def leave() -> None:
        await until(lambda: server.read()["num_calls"] > 40)
        server.go_away(2.0)

    async def main() -> dict[str, Any]:
        job = asyncio.to_thread(run, tree)
        _, (report, _) = await asyncio.gather(leave(), job)
        return dict(report)

    started = time.monotonic()
    report = asyncio.run(main())
    assert time.monotonic() - started < 55
    assert (report["rows"]["ok"], report["rows"]["error"]) == (160, 0)
    rows = check_output(tmp_path / "out", files)
    check_conserved(tmp_path / "out", files)
    assert sum(map(right, rows)) > 150
    # Only what was in flight at that instant was sent twice; waiting for the server cost nobody an attempt.
    assert max(row["num_attempts"] for row in rows) == 2
    assert sum(row["num_attempts"] - 1 for row in rows) <= 8
    assert server.read()["num_calls"] <= 168


def test_one_poison_row_is_one_error_row(
    tmp_path: Path, server: OpenAIServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    tree, files = make_job(tmp_path, server, 60)
    server.misbehave("refuse", times=9, match="What is 7 + 7?", status=400, code="bad_day", message=f"not {SECRET}")
    report, view = run(tree)
    assert (report["rows"]["ok"], report["rows"]["error"]) == (59, 1)
    [bad] = [row for row in check_output(tmp_path / "out", files) if row["status"] == "error"]
    assert (bad["source_row"], bad["error_type"], bad["is_retryable"]) == (7, "bad_day", False)
    assert bad["error_message"] == f"HTTP 400: not {SECRET}"
    assert bad["num_attempts"] == 1
    assert SECRET not in caplog.text + json.dumps(report) + "".join(view.said + view.warned)


def test_a_crowded_server_is_waited_for(tmp_path: Path, server: OpenAIServer) -> None:
    """More refusals than retry.max_attempts, each with the time to come again: no error row and no attempt is lost."""
    tree, files = make_job(tmp_path, server, 10)
    server.misbehave("refuse", times=60, status=429, headers={"Retry-After": "0.05"})
    report, _ = run({**tree, "retry": {"backoff_s": 0.05}})
    assert (report["rows"]["ok"], report["job"]["num_retries"]) == (10, 0)
    assert {row["num_attempts"] for row in check_output(tmp_path / "out", files)} == {1}
    assert server.read()["num_calls"] == 70


@pytest.mark.parametrize("status", [429, 500])
def test_who_waits_for_a_server_holds_no_place(tmp_path: Path, server: OpenAIServer, status: int) -> None:
    """A window of one: the row that is to come back later lets the others pass."""
    tree, _ = make_job(tmp_path, server, 12, cluster={"workers": {"min": 1, "max": 1}})
    tree["engine"]["max_inflight"] = 1
    server.misbehave("refuse", match="What is 0 + 0?", status=status, headers={"Retry-After": "0.5"})
    report, _ = run(tree)
    asked = [body["messages"][0]["content"] for body in server.read()["bodies"]]
    first, again = (number for number, question in enumerate(asked) if question == "What is 0 + 0?")
    assert len(asked) == 13
    assert again - first > 1
    assert (report["rows"]["ok"], report["job"]["num_retries"]) == (12, int(status == 500))


def test_the_first_prompt_is_shown_as_the_server_gets_it(tmp_path: Path, server: OpenAIServer) -> None:
    tree, _ = make_job(tmp_path, server, 2)
    text, num_tokens = render_first_prompt(open_job(make_spec(tree), Storage(tree["output"]["path"])))
    assert (json.loads(text), num_tokens) == ([{"role": "user", "content": "What is 0 + 0?"}], None)


SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "number"}}}


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_an_answer_is_held_to_a_schema_in_openais_words(server: OpenAIServer, api: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3, guided=Guided(json_schema=json.dumps(SCHEMA)))
    prompt = Prompt(text="1") if api == "completions" else chat("1").prompt
    ask(server, Request(RowId("f", 0, 0), None, params, prompt=prompt), api=api)
    [body] = server.read()["bodies"]
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
    }
    assert list(body["response_format"]["json_schema"]["schema"]["properties"]) == ["b", "a"]


@pytest.mark.parametrize("guided", [Guided(regex="a"), Guided(grammar="a")])
def test_a_regex_or_grammar_never_reaches_a_server_that_would_drop_it(server: OpenAIServer, guided: Guided) -> None:
    with pytest.raises(RequestRejected) as caught:
        ask(server, chat("1", guided=guided))
    assert caught.value.error_type == "bad_sampling"
    assert server.read()["num_calls"] == 0


def test_tools_go_with_their_row_and_calls_come_back_in_a_column(tmp_path: Path, server: OpenAIServer) -> None:
    tree, _ = make_job(tmp_path, server, 0)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    columns = {"q": ["one", "two", "three"], "tools": [json.dumps([tool]), None, f"[{SECRET}"]}
    tree["input"] = {"paths": [write_file(tmp_path / "tools.parquet", pa.table(columns))]}
    tree["prompt"] = {"column": "q", "tools": "tools"}
    calls = [{"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
    choice = {"finish_reason": "tool_calls", "message": {"content": None, "tool_calls": calls}}
    server.misbehave("body", match="one", body=json.dumps({"choices": [choice]}))
    run({**tree, "retry": {"max_error_rate": 1.0}})
    one, two, three = read_rows(tmp_path / "out")
    assert (json.loads(one["tool_calls"]), one["finish_reason"], one["text"]) == (calls, "tool_calls", "")
    assert (two["tool_calls"], two["status"]) == (None, "ok")
    assert (three["error_type"], three["error_message"]) == ("bad_tools", "column 'tools' is not valid JSON")
    bodies = {body["messages"][0]["content"]: body.get("tools") for body in server.read()["bodies"]}
    assert bodies == {"one": [tool], "two": None}


def test_a_row_may_ask_for_a_schema_and_for_no_regex(tmp_path: Path, server: OpenAIServer) -> None:
    tree, _ = make_job(tmp_path, server, 0)
    asked = [None, {"guided": {"json_schema": {"type": "number"}}}, {"guided": {"regex": "a"}}]
    columns = {"q": ["one", "two", "three"], "s": [value and json.dumps(value) for value in asked]}
    tree["input"] = {"paths": [write_file(tmp_path / "guided.parquet", pa.table(columns))]}
    tree["prompt"] = {"column": "q", "sampling": "s"}
    tree["sampling"] = {**tree.get("sampling", {}), "guided": {"json_schema": SCHEMA}}
    run({**tree, "retry": {"max_error_rate": 1.0}})
    rows = read_rows(tmp_path / "out")
    assert [row["error_type"] for row in rows] == [None, None, "bad_sampling"]
    sent = {b["messages"][0]["content"]: b["response_format"]["json_schema"] for b in server.read()["bodies"]}
    assert {question: form["schema"] for question, form in sent.items()} == {"one": SCHEMA, "two": {"type": "number"}}


def test_tool_calls_have_a_column_when_there_are_tools(tmp_path: Path, server: OpenAIServer) -> None:
    tree, _ = make_job(tmp_path, server, 2)
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    message = {"content": None, "tool_calls": calls}
    server.misbehave(
        "body", times=2, body=json.dumps({"choices": [{"finish_reason": "tool_calls", "message": message}]})
    )
    tree["engine"]["extra_body"] = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    run(tree)
    assert [json.loads(row["tool_calls"]) for row in read_rows(tmp_path / "out")] == [calls, calls]
