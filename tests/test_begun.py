"""When rows that an engine has begun go on at another one: where that ends the run sooner, and nowhere else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.queue.begun import PaceCurve, choose_moves
from batchgen.queue.tail import TailPolicy, WorkerLoad

POLICY = TailPolicy()
# As DeepSeek-V3.2 on eight B200: 12 ms a step, and 18 us more for each request.
STEP_S, ROW_S = 0.012, 18e-6


def make_curve(step_s: float = STEP_S, row_s: float = ROW_S, seen: tuple[int, ...] = (128, 512, 1024)) -> PaceCurve:
    curve = PaceCurve()
    for rows in seen:
        for _ in range(20):
            curve.note(rows, step_s + row_s * rows)
    return curve


def load(worker_id: str, inflight: int, *, unsent: int = 0, can_move: bool = True) -> WorkerLoad:
    begun = ((f"{worker_id}-1", inflight // 3), (f"{worker_id}-2", inflight - inflight // 3)) if can_move else ()
    return WorkerLoad(worker_id, 1024, inflight, unsent, ((f"{worker_id}-1", unsent),), 1.0, begun)


def move(
    *workers: WorkerLoad, curve: PaceCurve | None = None, mean: float | None = 4000
) -> list[tuple[str, str, str, int]]:
    splits = choose_moves(workers, make_curve() if curve is None else curve, mean, POLICY)
    assert all(split.is_begun for split in splits)
    return [(split.owner_id, split.batch_id, split.helper_id, split.num_requests) for split in splits]


def test_an_idle_engine_gets_half_of_the_fullest_ones_rows_from_its_largest_batches() -> None:
    assert move(load("a", 900), load("b", 0)) == [("a", "a-2", "b", 450)]
    assert move(load("a", 900), load("b", 100)) == [("a", "a-2", "b", 400)]
    a = WorkerLoad("a", 1024, 900, 0, (), 1.0, (("x", 300), ("y", 300), ("z", 300)))
    assert move(a, load("b", 0)) == [("a", "x", "b", 300), ("a", "y", "b", 150)]


def test_the_emptiest_is_given_to_by_the_fullest_and_so_on_inwards() -> None:
    pairs = [(owner, helper) for owner, _, helper, _ in move(*(load(n, 250 * i) for i, n in enumerate("abcd")))]
    assert pairs == [("d", "a"), ("c", "b")]
    assert [(o, h) for o, _, h, _ in move(load("a", 0), load("b", 0), load("c", 900), load("d", 1000))] == [
        ("d", "a"),
        ("c", "b"),
    ]


@pytest.mark.parametrize(
    "workers",
    [
        (load("a", 900), load("b", 0, unsent=3)),  # somebody has rows that cost less to move
        (load("a", 900, can_move=False), load("b", 0)),
        (load("a", 900), load("b", 890)),
        (load("a", 12), load("b", 0)),  # few rows are as fast as fewer
        (load("a", 900),),
        (),
    ],
)
def test_nothing_is_moved_where_that_gains_nothing(workers: tuple[WorkerLoad, ...]) -> None:
    assert move(*workers) == []


def test_an_engine_whose_pace_is_always_the_same_keeps_its_rows() -> None:
    assert move(load("a", 900), load("b", 0), curve=make_curve(row_s=0.0)) == []


def test_rows_that_wait_in_a_full_engine_are_moved() -> None:
    """64 slots at 50 tokens/s: with 256 in flight a row takes four times as long for a token."""
    curve = PaceCurve()
    for rows in (32, 64, 128, 256):
        curve.note(rows, 0.02 * max(1.0, rows / 64))
    assert move(load("a", 256), load("b", 0), curve=curve, mean=500) == [("a", "a-2", "b", 128)]


def test_short_answers_are_not_worth_a_prefill() -> None:
    assert move(load("a", 900), load("b", 0), mean=200) == []
    assert move(load("a", 900), load("b", 0), mean=None) == [], "nothing has ended yet"


def test_until_the_pace_is_known_a_small_share_shows_it_to_an_idle_engine_only() -> None:
    curve = make_curve(seen=(1024,))
    assert curve.find_slope() is None
    assert move(load("a", 1000), load("b", 0), curve=curve) == [("a", "a-2", "b", 125)]
    assert move(load("a", 1000), load("b", 100), curve=curve) == []
    assert move(load("a", 1), load("b", 0), curve=curve) == []


@settings(deadline=None)
@given(st.floats(0.001, 1.0), st.floats(0.0, 1e-3))
def test_a_line_is_found_again(step_s: float, row_s: float) -> None:
    curve = make_curve(step_s, row_s)
    assert curve.find_slope() == pytest.approx(row_s, abs=1e-9)
    assert curve.estimate(700) == pytest.approx(step_s + 700 * row_s, rel=1e-6)


def test_an_engine_that_gets_faster_with_more_rows_is_taken_for_one_of_the_same_pace() -> None:
    curve = PaceCurve()
    curve.note(10, 0.03)
    curve.note(100, 0.02)
    assert curve.find_slope() == 0.0


LOADS = st.lists(st.tuples(st.integers(0, 1024), st.integers(0, 1024)), max_size=6)


@settings(deadline=None)
@given(LOADS, st.floats(1, 20_000))
def test_no_more_is_taken_than_is_there_and_nobody_gives_and_gets(loads: list[tuple[int, int]], mean: float) -> None:
    workers = [
        WorkerLoad(f"w{n}", 1024, inflight, 0, (), 1.0, ((f"b{n}", min(begun, inflight)),))
        for n, (inflight, begun) in enumerate(loads)
    ]
    splits = choose_moves(workers, make_curve(), mean, POLICY)
    before = {worker.worker_id: worker.num_inflight for worker in workers}
    after = dict(before)
    for split in splits:
        after[split.owner_id] -= split.num_requests
        after[split.helper_id] += split.num_requests
        assert split.num_requests <= dict(workers[int(split.owner_id[1:])].begun)[split.batch_id]
    assert not {split.owner_id for split in splits} & {split.helper_id for split in splits}
    assert max(after.values(), default=0) <= max(before.values(), default=0)
