"""Shards cover the planned rows exactly once, in order, one file each; the same input always gives the same ones."""

from itertools import pairwise
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import make_file, make_job_spec

from batchgen import plan as plan_module
from batchgen.errors import InputError
from batchgen.plan import (
    MAX_AMPLIFICATION,
    SHARDS_PER_WORKER,
    choose_rows_per_shard,
    cut_file,
    describe_amplification,
    expected_tokens,
    list_changes,
    make_plan,
    read_amplification,
)
from batchgen.records import InputFile, Shard
from batchgen.spec import JobSpec

groups = st.lists(st.integers(0, 40), max_size=6).map(tuple)
files = st.lists(groups, min_size=1, max_size=5).map(
    lambda many: [make_file(f"/data/{number}.parquet", rows) for number, rows in enumerate(many)]
)
some_files = files.filter(lambda found: sum(file.num_rows for file in found) > 0)


def make_spec(
    rows_per_shard: int | None = None, limit: int | None = None, workers: int = 1, **sampling: int
) -> JobSpec:
    return make_job_spec(
        input={"paths": "/data", "limit": limit},
        output={"path": "/out", "rows_per_shard": rows_per_shard},
        cluster={"workers": {"max": workers}},
        sampling=sampling,
    )


def list_rows(shards: tuple[Shard, ...] | list[Shard]) -> list[tuple[str, int]]:
    return [(shard.file.path, row) for shard in shards for row in range(shard.row_start, shard.row_end)]


def list_all_rows(found: list[InputFile]) -> list[tuple[str, int]]:
    return [(file.path, row) for file in found for row in range(file.num_rows)]


@settings(max_examples=100, deadline=None)
@given(some_files, st.none() | st.integers(1, 50), st.integers(1, 3))
def test_shards_cover_every_row_exactly_once_in_order(
    found: list[InputFile], rows_per_shard: int | None, workers: int
) -> None:
    spec = make_spec(rows_per_shard, workers=workers)
    plan = make_plan(spec, found)
    assert list_rows(plan.shards) == list_all_rows(found)
    assert [shard.number for shard in plan.shards] == list(range(len(plan.shards)))
    assert all(shard.num_rows > 0 for shard in plan.shards)
    assert all(shard.row_end <= shard.file.num_rows for shard in plan.shards)
    assert plan == make_plan(spec, list(found))
    assert plan.num_rows == plan.num_planned_rows == len(list_all_rows(found))


@settings(max_examples=100, deadline=None)
@given(some_files, st.integers(1, 50), st.lists(st.integers(1, 250), min_size=1, max_size=3))
def test_a_limit_plans_a_prefix_and_raising_it_keeps_every_shard(
    found: list[InputFile], rows_per_shard: int, limits: list[int]
) -> None:
    everything = list_all_rows(found)
    shards: tuple[Shard, ...] = ()
    for limit in [*limits, None]:
        plan = make_plan(make_spec(rows_per_shard, limit), found, shards)
        assert plan.shards[: len(shards)] == shards, "a planned shard was changed"
        wanted = len(everything) if limit is None else max(limit, len(list_rows(shards)))
        assert list_rows(plan.shards) == everything[:wanted]
        shards = plan.shards
    assert make_plan(make_spec(rows_per_shard), found, shards).shards == shards


@settings(max_examples=100, deadline=None)
@given(groups, st.integers(1, 60), st.data())
def test_a_file_is_cut_near_the_wanted_size_and_at_borders_where_they_are_near(
    rows: tuple[int, ...], wanted: int, data: st.DataObject
) -> None:
    total = sum(rows)
    start = data.draw(st.integers(0, total))
    end = data.draw(st.integers(start, total))
    borders = {sum(rows[:count]) for count in range(len(rows) + 1)}
    ends = cut_file(rows, start, end, wanted)
    assert (ends[-1] if ends else start) == end
    for begin, cut in pairwise([start, *ends]):
        piece = ceil((end - begin) / ceil((end - begin) / wanted))
        assert piece / 2 <= cut - begin <= piece + wanted / 2, "much smaller or larger than an equal share"
        near = [border for border in borders if piece / 2 <= border - begin <= piece + wanted / 2 and border < end]
        near = [border for border in near if begin < border]
        if begin + piece == end or not near:
            assert cut == begin + piece
        else:
            assert cut in near
            assert all(abs(cut - begin - piece) <= abs(border - begin - piece) for border in near)


@pytest.mark.parametrize(
    ("rows", "wanted", "ends"),
    [
        ((100,), 100, [100]),
        ((60, 40), 100, [100]),  # fits in one: not cut for the sake of a border
        ((60, 60), 100, [60, 120]),
        ((250,), 100, [84, 167, 250]),  # equal shares, not two large ones and a rest
        ((90, 90, 90), 100, [90, 180, 270]),
        ((110, 110, 30), 100, [110, 220, 250]),
        ((35, 205), 100, [80, 160, 240]),  # a border that would leave less than half is not taken
        ((10,) * 10, 30, [20, 50, 70, 100]),
        ((20, 90), 100, [55, 110]),
        ((0, 5, 0), 2, [2, 4, 5]),
        ((), 3, []),
        ((1, 1, 1), 1, [1, 2, 3]),
    ],
)
def test_cuts(rows: tuple[int, ...], wanted: int, ends: list[int]) -> None:
    assert cut_file(rows, 0, sum(rows), wanted) == ends


def test_a_file_of_many_row_groups_is_cut_in_a_moment() -> None:
    ends = cut_file((10,) * 200_000, 0, 2_000_000, 10)
    assert len(ends) == 200_000


def test_row_groups_are_decoded_once_where_shards_end_at_their_borders() -> None:
    found = [make_file("/a", (90, 110, 100, 95))]
    plan = make_plan(make_spec(100), found)
    assert [shard.row_end for shard in plan.shards] == [90, 200, 300, 395]
    assert read_amplification(plan.shards) == 1.0


def test_amplification_counts_rows_decoded_for_rows_used() -> None:
    file = make_file("/a", (100,))
    assert read_amplification([Shard(0, file, 0, 50), Shard(1, file, 50, 100)]) == (50 + 100) / 100
    two = make_file("/b", (10, 10))
    assert read_amplification([Shard(0, two, 0, 10), Shard(1, two, 10, 20)]) == 1.0
    assert read_amplification([Shard(0, two, 15, 20)]) == 10 / 5
    assert read_amplification([Shard(0, make_file("/c", (0, 0, 4)), 0, 4)]) == 1.0
    assert read_amplification([Shard(0, make_file("/d", (0, 3, 0, 4, 0)), 1, 5)]) == 5 / 4
    assert read_amplification([]) == 1.0


def test_a_remote_row_group_counts_whole_for_each_shard_that_lies_in_it() -> None:
    """`read` asks pyarrow to fetch a remote row group's columns in one piece, before any row is decoded."""
    file = make_file("s3://bucket/a", (100, 0, 50))
    assert read_amplification([Shard(0, file, 0, 50), Shard(1, file, 50, 100)]) == 200 / 100
    assert read_amplification([Shard(0, file, 90, 110)]) == 150 / 20
    assert read_amplification([Shard(0, file, 0, 150)]) == 1.0


def test_amplification_of_many_shards_and_row_groups_is_known_in_a_moment() -> None:
    file = make_file("/a", (10,) * 20_000)
    shards = [Shard(number, file, 5 * number, 5 * number + 5) for number in range(40_000)]
    assert read_amplification(shards) == 1.5


# ---- large row groups


def make_large_plan(rows: tuple[int, ...], workers: int = 1, folder: str = "", **sampling: int) -> plan_module.Plan:
    return make_plan(make_spec(workers=workers, **sampling), [make_file(f"{folder}/a", rows)])


@pytest.mark.parametrize(
    ("rows", "workers", "num_shards"),
    [
        ((1_000_000,), 1, 4),
        ((1_000_000,), 2, 4),
        ((1_000_000,), 3, 3),  # not 4: two workers would wait for the one with two
        ((1_000_000,), 5, 5),  # more pieces than are good for reading, but every worker has work
        ((1_000_003,), 4, 4),
        ((1_048_576,) * 10, 3, 40),
        ((1_048_576,) * 10, 40, 40),
        ((1_048_576,) * 10, 80, 80),
        ((10_000,) * 100, 4, 100),
    ],
)
def test_a_large_row_group_is_cut_into_few_pieces(rows: tuple[int, ...], workers: int, num_shards: int) -> None:
    plan = make_large_plan(rows, workers, "s3://bucket")
    assert len(plan.shards) == num_shards
    assert (read_amplification(plan.shards) <= MAX_AMPLIFICATION) == (workers <= 4 * len(rows))


@settings(max_examples=100, deadline=None)
@given(st.integers(100, 300), st.integers(1, 8), st.data())
def test_equal_row_groups_are_read_about_four_times_at_most(size: int, num_groups: int, data: st.DataObject) -> None:
    workers = data.draw(st.integers(1, 4 * num_groups))
    plan = make_large_plan((size,) * num_groups, workers, "s3://bucket")
    assert read_amplification(plan.shards) <= MAX_AMPLIFICATION + 1


def test_shards_of_long_answers_stay_small_enough_for_a_workers_memory() -> None:
    plan = make_large_plan((1_000_000,), max_tokens=16_384)
    assert len(plan.shards) == 17
    assert max(shard.num_rows for shard in plan.shards) * 4_000 * 4.5 < 1.1 * 2**30


def test_an_explicit_size_wins_over_row_groups_and_is_warned_of() -> None:
    plan = make_plan(make_spec(1_000), [make_file("/a", (100_000,))])
    assert len(plan.shards) == 100
    warning = describe_amplification(plan.shards)
    assert warning is not None
    assert "read 50.5 times over" in warning
    assert "row groups (about 1,000 rows each)" in warning
    assert "\n" not in warning
    assert describe_amplification(make_large_plan((100_000,)).shards) is None
    assert describe_amplification([]) is None


# ---- how large


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3_000), st.integers(1, 20))
def test_every_worker_gets_at_least_four_shards_where_row_groups_allow_it(num_rows: int, workers: int) -> None:
    plan = make_plan(make_spec(workers=workers), [make_file("/a", (1,) * num_rows)])
    assert len(plan.shards) >= min(num_rows, SHARDS_PER_WORKER * workers)


@settings(max_examples=200, deadline=None)
@given(some_files, st.integers(1, 30))
def test_every_worker_gets_a_shard_whatever_the_row_groups(found: list[InputFile], workers: int) -> None:
    plan = make_plan(make_spec(workers=workers), found)
    assert len(plan.shards) >= min(plan.num_rows, workers)


def test_rows_per_shard_follow_the_expected_output() -> None:
    million = 1_000_000
    assert expected_tokens(make_spec(max_tokens=1024)) == 256
    assert expected_tokens(make_spec(max_tokens=1024, n=4)) == 1024
    assert expected_tokens(make_spec(max_tokens=1)) == 1
    assert expected_tokens(make_spec(max_tokens=64_000)) == 4_000
    short, long = (choose_rows_per_shard(make_spec(max_tokens=tokens), million) for tokens in (1024, 8192))
    assert short == pytest.approx(8 * long, rel=0.01)
    assert choose_rows_per_shard(make_spec(max_tokens=1024, n=4), million) == pytest.approx(short / 4, rel=0.01)
    assert choose_rows_per_shard(make_spec(7), million) == 7
    assert choose_rows_per_shard(make_spec(7, workers=1000), million) == 7


def test_a_billion_rows_make_no_more_shards_than_a_job_may_have() -> None:
    assert choose_rows_per_shard(make_spec(1), 10**9) == 5_000
    assert choose_rows_per_shard(make_spec(), 10**9) >= 5_000


@settings(max_examples=50, deadline=None)
@given(some_files, st.integers(1, 10))
def test_shards_grow_until_a_job_has_few_enough(found: list[InputFile], most: int) -> None:
    before, plan_module.MAX_SHARDS = plan_module.MAX_SHARDS, most
    try:
        num_files = sum(file.num_rows > 0 for file in found)
        if num_files > most:
            with pytest.raises(InputError, match=f"make {num_files} shards, more than {most}; merge small files first"):
                make_plan(make_spec(1), found)
        else:
            plan = make_plan(make_spec(1), found)
            assert len(plan.shards) <= most
            assert list_rows(plan.shards) == list_all_rows(found)
    finally:
        plan_module.MAX_SHARDS = before


def test_an_input_without_rows_is_refused() -> None:
    with pytest.raises(InputError, match="2 files with no rows"):
        make_plan(make_spec(), [make_file("/a", ()), make_file("/b", (0, 0))])


# ---- later listings


def test_a_later_listing_is_compared_by_path_and_version() -> None:
    planned = [make_file("/a"), make_file("/b"), make_file("/c")]
    assert list_changes(planned, [("/a", "v1"), ("/b", "v1"), ("/c", "v1")]) == ([], [], [])
    assert list_changes(planned, [("/d", "v9"), ("/c", "v2"), ("/a", "v1")]) == (["/b"], ["/c"], ["/d"])
    assert list_changes(planned, []) == (["/a", "/b", "/c"], [], [])
