"""One worker with a real engine object and real files: what it says when things go wrong."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from makers import make_error, make_job_spec, make_lease, make_ok, make_rows

from batchgen.engines.deepseek_tokenizer import create_deepseek_tokenizer
from batchgen.engines.hf_tokenizer import HFTokenizer
from batchgen.engines.simulated import ByteTokenizer, SimulatedEngine
from batchgen.errors import EngineDied, InputError, SpecError
from batchgen.journal import make_segment_path, write_segment
from batchgen.queue.events import Heartbeat, PoolEvent, ShardCommitted, ShardFailed, WorkerLost
from batchgen.read import read_footer
from batchgen.records import Generation, Lease, Request, Shard
from batchgen.spec import JobSpec, ModelSpec
from batchgen.specs.validate import check_footer, make_passthrough_schema, render_first
from batchgen.storage import Storage, list_inputs
from batchgen.worker.pace import Pace
from batchgen.worker.shard_files import ShardFiles
from batchgen.worker.worker import Worker, WorkerSetup, open_worker

NO_PASSTHROUGH = pa.schema([])
Change = Callable[[Generation], Generation]


class ChangingEngine(SimulatedEngine):
    """Answers as the simulated engine does, changed."""

    def __init__(self, spec: JobSpec, change: Change = lambda answer: answer, tokenizer: Any = None) -> None:
        assert spec.engine.kind == "simulated"
        super().__init__(spec.engine)
        self._change = change
        self.tokenizer = tokenizer or self.tokenizer

    async def generate(self, request: Request) -> Generation:
        return self._change(await super().generate(request))


class PlainTokenizer(ByteTokenizer):
    """Of a model that knows no thinking."""

    think_end = None


def make_job(tmp_path: Path, **sections: Any) -> JobSpec:
    plain = {
        "input": {"paths": [str(tmp_path / "in.parquet")]},
        "engine": {"kind": "simulated", "has_latency": False, "mean_tokens": 8},
        "output": {"path": str(tmp_path / "out"), "token_ids": True},
    }
    return make_job_spec(**{**plain, **sections})


def write_input(tmp_path: Path, table: pa.Table) -> Lease:
    pq.write_table(table, tmp_path / "in.parquet")
    [info] = list_inputs(str(tmp_path / "in.parquet"))
    return make_lease(Shard(0, read_footer(info).file, 0, table.num_rows))


def make_worker(spec: JobSpec, engine: SimulatedEngine, passthrough: pa.Schema = NO_PASSTHROUGH) -> Worker:
    return Worker(WorkerSetup("w1", spec, 1, Storage(spec.output.path), passthrough), engine, "here")


async def run_lease(worker: Worker, lease: Lease) -> PoolEvent:
    """The event that ends it."""
    await worker.open()
    worker.assign(lease)
    try:
        async with asyncio.timeout(20):
            while True:
                for event in await worker.poll(0.2):
                    if isinstance(event, ShardCommitted | ShardFailed | WorkerLost):
                        return event
    finally:
        await worker.close()


def read_output(spec: JobSpec) -> list[dict[str, Any]]:
    return list(pq.read_table(f"{spec.output.path}/data/shard-000000000.parquet").to_pylist())


def test_a_lone_surrogate_in_an_answer_costs_nothing_else(tmp_path: Path) -> None:
    spec, lease = make_job(tmp_path), write_input(tmp_path, pa.table({"prompt": ["a", "b"]}))
    engine = ChangingEngine(spec, lambda answer: replace(answer, text="half \ud800 of it"))
    assert isinstance(asyncio.run(run_lease(make_worker(spec, engine), lease)), ShardCommitted)
    assert [(row["status"], row["text"]) for row in read_output(spec)] == [("ok", "half \ufffd of it")] * 2


CALLS = (
    'Let me see.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="false">1'
    "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>"
)
TOOLS = json.dumps([{"type": "function", "function": {"name": "f"}}])


class CallingEngine(ChangingEngine):
    """Calls a tool in every answer; that of row 1 is cut off."""

    async def generate(self, request: Request) -> Generation:
        answer = await super().generate(request)
        thought = "I think.</think>" if request.sampling.thinking else ""
        calls = CALLS[:-5] if request.row_id.source_row == 1 else CALLS
        return replace(answer, text=thought + calls, finish_reason="stop")


@pytest.mark.parametrize("thinking", [False, True])
def test_calls_in_deepseeks_format_get_a_column_and_broken_ones_stay_in_the_text(
    tmp_path: Path, thinking: bool
) -> None:
    spec = make_job(tmp_path, prompt={"column": "prompt", "tools": "t"}, sampling={"thinking": thinking})
    lease = write_input(tmp_path, pa.table({"prompt": ["a", "b", "c"], "t": [TOOLS, TOOLS, None]}))
    engine = CallingEngine(spec, tokenizer=create_deepseek_tokenizer(ModelSpec()))
    assert isinstance(asyncio.run(run_lease(make_worker(spec, engine), lease)), ShardCommitted)
    called, broken, without = read_output(spec)
    [call] = json.loads(called["tool_calls"])
    assert (call["type"], call["function"]) == ("function", {"name": "f", "arguments": '{"a": 1}'})
    assert (called["text"], called["finish_reason"]) == ("Let me see.", "tool_calls")
    assert (broken["text"], broken["tool_calls"], broken["finish_reason"]) == (CALLS[:-5], None, "stop")
    assert (without["text"], without["tool_calls"], without["finish_reason"]) == (CALLS, None, "stop")
    assert {row["reasoning"] for row in (called, broken, without)} == {"I think." if thinking else None}


def test_tools_of_a_column_that_can_be_none_are_refused(tmp_path: Path) -> None:
    spec = make_job(tmp_path, prompt={"column": "prompt", "tools": "t"})
    structs = pa.array([json.loads(TOOLS)])
    for column, is_good in [
        (structs, True),
        (pa.array([TOOLS]), True),
        (pa.array([1]), False),
        (pa.array([[1]]), False),
    ]:
        pq.write_table(pa.table({"prompt": ["a"], "t": column}), tmp_path / "in.parquet")
        footer = read_footer(list_inputs(str(tmp_path / "in.parquet"))[0])
        if is_good:
            check_footer(footer, spec)
            shown, _ = render_first([Shard(0, footer.file, 0, 1)], spec, create_deepseek_tokenizer(ModelSpec()))
            assert '<functions>\n{"name": "f"}\n</functions>' in shown
            sent, _ = render_first([Shard(0, footer.file, 0, 1)], spec, None)
            assert json.loads(sent)["tools"] == json.loads(TOOLS)
        else:
            with pytest.raises(InputError, match=r"column 't' \(prompt\.tools\) is .*; it must be a list of structs"):
                check_footer(footer, spec)


def test_an_answer_that_no_file_can_hold_fails_its_row_alone(tmp_path: Path) -> None:
    spec, lease = make_job(tmp_path), write_input(tmp_path, pa.table({"prompt": ["a", "longer"]}))
    engine = ChangingEngine(
        spec, lambda answer: answer if answer.usage.prompt_tokens == 18 else replace(answer, token_ids=(2**40,))
    )
    assert isinstance(asyncio.run(run_lease(make_worker(spec, engine), lease)), ShardCommitted)
    assert {row["error_type"] for row in read_output(spec)} >= {"bad_answer"}


@pytest.mark.parametrize("num_turns", range(6))
def test_a_poll_that_is_woken_and_cancelled_at_once_is_cancelled(tmp_path: Path, num_turns: int) -> None:
    """Else a second Ctrl-C, which comes right after the drain has woken the worker, would not end the drain."""

    async def poll_on(worker: Worker) -> None:
        while True:
            await worker.poll(60)
            await asyncio.Event().wait()

    async def main() -> None:
        spec = make_job(tmp_path)
        worker = make_worker(spec, ChangingEngine(spec))
        await worker.open()
        polling = asyncio.create_task(poll_on(worker))
        await asyncio.sleep(0.05)
        worker.wake()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        polling.cancel()
        await asyncio.wait({polling}, timeout=60)
        assert polling.cancelled()
        await worker.close()

    asyncio.run(main())


def test_a_drain_ends_the_poll_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever drains over a cluster waits for the replies of both: an idle worker's poll held every run's end up by 2 s."""
    monkeypatch.setattr(Pace, "choose_wait_s", lambda *_: 3600.0)

    async def main() -> None:
        spec = make_job(tmp_path)
        worker = make_worker(spec, ChangingEngine(spec))
        await worker.open()
        polling = asyncio.create_task(worker.poll(3600))
        await asyncio.sleep(0)
        assert await worker.drain(0.0) == []
        [beat] = await asyncio.wait_for(polling, 10)
        assert isinstance(beat, Heartbeat)
        await worker.close()

    asyncio.run(main())


def test_the_loss_is_told_whatever_keeps_the_last_rows_from_being_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, lease = make_job(tmp_path), write_input(tmp_path, pa.table({"prompt": ["a", "b"]}))
    engine = ChangingEngine(spec)

    def fail(*_: object) -> None:
        raise RuntimeError("nobody expected this")

    monkeypatch.setattr(ShardFiles, "write_segment", fail)

    answers: list[Generation] = []

    def die(answer: Generation) -> Generation:
        answers.append(answer)
        if len(answers) == 2:
            raise EngineDied("gone")
        return answer

    engine._change = die
    event = asyncio.run(run_lease(make_worker(spec, engine), lease))
    assert event == WorkerLost("w1", "gone", ((0, ((1, 2),)),))


@pytest.mark.parametrize("bad_column", ["prompt", "key"])
def test_rows_of_a_corrupt_page_are_errors_and_the_rest_goes_on(tmp_path: Path, bad_column: str) -> None:
    spec = make_job(tmp_path, input={"paths": ["x"], "custom_id": "key", "passthrough": ["key"]})
    table = pa.table({"prompt": [f"p{i}" for i in range(30)], "key": [f"k{i}" for i in range(30)]})
    path = tmp_path / "in.parquet"
    pq.write_table(table, path, row_group_size=10)
    chunk = pq.read_metadata(path).row_group(1).column(table.schema.names.index(bad_column))
    start, data = chunk.dictionary_page_offset, bytearray(path.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    [info] = list_inputs(str(path))
    lease = make_lease(Shard(0, read_footer(info).file, 0, 30))
    schema = pa.schema([("key", pa.string())])
    event = asyncio.run(run_lease(make_worker(spec, ChangingEngine(spec), schema), lease))
    assert isinstance(event, ShardCommitted)
    rows = read_output(spec)
    keys = [*(f"k{i}" for i in range(10)), *[None] * 10, *(f"k{i}" for i in range(20, 30))]
    assert [row["custom_id"] for row in rows] == [row["key"] for row in rows] == keys
    types = [None] * 10 + ["unreadable_input"] * 10 + [None] * 10
    assert [(row["error_type"], row["is_retryable"]) for row in rows] == [(kind, kind and False) for kind in types]


def test_a_passthrough_value_that_its_type_cannot_hold_is_told_by_file_and_column(tmp_path: Path) -> None:
    spec = make_job(tmp_path, input={"paths": ["x"], "passthrough": ["x"]})
    lease = write_input(tmp_path, pa.table({"prompt": ["a"], "x": [2**60 + 1]}))
    worker = make_worker(spec, ChangingEngine(spec), pa.schema([("x", pa.float64())]))
    event = asyncio.run(run_lease(worker, lease))
    assert isinstance(event, ShardFailed)
    assert event.is_fatal
    assert event.reason.startswith(f"{tmp_path}/in.parquet: passthrough column 'x' is int64 and has values that double")


def test_what_the_model_cannot_do_ends_the_run_with_its_own_sentence(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(ModelSpec())
    tokenizer._vendor.chat_template = None
    spec, lease = make_job(tmp_path), write_input(tmp_path, pa.table({"prompt": ["a"]}))
    event = asyncio.run(run_lease(make_worker(spec, ChangingEngine(spec, tokenizer=tokenizer)), lease))
    reason = "prompt.chat: embedded has no chat template; set prompt.chat: false"
    assert event == ShardFailed("w1", lease.batch_id, 0, reason, is_fatal=True)


def test_thinking_without_marks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_job(tmp_path, sampling={"thinking": True})
    lease = write_input(tmp_path, pa.table({"prompt": ["a"]}))
    with pytest.raises(SpecError, match=r"^sampling\.thinking: the model's tokenizer has no think marks"):
        render_first([lease.shard], spec, PlainTokenizer())
    monkeypatch.setattr(
        "batchgen.worker.worker.create_engine", lambda spec: ChangingEngine(spec, tokenizer=PlainTokenizer())
    )
    setup = WorkerSetup("w1", spec, 1, Storage(spec.output.path), NO_PASSTHROUGH)
    with pytest.raises(EngineDied, match=r"^sampling\.thinking: the model's tokenizer has no think marks"):
        asyncio.run(open_worker(setup, "here"))


def test_an_engine_is_closed_when_what_is_opened_beside_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index of earlier outputs fails at once, the engine is up later: it is closed after that, not left open."""
    done: list[str] = []

    class SlowEngine(ChangingEngine):
        async def open(self) -> None:
            await asyncio.sleep(0.05)
            await super().open()
            done.append("opened")

        async def close(self) -> None:
            await super().close()
            done.append("closed")

    spec = make_job(tmp_path)
    spec = spec.model_copy(update={"input": spec.input.model_copy(update={"reuse_from": (str(tmp_path / "gone"),)})})
    monkeypatch.setattr("batchgen.worker.worker.create_engine", SlowEngine)
    monkeypatch.setattr("batchgen.worker.worker.Carrier.open", lambda _: open(tmp_path / "gone"))  # noqa: PTH123, SIM115
    setup = WorkerSetup("w1", spec, 1, Storage(spec.output.path), NO_PASSTHROUGH)
    with pytest.raises(EngineDied, match="FileNotFoundError"):
        asyncio.run(open_worker(setup, "here"))
    assert done == ["opened", "closed"]


def test_thinking_without_marks_is_refused_for_the_row_that_asks_it(tmp_path: Path) -> None:
    spec = make_job(tmp_path, prompt={"column": "prompt", "sampling": "how"})
    how = ['{"thinking": true}', '{"thinking": false}', None]
    lease = write_input(tmp_path, pa.table({"prompt": ["a", "b", "c"], "how": how}))
    engine = ChangingEngine(spec, tokenizer=PlainTokenizer())
    assert isinstance(asyncio.run(run_lease(make_worker(spec, engine), lease)), ShardCommitted)
    rows = read_output(spec)
    assert [row["error_type"] for row in rows] == ["bad_sampling", None, None]
    assert "column 'how': thinking: the model's tokenizer has no think marks" in rows[0]["error_message"]


@pytest.mark.parametrize(("errors", "kept"), [("retryable", [0, 2, 3]), ("all", [0, 3]), ("none", [0, 1, 2, 3])])
def test_journaled_errors_of_an_earlier_run_are_tried_again(tmp_path: Path, errors: str, kept: list[int]) -> None:
    """And don't hide what a run between them generated."""
    spec = make_job(tmp_path, retry={"errors": errors})
    storage, refs = Storage(spec.output.path), []
    segments = {
        1: [make_ok(0, text="old"), make_error(1, is_retryable=True), make_error(2), make_error(3, is_retryable=True)],
        2: [make_ok(3, text="new")],
    }
    for epoch, results in segments.items():
        rows = make_rows(*results, batch_id=f"shard-000000000-e{epoch}-a1", spec=spec)
        path = make_segment_path(epoch, "w1", 1)
        refs.append(write_segment(storage, path, {0: rows}, spec.fingerprint())[0])
    files = ShardFiles(storage, spec, NO_PASSTHROUGH)
    found, left_out = files.read_journal(make_lease(epoch=3, journal=tuple(refs)), 0)
    assert left_out == []
    assert sorted(found["source_row"].to_pylist()) == kept
    by_row = {row["source_row"]: row["text"] for row in found.to_pylist()}
    assert by_row[3] == (None if errors == "none" else "new")
    same, _ = files.read_journal(make_lease(epoch=1, journal=tuple(refs[:1])), 0)
    assert same.num_rows == 4, "errors of the run itself are final"


# ---- before the start ------------------------------------------------------------------------------------------------


def merge_types(tmp_path: Path, *columns: pa.Array) -> pa.DataType:
    footers = []
    for number, column in enumerate(columns):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"x": column}), path)
        [info] = list_inputs(str(path))
        footers.append(read_footer(info))
    spec = make_job_spec(input={"paths": ["x"], "passthrough": ["x"]})
    return make_passthrough_schema(footers, spec).field("x").type


DICTIONARY = pa.array(["a"]).dictionary_encode()
ITEM = pa.list_(pa.int64())


@pytest.mark.parametrize(
    ("one", "other", "merged"),
    [
        (pa.nulls(1), pa.array(["a"]), pa.string()),
        (pa.array([1], pa.int8()), pa.array([1], pa.int64()), pa.int64()),
        (pa.array([1], pa.uint32()), pa.array([1], pa.uint8()), pa.uint32()),
        (pa.array([1], pa.float32()), pa.array([1], pa.float64()), pa.float64()),
        (pa.array(["a"]), pa.array(["a"], pa.large_string()), pa.large_string()),
        (DICTIONARY, pa.array(["a"]), pa.string()),
        (pa.array([[]], pa.list_(pa.null())), pa.array([[1]], ITEM), ITEM),
        (pa.array([[1]], pa.list_(pa.int8())), pa.array([[1]], pa.large_list(pa.int64())), pa.large_list(pa.int64())),
        (
            pa.array([{"a": 1}], pa.struct([("a", pa.int8())])),
            pa.array([{"a": 1}], pa.struct([("a", pa.int64())])),
            pa.struct([("a", pa.int64())]),
        ),
    ],
)
def test_types_are_widened_where_no_value_can_change(
    tmp_path: Path, one: pa.Array, other: pa.Array, merged: pa.DataType
) -> None:
    for columns in ((one, other), (other, one)):
        kind = merge_types(tmp_path, *columns)
        assert kind == merged
        assert [column.cast(kind).to_pylist() for column in columns] == [column.to_pylist() for column in columns]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([2**60 + 1]), pa.array([1.5])),
        (pa.array([1], pa.int64()), pa.array([1], pa.uint64())),
        (pa.array(["a"]), pa.array([b"a"])),
        (pa.array([1]), pa.array(["1"])),
        (pa.array([1], pa.timestamp("s")), pa.array([1], pa.timestamp("ns"))),
        (pa.array([[1]]), pa.array([1])),
    ],
)
def test_types_that_would_change_values_are_refused_with_both_files(
    tmp_path: Path, one: pa.Array, other: pa.Array
) -> None:
    with pytest.raises(InputError, match=r"2\.parquet: passthrough column 'x' is .* than in .*0\.parquet"):
        merge_types(tmp_path, one, one, other)


@pytest.mark.parametrize(("content", "is_fine"), [(pa.binary(), True), (pa.string(), True), (pa.int64(), False)])
def test_messages_must_hold_text(tmp_path: Path, content: pa.DataType, is_fine: bool) -> None:
    value = {"role": b"user", "content": 7 if content == pa.int64() else b"hi"}
    kind = pa.list_(pa.struct([("role", pa.binary()), ("content", content)]))
    chats = pa.array([[{**value, "content": "hi" if content == pa.string() else value["content"]}]], kind)
    spec = make_job(tmp_path, prompt={"messages": "chat"})
    lease = write_input(tmp_path, pa.table({"chat": chats}))
    [info] = list_inputs(str(tmp_path / "in.parquet"))
    if not is_fine:
        with pytest.raises(InputError, match="role and content as text"):
            check_footer(read_footer(info), spec)
        return
    check_footer(read_footer(info), spec)
    assert isinstance(asyncio.run(run_lease(make_worker(spec, ChangingEngine(spec)), lease)), ShardCommitted)
    assert [row["status"] for row in read_output(spec)] == ["ok"]


def test_a_calm_collector_still_collects_cycles() -> None:
    """In a process of its own: it changes the collector for good."""
    code = """
import gc, weakref
from batchgen.worker.collector import MIN_NEW_OBJECTS, calm_collector

class Knot: pass

calm_collector()
assert gc.get_freeze_count() > 1000
knot = Knot()
knot.itself, seen = knot, weakref.ref(knot)
del knot
kept = [[] for _ in range(MIN_NEW_OBJECTS // 2)]
assert seen() is not None
kept += [[] for _ in range(MIN_NEW_OBJECTS)]
assert seen() is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)
