"""The Batches API as the `openai` package sees it, over a real process: on a local folder and on the S3 protocol."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from s3_server import S3Server
from serve_process import (
    CHAT,
    Server,
    check_left_over,
    create,
    end_window,
    make_endpoint_tree,
    make_jsonl,
    make_line,
    read_lines,
    upload,
    wait_for,
    wait_over,
)

from batchgen.serve.state import State
from batchgen.storage import Storage
from batchgen.verify.verify import verify

every_store = pytest.mark.parametrize("server", ["local", pytest.param("s3", marks=pytest.mark.s3)], indirect=True)
"""The others run on a local folder alone: what they look at knows no store."""


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Server]]:
    """Those that were started."""
    with contextlib.ExitStack() as stack:
        started: dict[str, Server] = {}
        stack.callback(lambda: [server.stop() for server in started.values()])
        yield started


@pytest.fixture
def server(
    request: pytest.FixtureRequest, servers: dict[str, Server], tmp_path_factory: pytest.TempPathFactory
) -> Server:
    kind = getattr(request, "param", "local")
    if kind not in servers:
        folder: Path = tmp_path_factory.mktemp("endpoint")
        store, env = str(folder / "store"), {}
        if kind == "s3":
            s3: S3Server = request.getfixturevalue("s3_server")
            store, env = f"s3://{s3.bucket}/{folder.name}", s3.env
        servers[kind] = Server(folder, make_endpoint_tree(store), env)
        servers[kind].start()
    return servers[kind]


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


# ---- one batch from end to end


@every_store
def test_a_batch_ends_with_every_answer_and_every_error(client: openai.OpenAI) -> None:
    lines = [make_line(f"r{number}", max_tokens=5) for number in range(120)]
    lines[3]["body"]["n"] = 2
    lines[4]["body"]["temperature"] = 9
    lines[5]["body"]["messages"] = []
    batch = create(client, lines, metadata={"team": "x"})
    assert batch._request_id
    assert batch._request_id.startswith("req_")
    assert (batch.status, batch.endpoint, batch.completion_window) == ("validating", CHAT, "24h")
    assert batch.metadata == {"team": "x"}
    done = wait_over(client, batch.id)
    assert done.status == "completed"
    assert done.request_counts is not None
    assert (done.request_counts.completed, done.request_counts.failed) == (118, 2)
    times = [done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at]
    assert None not in times
    assert times == sorted(times)  # type: ignore[type-var]
    answers, errors = read_lines(client, done.output_file_id), read_lines(client, done.error_file_id)
    assert set(answers) | set(errors) == {line["custom_id"] for line in lines}
    assert set(errors) == {"r4", "r5"}
    check_answer(answers["r0"], 1)
    check_answer(answers["r3"], 2)
    assert done.usage is not None
    used = [answer["response"]["body"]["usage"] for answer in answers.values()]
    assert done.usage.input_tokens == sum(usage["prompt_tokens"] for usage in used)
    assert done.usage.output_tokens == sum(usage["completion_tokens"] for usage in used)
    assert done.model == "fast"


def check_answer(line: dict[str, object], num_choices: int) -> None:
    """As the contract has it, and as the package's own type reads it."""
    assert set(line) == {"id", "custom_id", "response", "error"}
    assert line["error"] is None
    response = line["response"]
    assert isinstance(response, dict)
    assert response["status_code"] == 200
    body = openai.types.chat.ChatCompletion.model_validate(response["body"])
    assert [choice.index for choice in body.choices] == list(range(num_choices))
    assert body.usage is not None
    assert body.usage.total_tokens == body.usage.prompt_tokens + body.usage.completion_tokens


def test_a_rows_400_names_the_parameter(client: openai.OpenAI) -> None:
    faults = {
        "temperature": ("temperature", {"temperature": 9}),
        "logit_bias": ("logit_bias", {"logit_bias": {"5": 1}}),
        "bool": ("top_p", {"top_p": True}),
        "text": ("max_tokens", {"max_tokens": "5"}),
        "image": ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
        "unknown": ("beams", {"beams": 4}),
        "schema": ("response_format", {"response_format": {"type": "json_object"}}),
        "logprobs": ("logprobs", {"logprobs": True}),
        "stream": ("stream", {"stream": True}),
        "n": ("n", {"n": 10_000}),
        "tool_choice": ("tool_choice", {"tool_choice": "required", "tools": []}),
    }
    batch = create(client, [make_line("fine"), *(make_line(name, **body) for name, (_, body) in faults.items())])
    done = wait_over(client, batch.id)
    errors = read_lines(client, done.error_file_id)
    assert set(read_lines(client, done.output_file_id)) == {"fine"}
    found = {name: line["response"]["body"]["error"]["param"] for name, line in errors.items()}
    assert found == {name: param for name, (param, _) in faults.items()}
    for line in errors.values():
        assert line["response"]["status_code"] == 400
        assert line["error"] is None
        assert line["response"]["body"]["error"]["type"] == "invalid_request_error"


def test_completions_with_arrays_of_prompts(client: openai.OpenAI) -> None:
    url = "/v1/completions"
    lines = [make_line("one", url=url, max_tokens=4), make_line("many", url=url, prompt=["a b", "c d"], n=2)]
    lines.append(make_line("ids", url=url, prompt=[1, 2, 3]))
    done = wait_over(client, create(client, lines, endpoint=url).id)
    answers = read_lines(client, done.output_file_id)
    body = openai.types.Completion.model_validate(answers["many"]["response"]["body"])
    assert [choice.index for choice in body.choices] == [0, 1, 2, 3]
    assert body.usage is not None
    assert body.usage.prompt_tokens == len("a bc d")  # a byte is a token here, and each prompt counts once
    assert set(answers) == {"one", "many"}
    assert set(read_lines(client, done.error_file_id)) == {"ids"}  # a batch's prompts are of one form


def test_a_batch_of_bad_rows_only_completes_without_an_output_file(client: openai.OpenAI) -> None:
    done = wait_over(client, create(client, [make_line("a", top_p=7), make_line("b", top_p=8)]).id)
    assert done.status == "completed"
    assert done.output_file_id is None
    assert set(read_lines(client, done.error_file_id)) == {"a", "b"}


@every_store
def test_a_batch_is_a_job(server: Server, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    done = wait_over(client, create(client, [make_line(f"r{number}") for number in range(70)]).id)
    out = Storage(server.tree["store"]).url(f"t/acme/jobs/{done.id}")
    verdict = verify(Storage(out))
    assert verdict.findings == []
    assert Storage(out).info("_SUCCESS") is not None


# ---- what is wrong with the file


@pytest.mark.parametrize(
    ("lines", "line", "code", "param"),
    [
        ([make_line("a"), make_line("a")], 2, "duplicate_custom_id", "custom_id"),
        ([make_line("a"), b"{not json"], 2, "invalid_json_line", None),
        ([make_line("a"), b"[1]"], 2, "invalid_json_line", None),
        ([b'{"custom_id":"a","x":NaN}'], 1, "invalid_json_line", None),
        ([b"\xff\xfe"], 1, "invalid_json_line", None),
        ([b"[" * 100_000], 1, "invalid_json_line", None),
        ([{**make_line("a"), "custom_id": None}], 1, "missing_custom_id", "custom_id"),
        ([{**make_line("a"), "custom_id": 7}], 1, "invalid_custom_id", "custom_id"),
        ([b'{"custom_id":"\\ud800"}'], 1, "invalid_custom_id", "custom_id"),
        ([{**make_line("a"), "method": "GET"}], 1, "invalid_method", "method"),
        ([make_line("a", url="/v1/completions")], 1, "invalid_url", "url"),
        ([{**make_line("a"), "body": "x"}], 1, "invalid_body", "body"),
        ([{**make_line("a"), "body": {}}], 1, "missing_model", "body.model"),
        ([make_line("a", model="other")], 1, "model_not_found", "body.model"),
        ([make_line("a"), b"", make_line("b", model="slow")], 3, "mismatched_model", "body.model"),
        ([], None, "empty_file", None),
        ([b"", b"  ", b"\r"], None, "empty_file", None),
    ],
)
def test_a_bad_line_fails_the_batch_and_names_itself(
    client: openai.OpenAI, lines: list[object], line: int | None, code: str, param: str | None
) -> None:
    done = wait_over(client, create(client, lines).id)
    assert done.status == "failed"
    assert done.failed_at is not None
    assert done.output_file_id is None
    assert done.errors is not None
    assert done.errors.data
    first = done.errors.data[0]
    assert (first.line, first.code, first.param) == (line, code, param)


def test_blank_last_line_crlf_and_bom_are_fine(client: openai.OpenAI) -> None:
    text = b"\xef\xbb\xbf" + make_jsonl([make_line("a"), make_line("b")]).replace(b"\n", b"\r\n") + b"\r\n\n"
    done = wait_over(client, create(client, text).id)
    assert done.status == "completed"
    assert set(read_lines(client, done.output_file_id)) == {"a", "b"}
    done = wait_over(client, create(client, make_jsonl([make_line("no newline")]).rstrip()).id)
    assert done.status == "completed"


# ---- states


def test_every_state_on_the_way_can_be_seen(client: openai.OpenAI) -> None:
    batch = create(client, [make_line(f"r{number}") for number in range(3000)])
    seen = [batch.status]
    while seen[-1] != "completed":
        status = client.batches.retrieve(batch.id).status
        if status != seen[-1]:
            seen.append(status)
    assert seen == ["validating", "in_progress", "finalizing", "completed"]


@every_store
def test_cancel_keeps_finished_rows_and_accounts_for_the_others(client: openai.OpenAI) -> None:
    batch = create(client, [make_line(f"r{number}", model="slow") for number in range(400)])
    wait_for(client, batch.id, {"in_progress"})
    while (counts := client.batches.retrieve(batch.id).request_counts) is None or counts.completed < 8:
        time.sleep(0.1)
    cancelling = client.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    assert cancelling.cancelling_at is not None
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    done = wait_over(client, batch.id)
    assert done.status == "cancelled"
    assert done.request_counts is not None
    assert 8 <= done.request_counts.completed < 400
    assert done.request_counts.total == 400
    check_left_over(client, done, "batch_cancelled")


@every_store
def test_an_expired_batch_keeps_what_was_finished(
    server: Server, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window is moved in the store, so that no clock decides how much was finished."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    batch = create(client, [make_line(f"r{number}", model="slow") for number in range(400)])
    while (counts := client.batches.retrieve(batch.id).request_counts) is None or counts.completed < 8:
        time.sleep(0.1)
    state = State(server.tree["store"])
    state.change_batch("acme", batch.id, end_window)
    done = wait_over(client, batch.id)
    assert done.status == "expired"
    assert done.expired_at is not None
    assert done.expires_at is not None
    assert done.expired_at >= done.expires_at
    assert done.request_counts is not None
    assert 8 <= done.request_counts.completed < 400
    check_left_over(client, done, "batch_expired")
    assert verify(Storage(state.job_url("acme", batch.id))).findings == []


def test_a_window_that_is_over_before_a_row_is_done(client: openai.OpenAI) -> None:
    lines = [make_line(f"r{number}", model="slow", max_tokens=10_000) for number in range(400)]
    done = wait_over(client, create(client, lines, completion_window="1s").id)
    assert done.status == "expired"


def test_cancel_before_anything_began(client: openai.OpenAI) -> None:
    """Whatever the conductor does meanwhile, it ends as cancelled, or the cancel is refused."""
    batch = create(client, [make_line("a", model="slow")])
    client.batches.cancel(batch.id)
    done = wait_over(client, batch.id)
    assert done.status == "cancelled"


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
def test_cancel_of_an_ended_batch_is_a_conflict_that_is_not_retried(server: Server, end: str) -> None:
    client = server.client(max_retries=5)
    batch = create(client, [make_line("a", model="slow")] if end != "failed" else [b"x"])
    if end == "cancelled":
        client.batches.cancel(batch.id)
    assert wait_over(client, batch.id).status == end
    started = time.monotonic()
    with pytest.raises(openai.ConflictError) as caught:
        client.batches.cancel(batch.id)
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.request.headers["x-stainless-retry-count"] == "0"
    assert time.monotonic() - started < 30
    assert caught.value.body is not None


# ---- lists and tenants


@every_store
def test_list_in_pages_newest_first(server: Server) -> None:
    client = server.client("globex")
    made = [create(client, [make_line("a")]).id for _ in range(5)]
    page = client.batches.list(limit=2)
    assert [batch.id for batch in page.data] == made[:-3:-1]
    assert page.has_more
    assert [batch.id for batch in client.batches.list(limit=2)][:5] == made[::-1]
    rest = client.batches.list(limit=100, after=made[1])
    assert [batch.id for batch in rest.data][:1] == [made[0]]


@every_store
def test_another_tenants_ids_are_not_there(server: Server) -> None:
    mine, theirs = server.client("acme"), server.client("globex")
    batch = create(mine, [make_line("a")])
    done = wait_over(mine, batch.id)
    assert done.output_file_id is not None
    calls = [
        lambda: theirs.batches.retrieve(batch.id),
        lambda: theirs.batches.cancel(batch.id),
        lambda: theirs.files.retrieve(done.output_file_id),
        lambda: theirs.files.content(done.output_file_id),
        lambda: theirs.files.delete(done.output_file_id),
        lambda: theirs.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            call()
    assert batch.id not in [each.id for each in theirs.batches.list(limit=100)]
    assert mine.files.retrieve(done.output_file_id).purpose == "batch_output"


@pytest.mark.parametrize(
    "id_",
    ["batch_0", "../../globex/batches/x", "..%2f..", "batch_" + "0" * 32, "a" * 5000, "\x00", "batch_\n", "é"],
)
def test_what_is_no_id_is_not_there(client: openai.OpenAI, id_: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve(id_)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(id_)


# ---- creating once


def test_bad_creates_are_told_at_once(client: openai.OpenAI) -> None:
    file_id = upload(client, make_jsonl([make_line("a")])).id
    good = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    faults = [
        ("endpoint", {"endpoint": "/v1/embeddings"}),
        ("completion_window", {"completion_window": "soon"}),
        ("completion_window", {"completion_window": "900d"}),
        ("metadata", {"metadata": {str(number): "x" for number in range(17)}}),
        ("surprise", {"extra_body": {"surprise": 1}}),
        ("output_expires_after.seconds", {"output_expires_after": {"anchor": "created_at", "seconds": 5}}),
        ("model", {"extra_body": {"model": "fast"}}),
    ]
    for param, change in faults:
        with pytest.raises(openai.BadRequestError) as caught:
            client.batches.create(**{**good, **change})  # type: ignore[arg-type]
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"
    not_for_batches = client.files.create(file=b"x", purpose="user_data").id
    with pytest.raises(openai.BadRequestError):
        client.batches.create(**{**good, "input_file_id": not_for_batches})  # type: ignore[arg-type]


@every_store
def test_an_idempotency_key_makes_one_batch(client: openai.OpenAI) -> None:
    file_id = upload(client, make_jsonl([make_line("a")])).id
    asked = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    headers = {"Idempotency-Key": f"key-{file_id}"}
    first = client.batches.create(**asked, extra_headers=headers)  # type: ignore[arg-type]
    second = client.batches.create(**asked, extra_headers=headers)  # type: ignore[arg-type]
    assert first.id == second.id
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(**{**asked, "completion_window": "23h"}, extra_headers=headers)  # type: ignore[arg-type]
    assert caught.value.code == "idempotency_key_reused"
