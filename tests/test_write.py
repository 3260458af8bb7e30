"""What a shard file is: every row once, in input order, with the user's own columns as they were, and a footer."""

import dataclasses
import datetime
import decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from makers import make_error, make_job_spec, make_lease, make_ok, make_rows, make_shard

from batchgen.batches import BatchStats, FileFooter
from batchgen.records import Generation, Result, RowId, Timing, TokenLogprob, Usage
from batchgen.worker.result_batch import make_result_batch
from batchgen.write import (
    FORMAT_VERSION,
    footer_from_json,
    footer_to_json,
    list_reserved_names,
    make_output_schema,
    make_output_table,
    make_result_schema,
    make_shard_file,
    read_file_footer,
    stats_from_json,
    stats_to_json,
)

SPEC = make_job_spec()
NOTHING = pa.schema([])


def make_inputs(num_rows: int, **columns: pa.Array) -> pa.Table:
    return pa.table({"custom_id": pa.array([f"id-{row}" for row in range(num_rows)], pa.string()), **columns})


def make_table(*results: Result, num_rows: int = 3, n: int = 1, row_start: int = 0) -> pa.Table:
    lease = make_lease(make_shard(row_start=row_start, row_end=row_start + num_rows))
    schema = make_output_schema(SPEC, NOTHING)
    return make_output_table(make_rows(*results), make_inputs(num_rows), lease, n, schema)


def make_footer(**fields: Any) -> FileFooter:
    stats = BatchStats("shard-000000003-e2-a1", "shard-000000003", 1, 2, "committed")
    stats = dataclasses.replace(
        stats,
        num_gpus=8.0,
        latency={"ttft_p50_s": 0.25, "ttft_max_s": None},
        sketches={"ttft": "-70:3", "latency": ""},
        finish_reasons={"stop": 2},
        error_types={},
        num_rows_ok=2,
    )
    known = {"fingerprint": "f" * 32, "shard": 3, "attempt": 1, "epoch": 2, "batch_id": stats.batch_id}
    counts = {"num_rows_ok": 2, "num_rows_error": 1, "num_rows_retryable": 1}
    return FileFooter(FORMAT_VERSION, **{**known, **counts, "batches": (stats, stats), **fields})


# ---- rows


def test_a_generation_is_written_field_by_field() -> None:
    [row] = make_rows(make_ok(4, text="answer", reasoning="because", num_attempts=2)).to_pylist()
    assert row == {
        "source_row": 4, "sample_index": 0, "text": "answer", "reasoning": "because", "finish_reason": "stop",
        "prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0, "status": "ok", "error_type": None,
        "error_message": None, "is_retryable": None, "num_attempts": 2, "queued_s": 0.1, "ttft_s": 0.2,
        "latency_s": 0.4, "batch_id": "shard-000000000-e1-a1", "row_fingerprint": None, "reused_from": None,
    }  # fmt: skip


def test_a_failure_is_written_with_what_is_known_and_nulls() -> None:
    [row] = make_rows(make_error(4, 1, is_retryable=True)).to_pylist()
    known = {name: value for name, value in row.items() if value is not None}
    assert known == {
        "source_row": 4, "sample_index": 1, "prompt_tokens": 3, "status": "error", "error_type": "rejected",
        "error_message": "too hard", "is_retryable": True, "num_attempts": 1, "batch_id": "shard-000000000-e1-a1",
    }  # fmt: skip


def test_unknown_is_null_and_never_zero() -> None:
    answer = Generation("", (), "stop", Usage())
    [row] = make_rows(Result(RowId("/f", 0, 0), 1, Timing(), generation=answer, text="")).to_pylist()
    assert row["text"] == ""
    unknown = ["prompt_tokens", "completion_tokens", "cached_tokens", "queued_s", "ttft_s", "latency_s"]
    assert [row[name] for name in unknown] == [None] * 6


def test_a_result_that_is_both_or_neither_is_refused() -> None:
    both = dataclasses.replace(make_ok(0), failure=make_error(0).failure)
    neither = Result(RowId("/f", 0, 0), 1, Timing())
    for result in (both, neither):
        with pytest.raises(ValueError, match="exactly one"):
            make_result_batch([result], "b", make_result_schema(make_job_spec()))


@pytest.mark.parametrize(
    ("sections", "columns"),
    [
        ({}, set()),
        ({"sampling": {"logprobs": 0}}, {"logprobs"}),
        ({"prompt": {"column": "p", "sampling": "s"}}, {"logprobs"}),
        ({"output": {"path": "/o", "token_ids": True}}, {"token_ids"}),
        ({"output": {"path": "/o", "token_ids": True}, "sampling": {"logprobs": 2}}, {"logprobs", "token_ids"}),
    ],
)
def test_optional_columns_are_there_when_asked_for(sections: dict[str, Any], columns: set[str]) -> None:
    for schema in (
        make_result_schema(make_job_spec(**sections)),
        make_output_schema(make_job_spec(**sections), NOTHING),
    ):
        assert set(schema.names) & {"logprobs", "token_ids"} == columns
        assert len(set(schema.names)) == len(schema.names)
        assert schema.names[-3:] == ["batch_id", "row_fingerprint", "reused_from"]


def test_logprobs_and_token_ids_are_written_as_they_were() -> None:
    spec = make_job_spec(output={"path": "/o", "token_ids": True}, sampling={"logprobs": 2})
    logprobs = (TokenLogprob(7, -0.5, ((7, -0.5), (9, -1.25))), TokenLogprob(8, -2.0))
    answer = Generation("ab", (7, 8), "stop", Usage(), logprobs=logprobs)
    result = Result(RowId("/f", 0, 0), 1, Timing(), generation=answer, text="ab")
    batch = make_result_batch([result, make_error(1)], "b", make_result_schema(spec))
    rows = pa.Table.from_batches([batch]).to_pylist()
    assert rows[0]["token_ids"] == [7, 8]
    assert rows[0]["logprobs"] == [
        {"token_id": 7, "logprob": -0.5, "top": [{"token_id": 7, "logprob": -0.5}, {"token_id": 9, "logprob": -1.25}]},
        {"token_id": 8, "logprob": -2.0, "top": []},
    ]
    assert (rows[1]["token_ids"], rows[1]["logprobs"]) == (None, None)


# ---- the shard's table


def test_rows_come_in_input_order_with_their_key() -> None:
    table = make_table(make_ok(6), make_ok(5), make_error(7), num_rows=3, row_start=5)
    assert table["source_row"].to_pylist() == [5, 6, 7]
    assert table["custom_id"].to_pylist() == ["id-0", "id-1", "id-2"]
    assert table["status"].to_pylist() == ["ok", "ok", "error"]
    assert set(table["source_file"].to_pylist()) == {"/data/in.parquet"}
    assert table.schema == make_output_schema(SPEC, NOTHING)


def test_samples_of_a_row_stand_together_and_share_its_inputs() -> None:
    table = make_table(*(make_ok(row, sample) for sample in (1, 0) for row in (1, 0)), num_rows=2, n=2)
    keys = zip(table["source_row"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
    assert list(keys) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert table["custom_id"].to_pylist() == ["id-0", "id-0", "id-1", "id-1"]


@pytest.mark.parametrize(
    "results",
    [
        [make_ok(0), make_ok(1)],
        [],
        [make_ok(0), make_ok(1), make_ok(1)],
        [make_ok(0), make_ok(1), make_ok(2), make_ok(2)],
        [make_ok(0), make_ok(1), make_ok(3)],
        [make_ok(-1), make_ok(0), make_ok(1)],
        [make_ok(0), make_ok(1), make_ok(2, 1)],
        [make_ok(0), make_ok(0, 1), make_ok(2)],
    ],
)
def test_a_row_missing_or_twice_or_foreign_raises(results: list[Result]) -> None:
    with pytest.raises(ValueError, match=r"shard-000000000: .* a row is missing or twice"):
        make_table(*results)


def test_a_sample_missing_raises() -> None:
    with pytest.raises(ValueError, match="3 results for 4 expected"):
        make_table(make_ok(0), make_ok(0, 1), make_ok(1, 1), num_rows=2, n=2)


def test_inputs_of_another_length_raise() -> None:
    lease, schema = make_lease(make_shard(row_end=2)), make_output_schema(SPEC, NOTHING)
    for num_rows in (1, 3):
        with pytest.raises(ValueError, match="missing or twice"):
            make_output_table(make_rows(make_ok(0), make_ok(1)), make_inputs(num_rows), lease, 1, schema)


DAY = datetime.datetime(2024, 5, 6, 7, 8, 9, tzinfo=datetime.UTC)
COLUMNS = [
    pa.array([1, None], pa.int8()),
    pa.array([2**63, 0], pa.uint64()),
    pa.array([1.5, None], pa.float32()),
    pa.array([True, None]),
    pa.array(["é", None], pa.string()),
    pa.array(["é", None], pa.large_string()),
    pa.array(["é", None], pa.string()).cast(pa.string_view()),
    pa.array([b"\xff", None], pa.binary()),
    pa.array([b"\xff", None], pa.binary()).cast(pa.binary_view()),
    pa.array([b"ab", b"cd"], pa.binary(2)),
    pa.array(["a", "b"]).dictionary_encode(),
    pa.array([[1, None], None], pa.list_(pa.int32())),
    pa.array([[1], []], pa.large_list(pa.int32())),
    pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)),
    pa.array([{"a": 1, "b": ["x"]}, None], pa.struct([("a", pa.int32()), ("b", pa.list_(pa.string()))])),
    pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int32())),
    pa.array([DAY, None], pa.timestamp("us", tz="Europe/Berlin")),
    pa.array([DAY.date(), None], pa.date32()),
    pa.array([decimal.Decimal("1.25"), None], pa.decimal128(10, 2)),
    pa.array([None, None], pa.null()),
]


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: str(column.type))
@pytest.mark.parametrize("n", [1, 2])
def test_passthrough_columns_keep_values_and_type(column: pa.Array, n: int) -> None:
    passthrough = pa.schema([("mine", column.type)])
    inputs = pa.concat_tables([make_inputs(1, mine=column.slice(row, 1)) for row in range(2)])
    results = make_rows(*(make_ok(row, sample) for row in range(2) for sample in range(n)))
    schema = make_output_schema(SPEC, passthrough)
    table = make_output_table(results, inputs, make_lease(make_shard(row_end=2)), n, schema)
    data = make_shard_file(table, make_footer(), compression_level=1)
    read = pq.read_table(pa.BufferReader(data))
    assert read.schema.field("mine").type == column.type
    assert read["mine"].to_pylist() == [value for value in column.to_pylist() for _ in range(n)]
    assert read.schema.names.index("mine") == read.schema.names.index("sample_index") + 1


WITH_TOOLS = {"kind": "openai", "base_urls": "http://localhost:1/v1", "extra_body": {"tools": [{"type": "function"}]}}


def test_reserved_names_are_all_that_the_output_can_have_of_its_own() -> None:
    spec = make_job_spec(output={"path": "/o", "token_ids": True}, sampling={"logprobs": 2}, engine=WITH_TOOLS)
    assert list_reserved_names() == set(make_output_schema(spec, NOTHING).names)


# ---- the file


def test_a_footer_comes_back_as_it_was() -> None:
    footer = make_footer()
    assert footer_from_json(footer_to_json(footer)) == footer
    data = make_shard_file(make_table(*map(make_ok, range(3))), footer, compression_level=3)
    parquet = pq.ParquetFile(pa.BufferReader(data))
    assert read_file_footer(parquet) == footer
    assert parquet.metadata.row_group(0).column(0).compression == "ZSTD"
    assert parquet.read().replace_schema_metadata(None).equals(make_table(*map(make_ok, range(3))))


def test_stats_come_back_as_they_were() -> None:
    stats = make_footer().batches[0]
    assert stats_from_json(stats_to_json(stats)) == stats


def test_a_foreign_file_has_no_footer() -> None:
    for metadata in (None, {b"other": b"x"}):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"a": [1]}).replace_schema_metadata(metadata), sink)
        assert read_file_footer(pq.ParquetFile(pa.BufferReader(sink.getvalue()))) is None


def test_the_same_rows_make_the_same_bytes() -> None:
    table, footer = make_table(*map(make_ok, range(3))), make_footer()
    assert make_shard_file(table, footer, compression_level=3) == make_shard_file(table, footer, compression_level=3)
