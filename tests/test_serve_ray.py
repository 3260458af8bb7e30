"""`batchgen serve` on a real Ray: interactive requests beside batches on shared engines, and every part of it killed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import openai
import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, settings
from ray_cluster import MARK, find_port, list_marked, stop_processes
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serve_ledger import Ledger, wait_for_calls

from batchgen.serve.app import create_app
from batchgen.serve.endpoint import Endpoint
from batchgen.serve.keys import LOCAL_TENANT
from batchgen.serve.load import make_endpoint
from batchgen.serve.routes_completions import create_completions_router
from batchgen.serve.state import State

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

ENGINE = {
    "kind": "simulated",
    "slots": 8,
    "max_inflight": 16,
    "sigma": 0.3,
    "mean_tokens": 20,
    "decode_tokens_per_s": 60,
    "reject_text": "refuse this",
    "die_text": "die of this",
}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
CHAT = "/v1/chat/completions"
PARTS = ("ray::EngineActor", "ray::ServeReplica:batchgen:Controller", "ray::ServeReplica:batchgen:Ingress")


@dataclass
class Served:
    """One `batchgen serve` with a Ray of its own."""

    process: subprocess.Popen[bytes]
    port: int
    mark: str
    log: Path
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=8)

    def kill(self, part: str) -> None:
        found = list_marked(self.mark, part)
        assert found, f"{part} is not there"
        stop_processes(found)

    def wait_up(self) -> None:
        give_up_at = time.monotonic() + 180
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                ask(self.client, "hello")
            except openai.APIError:
                assert time.monotonic() < give_up_at, self.log.read_text()[-3000:]
                time.sleep(0.5)
            else:
                return


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    model = {
        "engine": {**ENGINE, "call_log": str(folder / "calls")},
        "cluster": {"workers": {"min": 1, "max": 1}, "drain_s": 2},
        "journal_interval_s": 0.5,
        "rows_per_shard": 40,
    }
    limits = {"requests_per_minute": 1_000_000}
    tree = {"store": str(folder / "store"), "models": {"slow": model}, "limits": limits}
    (folder / "endpoint.yaml").write_text(yaml.safe_dump(tree))
    ray_folder, mark, port = tempfile.mkdtemp(prefix="bg", dir="/tmp"), uuid.uuid4().hex, find_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_TMPDIR": ray_folder, MARK: mark}
    command = [str(Path(sys.executable).parent / "batchgen"), "serve", str(folder / "endpoint.yaml"), "--no-keys"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=log, stderr=log, env=env, start_new_session=True
        )
    found = Served(process, port, mark, folder / "log", folder)
    try:
        found.wait_up()
        yield found
    finally:
        found.client.close()
        stop_processes(list_marked(mark))
        process.wait(60)


def ask(client: openai.OpenAI, text: str, **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="slow", messages=messages, **fields)


def start_batch(client: openai.OpenAI, num_rows: int, window: Any = "24h") -> openai.types.Batch:
    lines = [
        {"custom_id": f"row-{row}", "method": "POST", "url": CHAT, "body": make_body(f"row {row}")}
        for row in range(num_rows)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window=window)


def make_body(text: str) -> dict[str, Any]:
    return {"model": "slow", "messages": [{"role": "user", "content": text}]}


def wait_ended(client: openai.OpenAI, batch_id: str, timeout_s: float = 180) -> openai.types.Batch:
    give_up_at = time.monotonic() + timeout_s
    while (batch := client.batches.retrieve(batch_id)).status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < give_up_at, batch
        time.sleep(0.3)
    return batch


def check_whole(client: openai.OpenAI, batch: openai.types.Batch, num_rows: int) -> None:
    """Every row is there once, and none failed."""
    assert batch.status == "completed", batch
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (num_rows, num_rows, 0)
    assert batch.output_file_id is not None
    lines = client.files.content(batch.output_file_id).text.splitlines()
    assert sorted(json.loads(line)["custom_id"] for line in lines) == sorted(f"row-{row}" for row in range(num_rows))


def test_the_same_request_is_answered_whole_and_streamed(served: Served) -> None:
    client = served.client
    whole = ask(client, "tell me", seed=5)
    stream = list(ask(client, "tell me", seed=5, stream=True, stream_options={"include_usage": True}))
    texts = [part.choices[0].delta.content or "" for part in stream if part.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert sum(bool(text) for text in texts) > 1
    assert stream[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert stream[-1].usage == whole.usage
    assert whole._request_id


def test_choices_come_prompt_by_prompt(served: Served) -> None:
    found = served.client.completions.create(model="slow", prompt=["one", "two"], n=2, max_tokens=5)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (6, 20)


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"logprobs": True}, openai.BadRequestError, "logprobs"),
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"stream": True, "temperature": -1}, openai.BadRequestError, "temperature"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(served: Served, fields: Any, error: Any, param: str) -> None:
    messages: Any = [{"role": "user", "content": "x"}]
    with pytest.raises(error) as caught:
        served.client.chat.completions.create(**{"model": "slow", "messages": messages, **fields})
    assert caught.value.param == param


def test_the_async_client_is_answered_whole_and_streamed(served: Served) -> None:
    """Both routes with `AsyncOpenAI`: its pieces make up the whole answer, and its errors are the sync client's."""

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=8) as client:
            messages: Any = [{"role": "user", "content": "tell me"}]
            chat: Any = {"model": "slow", "messages": messages, "seed": 5}
            whole = await client.chat.completions.create(**chat)
            pieces = [piece async for piece in await client.chat.completions.create(**chat, stream=True)]
            texts = [piece.choices[0].delta.content or "" for piece in pieces]
            assert "".join(texts) == whole.choices[0].message.content
            assert sum(bool(text) for text in texts) > 1
            assert whole._request_id
            text: Any = {"model": "slow", "prompt": ["one", "two"], "n": 2, "max_tokens": 5, "seed": 1}
            found = await client.completions.create(**text)
            assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
            usage = {"include_usage": True}
            streamed = await client.completions.create(**text, stream=True, stream_options=usage)
            parts = [part async for part in streamed]
            for choice in found.choices:
                own = [each.text for part in parts for each in part.choices if each.index == choice.index]
                assert "".join(own) == choice.text
            assert parts[-1].usage == found.usage
            many = [client.chat.completions.create(**chat) for _ in range(20)]
            answers = await asyncio.gather(*many)
            assert {answer.choices[0].message.content for answer in answers} == {whole.choices[0].message.content}
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(**chat, stream=True, temperature=-1)
            assert caught.value.param == "temperature"

    asyncio.run(main())


@pytest.mark.parametrize("is_stream", [False, True])
def test_what_an_engine_refuses_is_a_400(served: Served, is_stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(served.client, "refuse this", stream=is_stream)
    assert caught.value.type == "invalid_request_error"


def test_an_engine_that_dies_of_a_request_is_a_503_and_another_comes(served: Served) -> None:
    """Not a 500: it may be sent again, and says when."""
    client = served.client.with_options(max_retries=0)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, "die of this")
    assert (caught.value.status_code, caught.value.code) == (503, "engine_unavailable")
    assert int(caught.value.response.headers["retry-after"]) > 0
    assert caught.value.response.headers.get_list("x-request-id") == [caught.value.request_id]
    served.wait_up()


def test_a_thousand_requests_at_once_are_answered_or_told_to_wait(served: Served) -> None:
    """No error but 429, which says when to come again."""

    async def main() -> tuple[int, int]:
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=200) as client:
            messages: Any = [{"role": "user", "content": "x"}]
            asked = [client.chat.completions.create(model="slow", messages=messages, max_tokens=2) for _ in range(1000)]
            found = await asyncio.gather(*asked, return_exceptions=True)
        refused = [each for each in found if isinstance(each, openai.RateLimitError)]
        assert all(int(error.response.headers["retry-after"]) > 0 for error in refused)
        answers = [each for each in found if isinstance(each, openai.types.chat.ChatCompletion)]
        assert len(answers) + len(refused) == 1000, {type(each) for each in found}
        return len(answers), len(refused)

    num_answered, _ = asyncio.run(main())
    assert num_answered >= 2 * ENGINE["max_inflight"]  # as many as one engine takes at a time


def test_an_answer_that_is_cut_off_leaves_no_work_behind(served: Served) -> None:
    """A client that stops listening: its place is free again."""

    def count_under_way() -> float:
        text = served.client.get(f"{served.url[:-3]}/metrics", cast_to=str)
        lines = [line for line in text.splitlines() if line.startswith("batchgen_engine_interactive_inflight{")]
        assert lines
        return sum(float(line.split()[-1]) for line in lines)

    with ask(served.client, "tell me", stream=True) as stream:
        next(iter(stream))
    give_up_at = time.monotonic() + 120
    while count_under_way():
        assert time.monotonic() < give_up_at
        time.sleep(0.2)


def describe() -> dict[str, Any]:
    """As the ingress describes itself."""
    with tempfile.TemporaryDirectory() as store:
        spec = make_endpoint({"store": store, "models": {"slow": {"engine": ENGINE}}})
        nobody: Any = None
        return create_app(Endpoint(spec, State(store), None), [create_completions_router(nobody, {}, {})]).openapi()


schema = schemathesis.openapi.from_dict(describe()).include(path_regex="completions$")


@schema.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_interactive_answer_is_as_described(served: Served, case: schemathesis.Case) -> None:
    if isinstance(case.body, dict) and case.body.get("model") not in (None, "slow") and len(str(case.body)) % 4:
        case.body["model"] = "slow"  # else nearly all are of a model that is not there
    if isinstance(case.body, dict) and case.body.get("stream") is True:
        case.body["stream"] = False  # a stream is no JSON to be checked; the others look at those
    case.call_and_validate(base_url=served.url[:-3], checks=CHECKS)


def test_the_description_is_the_ingresss_own(served: Served) -> None:
    own = served.client.get(f"{served.url[:-3]}/openapi.json", cast_to=object)
    described = describe()
    assert isinstance(own, dict)
    assert {path: own["paths"][path] for path in described["paths"]} == described["paths"]
    assert own["components"] == described["components"]


def test_interactive_requests_and_the_earlier_deadline_go_before_bulk(served: Served) -> None:
    client = served.client
    late, early = start_batch(client, 200), start_batch(client, 40, "1h")
    ask(client, "quick", max_tokens=6)
    assert client.batches.retrieve(late.id).status == "in_progress"
    check_whole(client, wait_ended(client, early.id), 40)
    assert client.batches.retrieve(late.id).status == "in_progress"
    check_whole(client, wait_ended(client, late.id), 200)


def test_interactive_requests_go_on_while_the_controller_is_away(served: Served) -> None:
    client = served.client.with_options(max_retries=0)
    ask(client, "hello")  # the ingress knows the engine
    served.kill(PARTS[1])
    for _ in range(5):
        assert ask(client, "hello").choices[0].message.content
    served.wait_up()


def test_each_part_is_killed_and_nothing_is_lost_or_there_twice(served: Served) -> None:
    kill_in_turn(served, list(PARTS), num_rows=260, gap=30)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_twenty_kills(served: Served) -> None:
    kill_in_turn(served, [PARTS[number % 3] for number in range(20)], num_rows=6000, gap=100)


def kill_in_turn(served: Served, parts: list[str], *, num_rows: int, gap: int) -> None:
    """Each kill meets the batch at another place, counted in rows; where restarts take long it may be over before. Only
    what a kill put at risk is asked for again: of an engine all that was not journaled yet, of a controller what was in
    flight (its engine journals the rest), of an ingress nothing."""
    client, calls = served.client, str(served.folder / "calls")
    ledger = Ledger(State(str(served.folder / "store")), calls, LOCAL_TENANT)
    batch = start_batch(client, num_rows)
    ledger.batch_ids = [batch.id]
    losses = {PARTS[0]: None, PARTS[1]: ENGINE["max_inflight"], PARTS[2]: 0}
    for part in parts:
        wait_for_calls(calls, gap, lambda: client.batches.retrieve(batch.id).status == "completed")
        served.kill(part)
        ledger.note(max_lost=losses[part])
        served.wait_up()
    check_whole(client, wait_ended(client, batch.id, 120 + num_rows / 10), num_rows)
    num_again = ledger.check(num_rows)
    print(f"{len(parts)} kills, {num_rows} rows: {num_again} generated again; safe at the kills: {ledger.num_safe}")
    assert ledger.num_safe[-1] > 0


def test_its_metrics_are_prometheus(served: Served) -> None:
    """A controller that was started anew counts its engine once it has heard of it."""
    give_up_at = time.monotonic() + 120
    while 'batchgen_engines_up{model="slow"} 1' not in served.client.get(f"{served.url[:-3]}/metrics", cast_to=str):
        assert time.monotonic() < give_up_at
        time.sleep(0.5)


def test_a_signal_drains_it(served: Served) -> None:
    """Last: what is there afterwards is nothing."""
    os.kill(served.process.pid, signal.SIGTERM)
    assert served.process.wait(60) == 0
