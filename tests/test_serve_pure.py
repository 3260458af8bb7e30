"""The endpoint's decisions, which need no server: lines, states, ranges, rates, pages, keys, and a create made once."""

import asyncio
import itertools
import json
import logging
import pickle
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi import APIRouter
from hypothesis import given
from hypothesis import strategies as st
from store_kinds import sure

from batchgen.driver.lease import acquire
from batchgen.errors import InputChanged, LeaseHeld, OutputError, Refusal, SpecError, StorageError
from batchgen.manifest import LOCK, SPEC
from batchgen.serve import described, records
from batchgen.serve.app import create_app
from batchgen.serve.batch_spec import make_batch_spec
from batchgen.serve.bodies import COMMON, INERT, ONLY_CHAT, ONLY_TEXT, read_body
from batchgen.serve.body_sampling import Abilities
from batchgen.serve.claims import Claims
from batchgen.serve.conductor import Conductor
from batchgen.serve.door import BulkJob
from batchgen.serve.endpoint import Endpoint
from batchgen.serve.errors import ApiError
from batchgen.serve.ids import is_batch_id, is_file_id, make_batch_id, make_file_id
from batchgen.serve.jobs import Jobs
from batchgen.serve.keys import KeyRing, check_bind, hash_key, make_key, parse_keys
from batchgen.serve.lines import Line, LineCheck, LineTooLong, split_lines
from batchgen.serve.load import make_endpoint
from batchgen.serve.once import choose_batch_id
from batchgen.serve.paging import list_after
from batchgen.serve.parts import PartWriter, read_content
from batchgen.serve.ranges import Unsatisfiable, parse_range
from batchgen.serve.rates import Rates
from batchgen.serve.records import BatchRecord, FileRecord, JobInput
from batchgen.serve.results import Tally
from batchgen.serve.routes_page import FRESH_S, RecentReports
from batchgen.serve.spec import Limits, ServedModel
from batchgen.serve.state import State, make_batch_path
from batchgen.serve.steps import FORGET_S, Steps, is_passing
from batchgen.serve.sweep import sweep
from batchgen.serve.upload import receive_file
from batchgen.serve.wire import CHAT, COMPLETIONS, TERMINAL, Batch, BatchUsage, RequestCounts
from batchgen.specs.engine import SimulatedEngineSpec
from batchgen.storage import Storage
from batchgen.stores.local import LocalClient

# ---- lines


@given(st.lists(st.binary(max_size=12).filter(lambda line: b"\n" not in line), max_size=8), st.integers(1, 5))
def test_lines_are_the_same_however_the_bytes_arrive(lines: list[bytes], size: int) -> None:
    text = b"\n".join(lines)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    stripped = [(number, line.strip(b" \t\r")) for number, line in enumerate(lines, 1)]
    found = list(split_lines(pieces, 1000))
    if not text.startswith(b"\xef\xbb\xbf"):
        assert found == [(number, line) for number, line in stripped if line]


def test_a_line_that_never_ends_is_not_held() -> None:
    endless = (b"x" * 1000 for _ in itertools.count())
    with pytest.raises(LineTooLong) as caught:
        list(split_lines(endless, 5000))
    assert caught.value.number == 1


# ---- states


def make_record(status: str = "validating", **fields: object) -> BatchRecord:
    batch = Batch(
        id=make_batch_id(0.0),
        endpoint=CHAT,
        input_file_id="file-x",
        completion_window="24h",
        status=status,  # type: ignore[arg-type]
        created_at=100,
        expires_at=1000,
    )
    return BatchRecord(batch=batch, tenant="acme", output_expires_s=3600, **fields)  # type: ignore[arg-type]


INPUT = JobInput(url="/in", form="messages", has_tools=False, num_rows=9)
CHANGES = {
    "begin": lambda record, now: records.begin(record, INPUT, "m", 9, now),
    "fail": lambda record, now: records.fail(record, [], now),
    "refuse": lambda record, now: records.refuse(record, [], now),
    "count": lambda record, now: records.count(record, int(now) % 12, int(now) % 5),
    "cancel": records.cancel,
    "expire": records.expire,
    "finalize": records.finalize,
    "finish": lambda record, now: records.finish(
        record, RequestCounts(total=9, completed=7, failed=2), BatchUsage(), "file-o", None, now
    ),
}
LEGAL = {
    ("validating", "in_progress"),
    ("validating", "failed"),
    ("validating", "cancelling"),
    ("in_progress", "failed"),
    ("in_progress", "finalizing"),
    ("in_progress", "cancelling"),
    ("finalizing", "completed"),
    ("finalizing", "expired"),
    ("finalizing", "failed"),  # with what was finished: not OpenAI's, who keep a job's model as it was
    ("cancelling", "cancelled"),
}


@given(st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(100, 2000)), max_size=12))
def test_states_change_as_the_contract_says_only(steps: list[tuple[str, int]]) -> None:
    record = make_record()
    for (name, _), now in zip(steps, sorted(now for _, now in steps), strict=True):
        known, record = record, CHANGES[name](record, float(now)) or record
        before, after = known.batch, record.batch
        assert before.status == after.status or (before.status, after.status) in LEGAL
        if before.status in TERMINAL:
            assert record is known
        if before.status == after.status == "in_progress":
            assert after.request_counts.completed >= before.request_counts.completed
            assert after.request_counts.failed >= before.request_counts.failed
            assert after.request_counts.completed + after.request_counts.failed <= after.request_counts.total
        if after.status in TERMINAL:
            assert getattr(after, f"{after.status}_at") is not None
            counts = after.request_counts
            assert counts.total == counts.completed + counts.failed
        if after.status == "expired":
            assert after.expired_at is not None
            assert after.expired_at >= 1000
        assert BatchRecord.model_validate_json(record.model_dump_json()) == record


def test_result_files_have_ids_that_are_always_the_same() -> None:
    record = make_record()
    first, error = (records.make_result_file_id(record, kind) for kind in ("output", "error"))  # type: ignore[arg-type]
    assert is_file_id(first)
    assert is_file_id(error)
    assert first != error
    assert first == records.make_result_file_id(record, "output")
    assert first != records.make_result_file_id(make_record(), "output")


def test_usage_that_is_not_known_of_every_line_is_null() -> None:
    tally, known = Tally(), {"prompt_tokens": 3, "completion_tokens": 4}
    tally.add(known, [{"reasoning": None}])
    usage = tally.make_usage()
    assert usage is not None
    assert usage.total_tokens == 7
    tally.add(None, [{"reasoning": None}])
    assert tally.make_usage() is None


def test_ids_are_in_the_order_of_their_making_and_unlike_each_other() -> None:
    ids = [make_file_id(1_700_000_000 + number / 1000) for number in range(100)]
    assert ids == sorted(ids)
    assert len({id_[17:] for id_ in ids}) == 100
    assert is_batch_id(make_batch_id(1e9))
    for text in ("file-" + "0" * 31, "file-" + "G" * 32, "file-" + "0" * 33, "file-" + "0" * 32 + "\n", "../x"):
        assert not is_file_id(text)


# ---- bodies

EVERYTHING = Abilities(
    forms=frozenset({"messages", "text", "token_ids"}),
    refused=frozenset(),
    guided_forms=frozenset({"json_schema"}),
    has_logprobs=True,
    can_use_tools=True,
    can_think=True,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted(
    [
        *("messages", "prompt", "n", "stop", "max_tokens", "logprobs", "top_logprobs", "tools", "tool_choice", "seed"),
        *("response_format", "chat_template_kwargs", "temperature", "stop_token_ids", "logit_bias", "best_of", "user"),
    ]
)


@given(
    st.sampled_from([CHAT, COMPLETIONS]),
    st.dictionaries(st.sampled_from(NAMES), JSON, max_size=5),
    st.booleans(),
)
def test_any_body_is_rows_or_a_400(endpoint: str, body: dict[str, object], is_whole: bool) -> None:
    if is_whole:
        body |= {"messages": [{"role": "user", "content": "x"}]} if endpoint == CHAT else {"prompt": "x"}
    refused: ApiError | None = None
    try:
        asked = read_body(endpoint, {"model": "m", **body}, EVERYTHING)
    except ApiError as error:
        refused = error
    if refused is None:
        assert 1 <= len(asked.rows) <= EVERYTHING.max_choices
    else:
        assert refused.status == 400
        assert pickle.loads(pickle.dumps(refused)).make_body() == refused.make_body()


LINE = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": st.sampled_from(["a", "b", "\ud800"]) | JSON,
        "method": st.just("POST") | JSON,
        "url": st.just(CHAT) | JSON,
        "body": st.just({"model": "m"}) | st.fixed_dictionaries({"model": st.sampled_from(["m", "n"]) | JSON}) | JSON,
    },
)


@given(st.lists(st.binary(max_size=30) | LINE.map(lambda line: json.dumps(line).encode()), max_size=6))
def test_any_line_is_a_request_or_a_fault_that_names_it(lines: list[bytes]) -> None:
    check, keys = LineCheck(CHAT, ["m"]), []
    for number, raw in split_lines([b"\n".join(lines)], 10_000):
        found = check.check(number, raw)
        assert (found.number if isinstance(found, Line) else found.line) == number
        keys += [found.custom_id] if isinstance(found, Line) else []
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("depth", [90, 110, 400, 900])
@pytest.mark.parametrize("where", ["messages", "tools", "response_format", "metadata"])
def test_a_body_nested_as_deep_as_json_goes_is_rows_or_a_400(where: str, depth: int) -> None:
    deep = json.loads('{"a":' * depth + "1" + "}" * depth)
    bodies: dict[str, object] = {
        "messages": [{"role": "user", "content": "x", "name": deep}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": deep}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}},
        "metadata": deep,
    }
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], where: bodies[where]}
    if depth < 100:
        assert len(read_body(CHAT, body, EVERYTHING).rows) == 1
        return
    with pytest.raises(ApiError) as caught:
        read_body(CHAT, body, EVERYTHING)
    assert caught.value.status == 400


@pytest.mark.parametrize("name", ["top_k", "max_tokens", "seed", "n", "stop_token_ids", "temperature", "min_p"])
def test_a_number_beyond_all_engines_is_a_400(name: str) -> None:
    for value in (10**400, 2**63, -1):
        body = {"model": "m", "prompt": "x", name: [value] if name == "stop_token_ids" else value}
        with pytest.raises(ApiError) as caught:
            read_body(COMPLETIONS, body, EVERYTHING)
        assert (caught.value.status, caught.value.param) == (400, name)


def test_what_a_body_becomes() -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        "max_completion_tokens": 7,
        "stop": "END",
        "logprobs": True,
        "top_logprobs": 2,
        "n": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "chat_template_kwargs": {"thinking": True},
        "user": "u",
    }
    asked = read_body(CHAT, body, EVERYTHING)
    assert (asked.form, len(asked.rows), asked.num_samples, asked.has_tools) == ("messages", 2, 2, True)
    assert asked.rows[0]["messages"] == '[{"role": "user", "content": "ab"}]'
    with pytest.raises(ApiError) as caught:
        read_body(CHAT, {**body, "max_completion_tokens": 0}, EVERYTHING)
    assert caught.value.param == "max_completion_tokens"
    for part in ('"max_tokens": 7', '"stop": ["END"]', '"logprobs": 2', '"thinking": true', '"json_schema"'):
        assert part in asked.rows[0]["sampling"]


def test_the_description_names_every_field_that_a_body_may_hold() -> None:
    assert set(described.CHAT_FIELDS) == COMMON | INERT | ONLY_CHAT
    assert set(described.TEXT_FIELDS) == COMMON | INERT | ONLY_TEXT


# ---- ranges, rates, pages, keys


@given(st.integers(0, 50), st.one_of(st.none(), st.integers(0, 60)), st.one_of(st.none(), st.integers(0, 60)))
def test_a_range_lies_in_the_file(num_bytes: int, first: int | None, last: int | None) -> None:
    header = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    try:
        part = parse_range(header, num_bytes)
    except Unsatisfiable:
        assert num_bytes == 0 or (first is not None and first >= num_bytes) or (first is None and last == 0)
    else:
        assert part is None or 0 <= part[0] < part[1] <= num_bytes


def test_a_tenants_rate_fills_again() -> None:
    rates = Rates()
    let_in = [rates.take("a", 60, 0.0) is None for _ in range(20)]
    assert let_in == [True] * 10 + [False] * 10
    wait_s = rates.take("a", 60, 0.0)
    assert wait_s == 1
    assert rates.take("b", 60, 0.0) is None
    assert rates.take("a", 60, float(wait_s)) is None


def test_pages() -> None:
    ids = ["a", "b", "c", "d"]
    assert list_after(ids, None, "desc") == ["d", "c", "b", "a"]
    assert list_after(ids, "c", "desc") == ["b", "a"]
    assert list_after(ids, "bb", "asc") == ["c", "d"]


def test_keys_are_kept_as_digests() -> None:
    key, line = make_key("acme")
    ring = parse_keys(f"# ours\n\n{line}  # made today\n", "keys")
    assert key not in line
    assert ring.find_tenant(key) == "acme"
    assert ring.find_tenant(key[:-1]) is None
    assert ring == KeyRing({hash_key(key): "acme"})
    for text in ("", "# none\n", f"acme {key}", f"../x sha256:{hash_key(key)}", "acme sha256:xyz"):
        with pytest.raises(SpecError) as caught:
            parse_keys(text, "keys")
        assert key not in str(caught.value)
    with pytest.raises(SpecError):
        check_bind("0.0.0.0", None)
    check_bind("127.0.0.1", None)
    check_bind("0.0.0.0", ring)


def test_an_endpoint_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    good = {"store": str(tmp_path), "models": {"m": {"engine": {"kind": "simulated"}}}}
    assert make_endpoint(good).models["m"].engine.kind == "simulated"
    for change in (
        {"models": {}},
        {"models": {"a b": {"engine": {"kind": "simulated"}}}},
        {"models": {"m": {"engine": {"kind": "simulated"}, "sampling": {"n": 2}}}},
        {"tenants": {"../x": {}}},
        {"store": "memory://x"},
        {"surprise": 1},
    ):
        with pytest.raises(SpecError):
            make_endpoint({**good, **change})


def test_what_crosses_a_process_pickles() -> None:
    bulk = BulkJob("batch_1", "acme", "m", 5.0)
    assert pickle.loads(pickle.dumps(bulk)) == bulk


# ---- what lies in the store


@sure
def test_creates_at_once_are_one_batch(root: str) -> None:
    """Eight repetitions of one create race; so do eight of one key."""
    state = State(root)
    for key, is_repeat in ((None, True), ("k", False)):
        start = threading.Barrier(8)

        def ask(key: str | None, is_repeat: bool, start: threading.Barrier) -> str:
            start.wait()
            return choose_batch_id(state, "acme", "{}", make_batch_id(state.now()), key=key, is_repeat=is_repeat)

        with ThreadPoolExecutor(8) as threads:
            made = [threads.submit(ask, key, is_repeat, start) for _ in range(8)]
        assert len({work.result() for work in made}) == 1


def test_a_late_first_try_takes_its_repetitions_batch(tmp_path: Path) -> None:
    state = State(str(tmp_path), now=lambda: 1000.0)
    again = choose_batch_id(state, "acme", "{}", "second", key=None, is_repeat=True)
    assert choose_batch_id(state, "acme", "{}", "first", key=None, is_repeat=False) == again == "second"
    assert choose_batch_id(state, "acme", "{}", "another", key=None, is_repeat=False) == "another"
    assert choose_batch_id(state, "acme", "{1}", "other", key=None, is_repeat=False) == "other"
    assert choose_batch_id(state, "acme", "{1}", "meant", key=None, is_repeat=False) == "meant"


@sure
def test_two_changes_at_once_are_both_made_or_refused(root: str) -> None:
    """Of a cancel and an end of the run, whichever comes first decides."""
    state = State(root)
    for _ in range(5):
        record = make_record("in_progress", input=INPUT)
        assert state.create_batch(record)
        assert not state.create_batch(record)
        changes = [lambda known: records.cancel(known, 500.0), lambda known: records.finalize(known, 500.0)]
        with ThreadPoolExecutor(2) as threads:
            made = [threads.submit(state.change_batch, "acme", record.id, change) for change in changes]
        assert sorted(work.result()[1] for work in made) == [False, True]


def test_an_unknown_id_opens_no_job_and_a_lock_elsewhere_is_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, lock = Storage(str(tmp_path / "jobs" / "acme" / "nightly")), Storage(str(tmp_path / "locks" / "x"))
    out.put(LOCK, json.dumps({"root": lock.root}).encode())
    lease = acquire(lock, 30.0)
    jobs = Jobs(str(tmp_path / "jobs"))
    (job,) = jobs.list("acme")
    assert job.read().status == "in_progress"
    assert job.cancel().status == "cancelling"
    lease.release()
    assert job.read().status == "failed"
    assert (found := jobs.find("acme", job.id)) is not None
    assert (found.id, found.storage.root) == (job.id, out.root)
    assert jobs.find("globex", job.id) is None
    out.put(LOCK, b"{")  # whoever opens it says so
    assert jobs.find("acme", make_batch_id(0.0)) is None
    assert caplog.messages == []
    assert jobs.find("acme", job.id) is None
    assert "a job is not shown" in caplog.text


def test_a_report_is_made_once_for_all_pages_that_are_open(tmp_path: Path) -> None:
    now = [100.0]
    recent = RecentReports(clock=lambda: now[0])
    spec = make_batch_spec(
        ServedModel(engine=SimulatedEngineSpec(kind="simulated")), "text", input_url="/-", out_url="/-"
    )
    storage = Storage(str(tmp_path))
    storage.put(SPEC, json.dumps({"fingerprint": "f", "spec": spec.model_dump(mode="json")}).encode())
    first = recent.read(storage)
    assert recent.read(storage) is first
    now[0] += FRESH_S
    assert recent.read(storage) is not first


def test_the_sweep_deletes_what_nobody_wants(tmp_path: Path) -> None:
    now = [1_000_000.0]
    state = State(str(tmp_path), now=lambda: now[0])
    old, kept, abandoned = make_file_id(now[0]), make_file_id(now[0]), make_file_id(now[0])
    for file_id, expires_at in ((old, 1_003_600), (kept, None)):
        writer = PartWriter(state, "acme", file_id)
        writer.write(b"x" * 10)
        fields = {"filename": "f", "purpose": "batch", "created_at": 1_000_000, "expires_at": expires_at}
        state.create_file(FileRecord(id=file_id, tenant="acme", part_bytes=writer.close(), **fields))
    state.begin_upload("acme", abandoned)
    writer = PartWriter(state, "acme", abandoned)
    writer.add(b"y")
    writer.close()
    damaged = make_file_id(now[0] - 1.0)  # the first that it comes to
    sweep(state, pytest.fail)
    assert len(state.storage.list_files("t")) == 5
    now[0] += 2 * 86400
    assert state.read_file("acme", old) is None
    state.storage.put(f"t/acme/files/{damaged}.json", b"{")
    state.storage.put("once/acme/damaged.json", b"[]")
    told: list[str] = []
    sweep(state, told.append)
    assert len(told) == 2
    assert damaged in told[0]
    assert "once/acme/damaged.json" in told[1]
    state.storage.delete(f"t/acme/files/{damaged}.json")
    assert [info.path.split("/")[3].removesuffix(".json") for info in state.storage.list_files("t")] == [kept, kept]
    assert state.list_uploads() == []
    record = state.read_file("acme", kept)
    assert record is not None
    assert b"".join(read_content(state, record, 2, 5)) == b"xxx"


def test_a_create_that_takes_an_old_id_over_keeps_its_sign(tmp_path: Path) -> None:
    """The key's note is hours old when the create comes through at last; the conductor looks before its record is there."""
    now = [1_000_000.0]
    state = State(str(tmp_path), now=lambda: now[0])
    spec = make_endpoint({"store": str(tmp_path), "models": {"m": {"engine": {"kind": "simulated"}}}})
    steps, claims = Steps(spec, state, print), Claims(state, 30.0)
    old = make_record().model_copy(
        update={"batch": make_record().batch.model_copy(update={"id": make_batch_id(now[0])})}
    )
    now[0] += 2 * FORGET_S
    assert state.create_batch(old)
    steps.forget("acme", old.id, None, claims)
    assert state.list_open() == [("acme", old.id)]
    now[0] += 2 * FORGET_S
    steps.forget("acme", old.id, None, claims)
    assert state.list_open() == []


class Lossy(State):
    """Writes records and loses the reply."""

    def create_file(self, record: FileRecord) -> None:
        super().create_file(record)
        raise StorageError("no reply")


def test_an_upload_whose_record_may_be_there_keeps_its_parts(tmp_path: Path) -> None:
    state = Lossy(str(tmp_path))
    parts = [b'form-data; name="purpose"\r\n\r\nbatch', b'form-data; name="file"; filename="f"\r\n\r\nabc']
    body = b"".join(b"--b\r\nContent-Disposition: " + part + b"\r\n" for part in parts) + b"--b--\r\n"

    async def send() -> AsyncIterator[bytes]:
        yield body

    with pytest.raises(StorageError, match="no reply"):
        asyncio.run(receive_file(state, "acme", "multipart/form-data; boundary=b", send(), Limits()))
    (file_id,) = state.list_file_ids("acme")
    record = state.read_file("acme", file_id)
    assert record is not None
    assert b"".join(read_content(state, record)) == b"abc"
    assert state.list_uploads() == [("acme", file_id)]  # for the sweep, where it was not


def test_a_cancelled_upload_is_left_to_the_sweep(tmp_path: Path) -> None:
    """A part may be on its way in its thread when the call that wrote it is gone."""
    state = State(str(tmp_path))

    async def send() -> AsyncIterator[bytes]:
        yield b"--b\r\n"
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(receive_file(state, "acme", "multipart/form-data; boundary=b", send(), Limits()))
    assert len(state.list_uploads()) == 1


def test_a_store_without_conditional_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalClient, "can_replace", False)
    with pytest.raises(OutputError, match="conditional writes"):
        State(str(tmp_path)).check_store()
    assert Storage(str(tmp_path)).list_folders("none") == []


def test_an_answer_that_is_an_error_pickles() -> None:
    error = ApiError(429, "wait", kind="rate_limit_error", param="model", code="busy", retry_after_s=3)
    again = pickle.loads(pickle.dumps(error))
    assert (again.status, str(again), again.retry_after_s) == (429, "wait", 3)
    assert again.make_body() == error.make_body()


def test_a_fault_of_our_own_has_an_id_and_is_logged_without_its_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    router = APIRouter()

    @router.get("/v1/fault")
    def fail() -> None:
        raise ValueError("a prompt's own text")

    spec = make_endpoint({"store": str(tmp_path), "models": {"m": {"engine": {"kind": "simulated"}}}})
    app = create_app(Endpoint(spec, State(spec.store), None), [router])

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get("/v1/fault")

    with caplog.at_level(logging.INFO):
        response = asyncio.run(main())
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    lines = [json.loads(record.message) for record in caplog.records if record.name == "batchgen.audit"]
    assert [(line["request_id"], line["status"]) for line in lines] == [(response.headers["x-request-id"], 500)]
    assert "ValueError in " in caplog.text
    assert "own text" not in caplog.text + response.text


def test_a_store_that_is_away_refuses_no_batch() -> None:
    def make(cause: Exception | None) -> Refusal:
        error = Refusal("x")
        error.__cause__ = cause
        return error

    assert is_passing(make(StorageError("away")))
    assert is_passing(LeaseHeld("another run"))
    assert not is_passing(make(InputChanged("the dataset is another")))
    assert not is_passing(make(None))
    assert not is_passing(OutputError("another model"))


def test_what_is_damaged_holds_up_no_other_batch(tmp_path: Path) -> None:
    state, told = State(str(tmp_path)), list[str]()
    spec = make_endpoint({"store": str(tmp_path), "models": {"m": {"engine": {"kind": "simulated"}}}})
    made = sorted((make_record() for _ in range(3)), key=lambda record: record.id)  # the order in which they are taken
    for record in made:
        state.create_batch(record)
    state.storage.put(make_batch_path("acme", made[0].id), b"{")
    state.storage.put(f"claims/{made[1].id}/_batchgen/lease/000000001.json", b"{")
    conductor = Conductor(spec, state, say=told.append)
    conductor.start()
    give_up_at = time.monotonic() + 60
    while (known := state.read_batch("acme", made[2].id)) is None or known.batch.status != "failed":
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    conductor.stop()
    assert any(made[0].id in each for each in told)
    assert any(made[1].id in each for each in told)


class Faulty(State):
    """In place of a bug that one file brings out every time."""

    def read_file(self, tenant: str, file_id: str) -> FileRecord | None:
        raise ZeroDivisionError(f"{tenant} {file_id}")


def test_a_file_that_our_own_fault_lies_in_fails_its_batch(tmp_path: Path) -> None:
    state, told, record = Faulty(str(tmp_path)), list[str](), make_record()
    spec = make_endpoint({"store": str(tmp_path), "models": {"m": {"engine": {"kind": "simulated"}}}})
    state.create_batch(record)
    conductor = Conductor(spec, state, say=told.append)
    conductor.start()
    give_up_at = time.monotonic() + 60
    while (known := state.read_batch("acme", record.id)) is None or known.batch.status != "failed":
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    conductor.stop()
    assert known.batch.errors is not None
    assert [error.code for error in known.batch.errors.data] == ["internal_error"]
    assert len(told) == 3
    assert all("ZeroDivisionError" in each for each in told)
