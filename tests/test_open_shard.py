"""A shard while it is worked on: each row once, what a crash would cost, and what stands at the end."""

import asyncio
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import make_error, make_job_spec, make_lease, make_ok, make_rows, make_shard

from batchgen.records import Generation, JournalRef, Lease, Result, ShardProgress, TokenLogprob, Usage
from batchgen.worker.open_shard import BATCH_ROWS, BATCH_VALUES, OpenShard
from batchgen.worker.prepare import make_inputs, make_unknown_inputs
from batchgen.worker.result_batch import make_result_batch
from batchgen.write import LOGPROBS_TYPE, make_output_schema, make_result_schema

SPEC = make_job_spec()
PASSTHROUGH = pa.schema([("tag", pa.int64())])
OUTPUT = make_output_schema(SPEC, PASSTHROUGH)
REF = JournalRef("_batchgen/journal/e000001-w-000001.parquet", 0)
BATCH_ID = "shard-000000000-e1-a1"


def open_shard(num_rows: int = 3, n: int = 1, row_start: int = 0, lease: Lease | None = None) -> OpenShard:
    shard = make_shard(row_start=row_start, row_end=row_start + num_rows)
    return OpenShard(lease or make_lease(shard), n, make_result_schema(SPEC))


def add_inputs(shard: OpenShard, *, in_batches_of: int = 2) -> None:
    rows = list(range(shard.lease.shard.row_start, shard.lease.shard.row_end))
    for start in range(0, len(rows), in_batches_of):
        some = rows[start : start + in_batches_of]
        batch = pa.RecordBatch.from_pydict({"tag": pa.array(some, pa.int32())})
        shard.add_inputs(make_inputs(batch, [f"id-{row}" for row in some], PASSTHROUGH, "/f"))


def has_ended(shard: OpenShard) -> bool:
    async def ask() -> bool:
        waiting = asyncio.ensure_future(shard.wait_ended())
        await asyncio.sleep(0)
        is_done = waiting.done()
        waiting.cancel()
        return is_done

    return asyncio.run(ask())


def list_texts(table: pa.Table) -> list[tuple[int, int, str | None]]:
    return [(row["source_row"], row["sample_index"], row["text"]) for row in table.to_pylist()]


def test_a_second_answer_is_dropped_and_the_first_stands() -> None:
    shard = open_shard(2)
    shard.add(make_ok(1, text="first"))
    shard.add(make_ok(1, text="second"))
    shard.add(make_error(1))
    assert (shard.is_finished(0, 0), shard.is_finished(1, 0)) == (False, True)
    assert shard.progress == ShardProgress(BATCH_ID, 1, 0, num_unsent=1)
    assert not has_ended(shard)
    shard.add(make_error(0))
    assert shard.progress == ShardProgress(BATCH_ID, 2, 1, error_types=(("rejected", 1),))
    assert has_ended(shard)
    add_inputs(shard)
    parts = shard.make_parts(OUTPUT)
    assert list_texts(parts.output) == [(0, 0, None), (1, 0, "first")]
    assert parts.output["custom_id"].to_pylist() == ["id-0", "id-1"]
    assert parts.output["tag"].to_pylist() == [0, 1]
    assert parts.recovered.num_rows == 0


def test_a_row_is_done_with_its_last_sample() -> None:
    shard = open_shard(2, n=3, row_start=5)
    for sample in (2, 0):
        shard.add(make_ok(6, sample))
        assert shard.progress.num_rows_done == 0
    shard.add(make_ok(6, 1))
    assert shard.progress.num_rows_done == 1
    assert not shard.is_finished(5, 2)
    assert not has_ended(shard)


def test_unflushed_is_what_a_lost_worker_would_cost() -> None:
    shard = open_shard(BATCH_ROWS + 3)
    assert shard.take_unflushed() is None
    shard.add(make_ok(2))
    shard.add(make_ok(0))
    taken = shard.take_unflushed()
    assert taken is not None
    table, mark = taken
    assert [row for row, _, _ in list_texts(table)] == [2, 0]
    again = shard.take_unflushed()
    assert again is not None
    assert again[0].equals(table), "a flush that failed loses nothing"
    later = range(3, 3 + BATCH_ROWS)
    for row in later:
        shard.add(make_ok(row))
    shard.set_flushed(mark, REF)
    left = shard.take_unflushed()
    assert left is not None
    assert [row for row, _, _ in list_texts(left[0])] == [*later], "what came during the flush is not flushed"
    shard.set_flushed(left[1], REF)
    assert shard.take_unflushed() is None


def test_results_do_not_pile_up_as_python_objects() -> None:
    shard = open_shard(3 * BATCH_ROWS)
    for row in range(2 * BATCH_ROWS + 5):
        shard.add(make_ok(row))
    assert len(shard._buffer) == 5
    assert [part.rows.num_rows for part in shard._parts if part.rows is not None] == [BATCH_ROWS, BATCH_ROWS]


def make_logprobs(num_tokens: int, top: int) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(i, -0.5 * i, tuple((i + j, -1.0 * j) for j in range(top))) for i in range(num_tokens))


def with_logprobs(row: int, logprobs: tuple[TokenLogprob, ...] | None) -> Result:
    return make_ok(row, generation=Generation("fine", (7, 8), "stop", Usage(3, 2, 0), logprobs=logprobs))


def as_plain(logprobs: tuple[TokenLogprob, ...] | None) -> list[dict[str, Any]] | None:
    if logprobs is None:
        return None
    return [
        {"token_id": t.token_id, "logprob": t.logprob, "top": [{"token_id": i, "logprob": p} for i, p in t.top]}
        for t in logprobs
    ]


def test_logprobs_from_flat_arrays_are_the_same_column() -> None:
    spec = make_job_spec(prompt={"column": "p", "sampling": "s"})
    answers = [make_logprobs(3, 2), None, make_logprobs(0, 0), make_logprobs(2, 0), make_logprobs(1, 3), None]
    results = [*(with_logprobs(row, logprobs) for row, logprobs in enumerate(answers[:-1])), make_error(5)]
    for start, end in [(0, 6), (1, 2), (2, 3), (0, 0)]:
        found = make_result_batch(results[start:end], BATCH_ID, make_result_schema(spec))
        found.validate(full=True)
        expected = pa.array([as_plain(logprobs) for logprobs in answers[start:end]], LOGPROBS_TYPE)
        assert found["logprobs"].equals(expected)


def test_long_answers_are_packed_by_their_size() -> None:
    spec = make_job_spec(prompt={"column": "p", "sampling": "s"})
    shard = OpenShard(make_lease(make_shard(row_end=10)), 1, make_result_schema(spec))
    logprobs = make_logprobs(BATCH_VALUES // 42 + 1, 20)  # half of what may wait
    for row in range(5):
        shard.add(with_logprobs(row, logprobs))
    assert [part.rows.num_rows for part in shard._parts if part.rows is not None] == [2, 2]


def test_an_answer_that_arrow_refuses_becomes_its_rows_failure() -> None:
    spec = make_job_spec(output={"path": "/o", "token_ids": True})
    shard = OpenShard(make_lease(make_shard(row_end=3)), 1, make_result_schema(spec))
    for row in range(3):
        ids = (2**40,) if row == 1 else (1,)
        shard.add(make_ok(row, generation=Generation("secret", ids, "stop", Usage(3, 1, 0))))
    taken = shard.take_unflushed()
    assert taken is not None
    rows = taken[0].to_pylist()
    assert [(row["status"], row["error_type"], row["text"]) for row in rows] == [
        ("ok", None, "fine"),
        ("error", "bad_answer", None),
        ("ok", None, "fine"),
    ]
    assert "secret" not in rows[1]["error_message"]
    assert shard.num_error == 1


def test_recovered_rows_are_finished_not_generated_and_not_journaled_again() -> None:
    shard = open_shard(3)
    shard.recover(make_rows(make_ok(0, text="old"), make_error(1), batch_id="shard-000000000-e1-a0"), are_copied=False)
    assert (shard.num_recovered, shard.num_copied, shard.num_error) == (2, 0, 1)
    assert shard.take_unflushed() is None
    shard.add(make_ok(0, text="new"))
    assert shard.take_unflushed() is None
    shard.add(make_ok(2, text="new"))
    add_inputs(shard)
    parts = shard.make_parts(OUTPUT)
    assert list_texts(parts.output) == [(0, 0, "old"), (1, 0, None), (2, 0, "new")]
    assert parts.output["batch_id"].to_pylist() == ["shard-000000000-e1-a0"] * 2 + [BATCH_ID]
    assert (parts.generated.num_rows, parts.recovered.num_rows) == (1, 2)


def test_a_shard_may_be_recovered_whole() -> None:
    shard = open_shard(2)
    shard.recover(make_rows(make_ok(1), make_ok(0)), are_copied=False)
    assert has_ended(shard)
    add_inputs(shard)
    assert [row for row, _, _ in list_texts(shard.make_parts(OUTPUT).output)] == [0, 1]


def test_copied_rows_win_over_journaled_ones() -> None:
    shard = open_shard(2, lease=make_lease(make_shard(row_end=2), replaces="etag"))
    shard.recover(make_rows(make_ok(0, text="committed")), are_copied=True)
    shard.recover(make_rows(make_ok(0, text="journaled"), make_ok(1, text="journaled")), are_copied=False)
    assert (shard.num_copied, shard.num_recovered) == (1, 1)
    add_inputs(shard)
    assert list_texts(shard.make_parts(OUTPUT).output) == [(0, 0, "committed"), (1, 0, "journaled")]


def test_errors_that_are_to_be_tried_again_do_not_come_back_from_the_journal() -> None:
    """A segment outlives a committed shard while it holds rows of another one."""
    shard = open_shard(2, lease=make_lease(make_shard(row_end=2), attempt=2, replaces="etag"))
    shard.recover(make_rows(make_ok(0)), are_copied=True)
    shard.recover(make_rows(make_ok(0), make_error(1, is_retryable=True)), are_copied=False)
    assert not shard.is_finished(1, 0)
    assert shard.num_error == 0


def test_closing_ends_the_wait_and_later_answers_are_kept_for_the_journal() -> None:
    shard = open_shard(2)
    shard.close()
    assert shard.is_closed
    assert has_ended(shard)
    shard.add(make_ok(1))
    taken = shard.take_unflushed()
    assert taken is not None
    assert taken[0].num_rows == 1


def test_a_shard_that_is_not_whole_is_never_made() -> None:
    shard = open_shard(3)
    shard.add(make_ok(0))
    shard.add(make_ok(2))
    add_inputs(shard)
    with pytest.raises(ValueError, match="results for 3 expected; a row is missing or twice"):
        shard.make_parts(OUTPUT)


def test_inputs_are_cast_to_the_jobs_types_and_must_be_complete() -> None:
    shard = open_shard(2)
    for row in range(2):
        shard.add(make_ok(row))
    shard.add_inputs(
        make_inputs(pa.RecordBatch.from_pydict({"tag": pa.array([7], pa.int8())}), ["a"], PASSTHROUGH, "/f")
    )
    with pytest.raises(ValueError, match="missing or twice"):
        shard.make_parts(OUTPUT)
    shard.add_inputs(make_unknown_inputs(1, PASSTHROUGH))
    assert shard.make_parts(OUTPUT).output.select(["custom_id", "tag"]).to_pydict() == {
        "custom_id": ["a", None],
        "tag": [7, None],
    }


@pytest.mark.parametrize(("row", "sample"), [(4, 0), (7, 0), (5, 2), (6, -1)])
def test_a_row_of_another_shard_is_refused_loudly(row: int, sample: int) -> None:
    shard = open_shard(2, n=2, row_start=5)
    with pytest.raises(ValueError, match=f"row {row}, sample {sample} is not a part of it"):
        shard.add(make_ok(row, sample))
    with pytest.raises(ValueError, match="is not a part of it"):
        shard.recover(make_rows(make_ok(row, sample)), are_copied=False)
    assert shard.progress.num_rows_done == 0


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 3), st.integers(0, 3))
def test_in_whatever_order_answers_come_every_row_is_there_once(
    data: st.DataObject, num_rows: int, n: int, row_start: int
) -> None:
    keys = [(row_start + row, sample) for row in range(num_rows) for sample in range(n)]
    arrivals = data.draw(st.permutations(keys)) + data.draw(st.lists(st.sampled_from(keys), max_size=5))
    num_recovered = data.draw(st.integers(0, len(keys)))
    shard = open_shard(num_rows, n, row_start)
    shard.recover(make_rows(*(make_ok(*key, text="old") for key in arrivals[:num_recovered])), are_copied=False)
    flushed: list[tuple[int, int]] = []
    for key in arrivals[num_recovered:]:
        shard.add(make_ok(*key, text=f"{key}"))
        if data.draw(st.booleans()) and (taken := shard.take_unflushed()) is not None:
            flushed += [(row, sample) for row, sample, _ in list_texts(taken[0])]
            shard.set_flushed(taken[1], REF)
    assert shard.progress.num_rows_done == num_rows
    assert has_ended(shard)
    add_inputs(shard)
    output = list_texts(shard.make_parts(OUTPUT).output)
    assert [(row, sample) for row, sample, _ in output] == keys
    rest = shard.take_unflushed()
    flushed += [(row, sample) for row, sample, _ in list_texts(rest[0])] if rest else []
    generated = [key for key in keys if key not in arrivals[:num_recovered]]
    assert sorted(flushed) == generated, "journaled twice, or not at all"
