"""Rows read ahead: longest expected first over all of them, each once, and no more of them than the bounds allow."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.worker import read_ahead
from batchgen.worker.read_ahead import ReadAhead, Stretch

ALL = 10**9


def add(ahead: ReadAhead[str], name: str, expected: Sequence[float | None] | None, num_rows: int = 0) -> None:
    places = list(range(len(expected) if expected is not None else num_rows))
    ahead.add(Stretch(name, places, 1.0, expected))


def take(ahead: ReadAhead[str], max_rows: int = ALL, max_bytes: float = ALL) -> list[str]:
    return [f"{stretch.source}{place}" for stretch, run in ahead.take(max_rows, max_bytes) for place in run]


def test_the_longest_goes_first_whichever_stretch_it_is_of() -> None:
    ahead: ReadAhead[str] = ReadAhead()
    add(ahead, "a", [1, 9, 5])
    add(ahead, "b", [7, 2, 8])
    assert take(ahead, 2) == ["a1", "b2"]
    add(ahead, "c", [6])
    assert take(ahead) == ["b0", "c0", "a2", "b1", "a0"]
    assert take(ahead) == []


@pytest.mark.parametrize("expected", [None, [None] * 3, [4.0] * 3, [float("nan")] * 3])
def test_without_hints_and_with_equal_ones_the_order_is_that_of_reading(
    expected: Sequence[float | None] | None,
) -> None:
    ahead: ReadAhead[str] = ReadAhead()
    add(ahead, "a", expected, 3)
    add(ahead, "b", expected, 3)
    assert take(ahead) == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_a_row_without_a_hint_counts_as_an_average_one() -> None:
    ahead: ReadAhead[str] = ReadAhead()
    add(ahead, "a", [1.0, None, 9.0, float("inf")])
    add(ahead, "b", None, 1)
    assert take(ahead) == ["a2", "a1", "a3", "b0", "a0"]


def test_neighbours_come_as_one_run() -> None:
    ahead: ReadAhead[str] = ReadAhead()
    add(ahead, "a", None, 500)
    [(stretch, run)] = ahead.take(64, ALL)
    assert (stretch.source, run) == ("a", [*range(64)])


def test_the_order_can_be_given_up_and_taken_up_again() -> None:
    ahead: ReadAhead[str] = ReadAhead()
    add(ahead, "a", [1, 9, 5, 7])
    add(ahead, "b", [8, 2, 6, 3])
    assert take(ahead, 2) == ["a1", "b0"]
    ahead.sort(False)
    assert take(ahead, 2) == ["a0", "a2"]
    ahead.sort(True)
    assert take(ahead) == ["a3", "b2", "b3", "b1"]


def test_both_bounds_of_a_step_hold_and_one_row_always_comes() -> None:
    ahead: ReadAhead[str] = ReadAhead()
    ahead.add(Stretch("a", [0, 1, 2, 3], 10.0))
    assert take(ahead, 1) == ["a0"]
    assert take(ahead, ALL, 15) == ["a1", "a2"]
    ahead.add(Stretch("b", [0], 1e6))
    assert take(ahead, ALL, 1) == ["a3"]
    assert take(ahead, ALL, 1) == ["b0"]


def test_in_input_order_few_rows_are_read_ahead_and_to_sort_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "MAX_ROWS_IN_ORDER", 4)
    monkeypatch.setattr(read_ahead, "MAX_ROWS", 8)
    monkeypatch.setattr(read_ahead, "MAX_BYTES", 100)
    ahead: ReadAhead[str] = ReadAhead()
    add(ahead, "a", None, 3)
    assert not ahead.is_full
    add(ahead, "b", None, 1)
    assert ahead.is_full
    add(ahead, "c", [1.0, 2.0])
    assert not ahead.is_full, "now there is something to sort"
    ahead.sort(False)
    assert ahead.is_full
    ahead.sort(True)
    add(ahead, "d", [1.0, 2.0])
    assert ahead.is_full
    take(ahead)
    assert (ahead.is_full, ahead.num_rows) == (False, 0)
    ahead.add(Stretch("e", [0], 100.0))
    assert ahead.is_full, "bytes are bounded too"


hints = st.one_of(st.none(), st.sampled_from([1.0, 2.0, 3.0]), st.floats())
steps = st.lists(
    st.one_of(
        st.lists(hints, min_size=1, max_size=6),
        st.integers(1, 5),
        st.booleans(),
    ),
    max_size=20,
)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_every_row_is_given_out_once_whatever_happens(steps: list[list[float | None] | int | bool]) -> None:
    ahead: ReadAhead[int] = ReadAhead()
    added: list[tuple[int, int]] = []
    taken: list[tuple[int, int]] = []
    for number, step in enumerate([*steps, 10_000]):
        if isinstance(step, bool):
            ahead.sort(step)
        elif isinstance(step, int):
            taken += [(stretch.source, place) for stretch, run in ahead.take(step, ALL) for place in run]
        else:
            ahead.add(Stretch(number, list(range(len(step))), 1.0, step))
            added += [(number, place) for place in range(len(step))]
        assert ahead.num_rows == len(added) - len(taken)
    assert sorted(taken) == added
