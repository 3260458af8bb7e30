"""The in-flight window: never over its bounds, and its mean over time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.worker.window import Window


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rows_bound_the_window() -> None:
    window = Window(2, 1000)
    window.enter(1)
    assert window.fits(1)
    window.enter(1)
    assert not window.fits(1)
    with pytest.raises(ValueError, match="2 rows and 2 bytes are in flight: no room for 1"):
        window.enter(1)
    window.leave(1)
    assert window.fits(1)


def test_bytes_bound_the_window_too() -> None:
    window = Window(100, 10)
    window.enter(6)
    window.enter(4)
    assert not window.fits(1)
    window.leave(4)
    assert (window.fits(4), window.fits(5)) == (True, False)
    assert (window.num_rows, window.num_bytes) == (1, 6)


def test_what_is_larger_than_the_window_passes_alone() -> None:
    window = Window(100, 10)
    assert window.fits(50)
    window.enter(1)
    assert not window.fits(50)
    window.leave(1)
    window.enter(50)
    assert not window.fits(1)


def test_the_integral_is_rows_times_seconds() -> None:
    clock = Clock()
    window = Window(10, 10, clock)
    clock.now = 5.0
    assert window.read_integral() == 0.0
    window.enter(1)
    clock.now = 7.0
    window.enter(1)
    assert window.read_integral() == 2.0
    clock.now = 10.0
    assert window.read_integral() == window.read_integral() == 8.0
    window.leave(1)
    clock.now = 11.0
    window.leave(1)
    clock.now = 99.0
    assert window.read_integral() == pytest.approx(9.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 20), st.lists(st.tuples(st.booleans(), st.integers(0, 25)), max_size=40))
def test_bounds_hold_whatever_comes_and_goes(max_rows: int, max_bytes: int, steps: list[tuple[bool, int]]) -> None:
    window = Window(max_rows, max_bytes)
    inside: list[int] = []
    for is_leaving, size in steps:
        if is_leaving and inside:
            window.leave(inside.pop(size % len(inside)))
        elif window.fits(size):
            window.enter(size)
            inside.append(size)
        else:
            assert inside
            assert len(inside) == max_rows or sum(inside) + size > max_bytes
        assert (window.num_rows, window.num_bytes) == (len(inside), sum(inside))
        assert len(inside) <= max_rows
        assert sum(inside) <= max_bytes or len(inside) == 1
