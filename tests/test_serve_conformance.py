"""What a client of OpenAI's Files and Batches API relies on, line by line, with the real `openai` package: each runs with
`OpenAI` and with `AsyncOpenAI`. Its docstring is the line of the contract that it holds."""

import asyncio
import contextlib
import hashlib
import inspect
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serve_process import CHAT, TERMINAL, Losing, Server, end_window, make_endpoint_tree, make_jsonl, make_line, running

from batchgen.serve.claims import Claims
from batchgen.serve.ids import make_batch_id
from batchgen.serve.records import BatchRecord
from batchgen.serve.state import State, make_batch_path
from batchgen.serve.wire import Batch

MIB = 2**20
Line = dict[str, Any]


class Sdk:
    """One of the package's clients; both are called alike here, the asynchronous one on a loop of its own."""

    def __init__(self, kind: str, server: Server, tenant: str = "acme", **fields: Any) -> None:
        create = openai.OpenAI if kind == "sync" else openai.AsyncOpenAI
        known: dict[str, Any] = {"base_url": server.url, "max_retries": 0, "timeout": 60}
        self.client: Any = create(api_key=server.keys[tenant], **{**known, **fields})
        self.kind, self.server, self._loop = kind, server, asyncio.new_event_loop()
        self._others: list[Sdk] = []

    def as_tenant(self, tenant: str, **fields: Any) -> "Sdk":
        """Closed with this one."""
        self._others.append(other := Sdk(self.kind, self.server, tenant, **fields))
        return other

    def close(self) -> None:
        """An asynchronous client that is only dropped leaves its sockets to whichever test the collector comes by in."""
        for other in self._others:
            other.close()
        self.call("close")
        self._loop.close()

    def call(self, name: str, *args: Any, **fields: Any) -> Any:
        """`files.create`, say."""
        method = self.client
        for part in name.split("."):
            method = getattr(method, part)
        made = method(*args, **fields)
        return self._loop.run_until_complete(_wait(made)) if inspect.isawaitable(made) else made

    def list_all(self, name: str, **fields: Any) -> list[Any]:
        """All pages of a list."""
        if self.kind == "sync":
            return list(self.call(name, **fields))

        async def collect() -> list[Any]:
            what, _, method = name.partition(".")
            return [each async for each in getattr(getattr(self.client, what), method)(**fields)]

        return self._loop.run_until_complete(collect())

    def digest(self, file_id: str) -> tuple[str, int]:
        """(SHA-256, bytes) of a file that is streamed and never held."""
        seen, num_bytes = hashlib.sha256(), 0
        if self.kind == "sync":
            with self.client.files.with_streaming_response.content(file_id) as response:
                for piece in response.iter_bytes(MIB):
                    seen.update(piece)
                    num_bytes += len(piece)
            return seen.hexdigest(), num_bytes

        async def stream() -> int:
            num = 0
            async with self.client.files.with_streaming_response.content(file_id) as response:
                async for piece in response.iter_bytes(MIB):
                    seen.update(piece)
                    num += len(piece)
            return num

        num_bytes = self._loop.run_until_complete(stream())
        return seen.hexdigest(), num_bytes

    def upload(self, content: bytes) -> str:
        return str(self.call("files.create", file=("in.jsonl", content), purpose="batch").id)

    def create(self, lines: list[Line] | bytes, **fields: Any) -> openai.types.Batch:
        content = lines if isinstance(lines, bytes) else make_jsonl(lines)
        known = {"input_file_id": self.upload(content), "endpoint": CHAT, "completion_window": "24h"}
        made: openai.types.Batch = self.call("batches.create", **{**known, **fields})
        return made

    def wait(self, batch_id: str, states: set[str] = TERMINAL) -> openai.types.Batch:
        end = time.monotonic() + 60
        while (batch := self.call("batches.retrieve", batch_id)).status not in states:
            assert time.monotonic() < end
            time.sleep(0.02)
        found: openai.types.Batch = batch
        if found.status in TERMINAL:
            check_counts(found)
        return found

    def read(self, file_id: str | None) -> dict[str, Line]:
        if file_id is None:
            return {}
        lines = [json.loads(line) for line in self.call("files.content", file_id).text.splitlines()]
        return {line["custom_id"]: line for line in lines}


async def _wait(made: Any) -> Any:
    return await made


def check_counts(batch: openai.types.Batch) -> None:
    assert batch.request_counts is not None
    assert batch.request_counts.total == batch.request_counts.completed + batch.request_counts.failed


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("endpoint")
    tree = make_endpoint_tree(str(folder / "store"))
    with running(Server(folder, tree, tenants=("acme", "globex", "sync", "async"))) as started:
        yield started


@pytest.fixture(params=["sync", "async"])
def sdk(request: pytest.FixtureRequest, server: Server) -> Iterator[Sdk]:
    with contextlib.closing(Sdk(request.param, server)) as made:
        yield made


def test_create_and_retrieve(sdk: Sdk) -> None:
    """create/retrieve"""
    batch = sdk.create([make_line("a")], metadata={"team": "x"})
    assert isinstance(batch, openai.types.Batch)
    assert (batch.object, batch.endpoint, batch.metadata) == ("batch", CHAT, {"team": "x"})
    done = sdk.wait(batch.id)
    assert (done.id, done.input_file_id, done.status) == (batch.id, batch.input_file_id, "completed")


def test_list_in_two_pages(sdk: Sdk) -> None:
    """list (two pages)"""
    mine = sdk.as_tenant(sdk.kind)
    made = [mine.create([make_line("a")]).id for _ in range(3)]
    page = mine.call("batches.list", limit=2)
    assert [batch.id for batch in page.data] == made[:0:-1]
    assert page.has_more
    assert [batch.id for batch in mine.list_all("batches.list", limit=2)] == made[::-1]
    assert [batch.id for batch in mine.call("batches.list", after=made[1]).data] == made[:1]


STATES = ("validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


@pytest.mark.parametrize("status", STATES)
def test_cancel_in_each_state(sdk: Sdk, status: Any) -> None:
    """cancel in each state (cancel on terminal -> 409 or 400; not retried for ever by the SDK)

    A batch that stands in this state: its claim is held, so that no conductor takes it further."""
    state = State(sdk.server.tree["store"])
    fields = {"input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h", "created_at": int(time.time())}
    batch = Batch(id=make_batch_id(time.time()), status=status, expires_at=int(time.time()) + 86400, **fields)  # type: ignore[arg-type]
    persistent = sdk.as_tenant("acme", max_retries=5)
    with Claims(state, 30.0).hold(batch.id):
        state.create_batch(BatchRecord(batch=batch, tenant="acme", output_expires_s=3600))
        assert sdk.call("batches.retrieve", batch.id).status == status
        if status in ("validating", "in_progress", "cancelling"):
            assert persistent.call("batches.cancel", batch.id).status == "cancelling"
        else:
            with pytest.raises(openai.ConflictError) as caught:
                persistent.call("batches.cancel", batch.id)
            assert caught.value.request.headers["x-stainless-retry-count"] == "0"
            assert sdk.call("batches.retrieve", batch.id).status == status
        state.close_batch("acme", batch.id)
        state.storage.delete(make_batch_path("acme", batch.id))


def test_content_of_output_and_error_file_and_delete(sdk: Sdk) -> None:
    """content of output and error file/delete"""
    done = sdk.wait(sdk.create([make_line("good"), make_line("bad", temperature=9)]).id)
    answers, errors = sdk.read(done.output_file_id), sdk.read(done.error_file_id)
    assert (set(answers), set(errors)) == ({"good"}, {"bad"})
    openai.types.chat.ChatCompletion.model_validate(answers["good"]["response"]["body"])
    assert answers["good"]["error"] is None
    # An error with an HTTP status stands in the response's body.
    assert errors["bad"]["error"] is None
    assert errors["bad"]["response"]["status_code"] == 400
    assert errors["bad"]["response"]["body"]["error"]["param"] == "temperature"
    for file_id in (done.output_file_id, done.error_file_id, done.input_file_id):
        assert sdk.call("files.delete", file_id).deleted
        with pytest.raises(openai.NotFoundError):
            sdk.call("files.content", file_id)
    assert sdk.call("batches.retrieve", done.id).output_file_id == done.output_file_id


def test_another_tenants_ids_are_404(sdk: Sdk) -> None:
    """404 for other tenant's id"""
    batch = sdk.create([make_line("a")])
    theirs = sdk.as_tenant("globex")
    for name, id_ in (
        ("batches.retrieve", batch.id),
        ("batches.cancel", batch.id),
        ("files.retrieve", batch.input_file_id),
        ("files.content", batch.input_file_id),
        ("files.delete", batch.input_file_id),
    ):
        with pytest.raises(openai.NotFoundError):
            theirs.call(name, id_)
    sdk.wait(batch.id)


@pytest.mark.parametrize("end", ["completed", "failed", "expired", "cancelled"])
def test_counts_fit_at_every_end(sdk: Sdk, end: str) -> None:
    """counts satisfy total = completed+failed at every terminal state (`wait` looks at each)"""
    lines: Any = [make_line(f"r{number}", model="slow") for number in range(400)]
    batch = sdk.create(lines[:4] if end == "completed" else b"x\n" if end == "failed" else lines)
    if end in ("expired", "cancelled"):
        sdk.wait(batch.id, {"in_progress"})
    if end == "cancelled":
        sdk.call("batches.cancel", batch.id)
    if end == "expired":
        State(sdk.server.tree["store"]).change_batch("acme", batch.id, end_window)
    done = sdk.wait(batch.id)
    assert done.status == end
    assert getattr(done, f"{end}_at") is not None


def test_finalizing_is_seen(sdk: Sdk) -> None:
    """`finalizing` observable"""
    batch = sdk.create([make_line(f"r{number}") for number in range(2000)])
    assert sdk.wait(batch.id, {"finalizing", *TERMINAL}).status == "finalizing"
    assert sdk.wait(batch.id).finalizing_at is not None


def test_expired_with_partial_output(sdk: Sdk) -> None:
    """expired with partial output"""
    batch = sdk.create([make_line(f"r{number}", model="slow") for number in range(400)])
    while (counts := sdk.call("batches.retrieve", batch.id).request_counts).completed < 4:
        time.sleep(0.05)
    assert counts.failed == 0
    State(sdk.server.tree["store"]).change_batch("acme", batch.id, end_window)
    done = sdk.wait(batch.id)
    answers, errors = sdk.read(done.output_file_id), sdk.read(done.error_file_id)
    assert done.status == "expired"
    assert len(answers) >= 4
    assert {line["error"]["code"] for line in errors.values()} == {"batch_expired"}
    assert answers.keys() | errors.keys() == {f"r{number}" for number in range(400)}
    assert not answers.keys() & errors.keys()


def test_a_duplicate_custom_id_fails_with_its_line(sdk: Sdk) -> None:
    """duplicate custom_id -> `failed` with `line`"""
    done = sdk.wait(sdk.create([make_line("a"), make_line("b"), make_line("a")]).id)
    assert done.status == "failed"
    assert done.errors is not None
    assert done.errors.data
    assert (done.errors.data[0].code, done.errors.data[0].line) == ("duplicate_custom_id", 3)


def test_a_blank_last_line_and_crlf_are_accepted(sdk: Sdk) -> None:
    """blank last line and CRLF accepted"""
    content = make_jsonl([make_line("a"), make_line("b")]).replace(b"\n", b"\r\n") + b"\r\n\n"
    done = sdk.wait(sdk.create(content).id)
    assert (done.status, set(sdk.read(done.output_file_id))) == ("completed", {"a", "b"})


def test_50001_rows_fail(sdk: Sdk) -> None:
    """50,001 rows -> `failed`"""
    rest = b'","method":"POST","url":"/v1/chat/completions","body":{"model":"fast"}}\n'
    done = sdk.wait(sdk.create(b"".join(b'{"custom_id":"%d%s' % (row, rest) for row in range(50_001))).id)
    assert done.status == "failed"
    assert done.errors is not None
    assert done.errors.data
    assert (done.errors.data[0].code, done.errors.data[0].line) == ("too_many_requests", 50_001)


def test_every_response_has_a_request_id(sdk: Sdk) -> None:
    """`x-request-id` on each response; SDK `_request_id` set"""
    file = sdk.call("files.create", file=("in.jsonl", make_jsonl([make_line("a")])), purpose="batch")
    asked = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    batch = sdk.call("batches.create", **asked)
    found = [file, batch, sdk.call("batches.retrieve", batch.id), sdk.call("files.retrieve", file.id)]
    found += [sdk.call("models.retrieve", "fast"), sdk.call("files.delete", file.id)]
    ids = [each._request_id for each in found]
    assert all(id_.startswith("req_") for id_ in ids)
    assert len(set(ids)) == len(ids)
    for name in ("files", "batches", "models"):
        response = sdk.call(f"{name}.with_raw_response.list")
        assert response.headers["x-request-id"].startswith("req_")
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.call("files.retrieve", "file-none")
    assert str(caught.value.request_id).startswith("req_")
    wrong = sdk.as_tenant("acme")
    wrong.client.api_key = "sk-wrong"
    with pytest.raises(openai.AuthenticationError) as refused:
        wrong.call("models.list")
    assert str(refused.value.request_id).startswith("req_")


def test_a_create_that_timed_out_makes_one_batch(sdk: Sdk) -> None:
    """retry of a create that timed out gives one batch (the SDK's own retry, after a proxy lost the first reply)"""
    with Losing(sdk.server.port) as proxy:
        through = sdk.as_tenant("globex", base_url=f"http://127.0.0.1:{proxy.port}/v1", max_retries=2)
        file_id = through.upload(make_jsonl([make_line("once")]))
        proxy.loses_next = True
        batch = through.call("batches.create", input_file_id=file_id, endpoint=CHAT, completion_window="24h")
        assert not proxy.loses_next
    listed = sdk.as_tenant("globex").list_all("batches.list", limit=100)
    assert [each.id for each in listed if each.input_file_id == file_id] == [batch.id]
    again = sdk.as_tenant("globex").call(
        "batches.create", input_file_id=file_id, endpoint=CHAT, completion_window="24h"
    )
    assert again.id != batch.id  # no repetition: it was meant


def test_a_create_with_a_key_is_known_after_its_file_is_gone(sdk: Sdk) -> None:
    """The same for an `Idempotency-Key`, and whatever became of the input file since."""
    file_id = sdk.upload(make_jsonl([make_line("a")]))
    asked: Any = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    headers = {"Idempotency-Key": f"key-{file_id}"}
    batch = sdk.call("batches.create", **asked, extra_headers=headers)
    sdk.wait(batch.id)
    sdk.call("files.delete", file_id)
    assert sdk.call("batches.create", **asked, extra_headers=headers).id == batch.id
    with pytest.raises(openai.NotFoundError):
        sdk.call("batches.create", **asked)


def test_200_mb_go_through_without_being_held(sdk: Sdk, tmp_path: Path) -> None:
    """`files.content` streams 200 MB without loading it in memory (up as well; the process grows by less than a third)"""
    line = json.dumps(make_line("x", user="y" * 10_000)).encode() + b"\n"
    num_lines, path = 200 * 10**6 // len(line), tmp_path / "big.jsonl"
    with path.open("wb") as file:
        for _ in range(num_lines):
            file.write(line)
    before = sdk.server.read_peak_rss()
    with path.open("rb") as file:
        big = sdk.call("files.create", file=file, purpose="batch")
    with path.open("rb") as file:
        expected = hashlib.file_digest(file, "sha256").hexdigest()
    assert sdk.digest(big.id) == (expected, num_lines * len(line))
    assert sdk.server.read_peak_rss() - before < 60 * MIB
    sdk.call("files.delete", big.id)
