"""The in-flight window: never over its bounds, first come first served, and nobody waits for ever."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.window import Window


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_rows_bound_the_window_and_waiters_are_served_in_order() -> None:
    async def work() -> None:
        window, served = Window(2, 1000), list[int]()

        async def enter(number: int) -> None:
            await window.acquire(1)
            served.append(number)

        tasks = [asyncio.ensure_future(enter(number)) for number in range(5)]
        await settle()
        assert served == [0, 1]
        for number in range(2, 5):
            window.release(1)
            await settle()
            assert served == list(range(number + 1))
            assert window.num_rows == 2
        assert all(task.done() for task in tasks)

    run(work())


def test_bytes_bound_the_window_too() -> None:
    async def work() -> None:
        window = Window(100, 10)
        await window.acquire(6)
        await window.acquire(4)
        waiting = asyncio.ensure_future(window.acquire(5))
        await settle()
        assert not waiting.done()
        window.release(4)
        await settle()
        assert not waiting.done()
        window.release(6)
        await settle()
        assert waiting.done()
        assert (window.num_rows, window.num_bytes) == (1, 5)

    run(work())


def test_what_is_larger_than_the_window_passes_alone() -> None:
    async def work() -> None:
        window = Window(100, 10)
        await window.acquire(1)
        large = asyncio.ensure_future(window.acquire(50))
        small = asyncio.ensure_future(window.acquire(1))
        await settle()
        assert not large.done()
        assert not small.done(), "a small one must not overtake, or the large one waits for ever"
        window.release(1)
        await settle()
        assert large.done()
        assert not small.done()
        window.release(50)
        await settle()
        assert small.done()

    run(work())


def test_who_gives_up_waiting_makes_room_for_those_behind() -> None:
    async def work() -> None:
        window = Window(100, 10)
        await window.acquire(5)
        large = asyncio.ensure_future(window.acquire(8))
        small = asyncio.ensure_future(window.acquire(5))
        await settle()
        large.cancel()
        await settle()
        assert small.done(), "five bytes are free and nobody else waits"
        assert (window.num_rows, window.num_bytes) == (2, 10)

    run(work())


def test_who_is_cancelled_with_the_place_in_hand_gives_it_back() -> None:
    async def work() -> None:
        window = Window(1, 10)
        await window.acquire(1)
        first = asyncio.ensure_future(window.acquire(2))
        second = asyncio.ensure_future(window.acquire(3))
        await settle()
        window.release(1)
        first.cancel()
        await settle()
        assert first.cancelled()
        assert second.done()
        assert (window.num_rows, window.num_bytes) == (1, 3)

    run(work())


def test_the_integral_is_rows_times_seconds() -> None:
    async def work() -> None:
        clock = Clock()
        window = Window(10, 10, clock)
        clock.now = 5.0
        assert window.read_integral() == 0.0
        await window.acquire(1)
        clock.now = 7.0
        await window.acquire(1)
        assert window.read_integral() == 2.0
        clock.now = 10.0
        assert window.read_integral() == window.read_integral() == 8.0
        window.release(1)
        clock.now = 11.0
        window.release(1)
        clock.now = 99.0
        assert window.read_integral() == pytest.approx(9.0)

    run(work())


steps = st.lists(st.tuples(st.sampled_from(["acquire", "release", "cancel"]), st.integers(0, 15)), max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 20), steps)
def test_bounds_hold_and_room_is_never_left_while_somebody_fits(
    max_rows: int, max_bytes: int, steps: list[tuple[str, int]]
) -> None:
    async def work() -> None:
        window = Window(max_rows, max_bytes)
        waiting: list[tuple[int, asyncio.Future[None]]] = []
        inside: list[int] = []
        for name, size in steps:
            if name == "acquire":
                waiting.append((size, asyncio.ensure_future(window.acquire(size))))
            elif name == "release" and inside:
                window.release(inside.pop(size % len(inside)))
            elif name == "cancel" and waiting:
                waiting.pop(size % len(waiting))[1].cancel()
            await settle()
            inside += [size for size, task in waiting if task.done()]
            waiting = [(size, task) for size, task in waiting if not task.done()]
            assert (window.num_rows, window.num_bytes) == (len(inside), sum(inside))
            assert len(inside) <= max_rows
            assert sum(inside) <= max_bytes or len(inside) == 1
            if waiting:
                assert inside
                assert len(inside) == max_rows or sum(inside) + waiting[0][0] > max_bytes
        for _, task in waiting:
            task.cancel()
        await settle()

    run(work())
