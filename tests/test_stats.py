"""Figures of a batch: exact where they say so, within one percent where they are sketched, None where unknown."""

import dataclasses
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ddsketch import DDSketch
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import make_error, make_job_spec, make_lease, make_ok, make_rows, make_worker_info

from batchgen.batches import BatchStats
from batchgen.records import Generation, Result, RowId, Timing, Usage
from batchgen.stats import (
    LATENCIES,
    LATENCY_FIELDS,
    MIN_LATENCY_S,
    QUANTILES,
    ROW_FIELDS,
    SKETCH_ERROR,
    count_rows,
    count_values,
    describe_rows,
    list_latencies,
    make_batch_stats,
    make_latency,
    make_lost_stats,
    make_quantiles,
    make_sketch,
    merge_sketches,
    merge_stats,
    read_quantile,
    total,
)
from batchgen.write import make_result_schema

NO_ROWS = make_result_schema(make_job_spec()).empty_table()
DRAWS = {
    "uniform": lambda rng, size: rng.uniform(0, 100, size),
    "lognormal": lambda rng, size: rng.lognormal(0, 2, size),
    "exponential": lambda rng, size: rng.exponential(0.01, size),
    "heavy tail": lambda rng, size: rng.pareto(1.1, size) + 1e-3,
    "two humps": lambda rng, size: np.concatenate(
        [rng.normal(0.05, 0.005, size // 2), rng.normal(90, 3, size // 2 + 1)]
    ),
    "constant": lambda _, size: np.full(size, 3.7),
    "integers": lambda rng, size: rng.integers(1, 5, size).astype(float),
}
latencies = st.lists(st.floats(MIN_LATENCY_S, 1e5), max_size=60)


def column(values: Any) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, pa.float64())])


def make_timed(row: int, queued: float | None, ttft: float | None, latency: float | None, tokens: int | None) -> Result:
    answer = Generation("x", (), "stop", Usage(3, tokens, None))
    return Result(RowId("/f", row, 0), 1, Timing(queued, ttft, latency), generation=answer, text="x")


# ---- quantiles


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | st.floats(0, 1e6), max_size=30))
def test_quantiles_are_exact_and_nulls_do_not_count(values: list[float | None]) -> None:
    found = make_quantiles("x", column(values))
    known = [value for value in values if value is not None]
    assert list(found) == ["x_p50_s", "x_p90_s", "x_p99_s", "x_max_s"]
    for name, q in QUANTILES.items():
        expected = pytest.approx(float(np.quantile(known, q))) if known else None
        assert found[f"x_{name}_s"] == expected


def test_per_token_is_the_time_after_the_first_token_for_each_after_it() -> None:
    rows = make_rows(
        make_timed(0, 0.0, 1.0, 5.0, 5), make_timed(1, None, None, 5.0, 5), make_timed(2, 0.5, 1.0, 1.0, 1),
        make_timed(3, 0.5, 1.0, 2.0, None), make_timed(4, 0.5, 1.0, 1.0, 0), make_error(5),
    )  # fmt: skip
    found = {name: values.to_pylist() for name, values in list_latencies(rows).items()}
    assert tuple(found) == LATENCIES
    assert found["per_token"] == [1.0, None, None, None, None, None]
    assert found["queued"] == [0.0, None, 0.5, 0.5, 0.5, None]
    latency = make_latency(rows)
    assert tuple(latency) == LATENCY_FIELDS
    assert (latency["per_token_p99_s"], latency["ttft_p50_s"], latency["latency_max_s"]) == (1.0, 1.0, 5.0)
    assert set(make_latency(NO_ROWS).values()) == {None}


# ---- sketches


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_sketch_is_within_one_percent_over_any_distribution(draw: Any) -> None:
    values = np.maximum(draw(np.random.default_rng(1), 20_001), MIN_LATENCY_S)
    sketch = merge_sketches([make_sketch(column(values))])
    assert sum(sketch.values()) == len(values)
    for q in (0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0):
        exact = float(np.quantile(values, q, method="lower"))
        assert read_quantile(sketch, q) == pytest.approx(exact, rel=SKETCH_ERROR * 1.0001)
    assert len(sketch) < 1500, "a batch's sketch must stay small"


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_sketch_is_the_one_that_the_ddsketch_library_makes(draw: Any) -> None:
    """The same buckets and the same quantiles: whoever has the library can add our columns to sketches of their own."""
    values = np.maximum(draw(np.random.default_rng(2), 3000), 1e-3)
    theirs = DDSketch(SKETCH_ERROR)
    for value in values.tolist():
        theirs.add(value)
    ours = merge_sketches([make_sketch(column(values))])
    store = theirs._store
    found = {store.offset + place: int(count) for place, count in enumerate(store.bins) if count}
    assert found == ours
    for q in (0.0, 0.5, 0.99, 1.0):
        assert read_quantile(ours, q) == pytest.approx(theirs.get_quantile_value(q))


@settings(max_examples=60, deadline=None)
@given(st.lists(latencies, max_size=4), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_sketches_of_any_parts_add_up_to_the_whole(parts: list[list[float]], q: float) -> None:
    together = [value for part in parts for value in part]
    merged = merge_sketches(make_sketch(column(part)) for part in parts)
    assert merged == merge_sketches([make_sketch(column(together))])
    found = read_quantile(merged, q)
    if not together:
        assert found is None
        return
    exact = sorted(together)[math.floor(q * (len(together) - 1))]
    assert found == pytest.approx(exact, rel=SKETCH_ERROR * 1.0001)


def test_zero_and_tiny_latencies_fall_into_the_smallest_bucket() -> None:
    sketch = merge_sketches([make_sketch(column([0.0, 1e-9, MIN_LATENCY_S, None]))])
    assert list(sketch.values()) == [3]
    assert read_quantile(sketch, 0.5) == pytest.approx(MIN_LATENCY_S, rel=SKETCH_ERROR * 1.0001)


def test_of_nothing_nothing_is_known() -> None:
    assert make_sketch(column([])) == make_sketch(column([None])) == ""
    assert read_quantile({}, 0.5) is None
    assert merge_sketches([]) == {}


# ---- counts


def test_counts_leave_nulls_out_and_come_most_frequent_first() -> None:
    assert count_values(pa.chunked_array([["b", None, "c", "a"], ["c", "b"]])) == {"b": 2, "c": 2, "a": 1}
    assert list(count_values(pa.chunked_array([["a", "b", "b"]]))) == ["b", "a"]
    assert count_values(pa.chunked_array([pa.array([None, None], pa.string())])) == {}


def test_a_total_of_unknowns_is_unknown() -> None:
    assert total(pa.chunked_array([pa.array([None, 2, 3], pa.int64())])) == 5
    assert total(pa.chunked_array([pa.array([None], pa.int64())])) is None
    assert total(pa.chunked_array([pa.array([0], pa.int64())])) == 0
    assert total(pa.chunked_array([pa.array([], pa.int64())])) is None


def test_rows_are_ok_or_errors_and_some_errors_are_retryable() -> None:
    rows = make_rows(make_ok(0), make_error(1), make_error(2, is_retryable=True))
    assert count_rows(rows) == {"num_rows_ok": 1, "num_rows_error": 2, "num_rows_retryable": 1}
    assert count_rows(NO_ROWS) == {"num_rows_ok": 0, "num_rows_error": 0, "num_rows_retryable": 0}


def test_a_batch_is_described_by_its_rows() -> None:
    rows = make_rows(
        make_ok(0), make_ok(1, num_attempts=3), make_error(2, num_attempts=2), make_error(3, num_attempts=0)
    )
    found = describe_rows(rows)
    assert set(found) == set(ROW_FIELDS)
    assert (found["prompt_tokens"], found["completion_tokens"], found["cached_tokens"]) == (12, 4, 0)
    assert found["finish_reasons"] == {"stop": 2}
    assert found["error_types"] == {"rejected": 2}


@pytest.mark.parametrize(("attempts", "retries"), [([1], 0), ([0], 0), ([0, 0, 1], 0), ([1, 4, 0, 2], 4), ([], 0)])
def test_retries_are_attempts_after_the_first_and_a_row_never_sent_has_none(attempts: list[int], retries: int) -> None:
    rows = make_rows(*(make_error(row, num_attempts=number) for row, number in enumerate(attempts)))
    assert describe_rows(rows)["num_retries"] == retries


# ---- BatchStats


def make_stats(rows: pa.Table = NO_ROWS, *, wall_s: float = 2.0, num_gpus: float = 8.0) -> BatchStats:
    return make_batch_stats(
        make_lease(attempt=3, epoch=2), make_worker_info(num_gpus=num_gpus), rows, started_at=100.0, wall_s=wall_s,
        mean_inflight=1.5, num_from_journal=4, num_copied=5, read_s=0.5, write_s=None,
    )  # fmt: skip


def test_a_committed_batch() -> None:
    stats = make_stats(make_rows(make_ok(0), make_ok(1), make_error(2)))
    assert (stats.batch_id, stats.shard) == ("shard-000000000-e2-a3", "shard-000000000")
    assert (stats.attempt, stats.epoch, stats.outcome, stats.worker) == (3, 2, "committed", "w1")
    assert (stats.tokens_per_s, stats.tokens_per_s_per_gpu) == (2.0, 0.25)
    assert (stats.num_rows_from_journal, stats.num_rows_copied, stats.write_s) == (4, 5, None)
    assert stats.latency is not None
    assert stats.latency["ttft_p50_s"] == 0.2


def test_rates_that_cannot_be_known_are_none() -> None:
    rows = make_rows(make_ok(0))
    assert make_stats(rows, wall_s=0.0).tokens_per_s is None
    assert make_stats(rows, num_gpus=0.0).tokens_per_s_per_gpu is None
    assert make_stats(rows, num_gpus=0.0).tokens_per_s == 1.0
    assert make_stats(make_rows(make_error(0))).tokens_per_s is None
    assert make_stats().completion_tokens is None


def test_a_lost_batch_knows_what_was_journaled_or_nothing() -> None:
    bare = make_lost_stats("shard-000000042-e7-a3")
    known = {field.name: getattr(bare, field.name) for field in dataclasses.fields(bare)}
    assert {name: value for name, value in known.items() if value is not None} == {
        "batch_id": "shard-000000042-e7-a3", "shard": "shard-000000042", "attempt": 3, "epoch": 7, "outcome": "lost",
    }  # fmt: skip
    saved = make_lost_stats("shard-000000042-e7-a3", info=make_worker_info(), wall_s=9.0, rows=make_rows(make_ok(0)))
    assert (saved.num_rows_ok, saved.completion_tokens, saved.wall_s, saved.worker) == (1, 2, 9.0, "w1")
    assert saved.tokens_per_s is None


@pytest.mark.parametrize(
    ("known", "told"), [({"may_quote": False}, {"rejected": "too hard"}), ({"may_quote": True}, {}), ({}, {})]
)
def test_a_servers_words_stay_in_the_rows_of_a_lost_batch_too(known: dict[str, bool], told: dict[str, str]) -> None:
    """As do those of an engine that nobody knows."""
    saved = make_lost_stats("shard-000000042-e7-a3", engine_kind="some", rows=make_rows(make_error(0)), **known)
    assert (saved.error_types, saved.error_examples, saved.engine_kind) == ({"rejected": 1}, told, "some")


def test_merging_takes_each_field_from_the_first_that_knows_it() -> None:
    ours = dataclasses.replace(make_lost_stats("shard-000000000-e1-a1"), wall_s=3.0, num_retries=0, error_types={})
    theirs = make_lost_stats(
        "shard-000000000-e1-a1", wall_s=5.0, rows=make_rows(make_ok(0, num_attempts=2), make_error(1))
    )
    merged = merge_stats(ours, theirs)
    assert (merged.wall_s, merged.num_retries) == (3.0, 0), "what is known stays, zero included"
    assert (merged.num_rows_ok, merged.error_types) == (1, {"rejected": 1})
    assert merge_stats(theirs, theirs) == theirs
