"""Whose turn it is between urgent rows and all others: turns are counted, time is given, the model is the embedded one."""

import asyncio
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from batchgen.engines.decode import DecodeBatch
from batchgen.engines.hf_model import load_model
from batchgen.engines.lanes import BULK_EVERY, REST_SHARE, SHORT_PREFILL_TOKENS, URGENT_MEMORY_S, Lanes
from batchgen.engines.replies import ANSWERS_AT_ONCE, HOLD_TURNS, HeldAnswers, Job, answer
from batchgen.engines.sampling import Row, make_row
from batchgen.engines.transformers import NICE, TransformersEngine, lower_thread_priority
from batchgen.errors import EngineDied
from batchgen.records import Generation, Request, RowId, SamplingParams, Usage
from batchgen.spec import ModelSpec
from batchgen.specs.engine import TransformersEngineSpec

MAX_ROWS, PROMPT = 16, tuple(range(7, 15))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return load_model(ModelSpec(), TransformersEngineSpec(kind="transformers"))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_lanes(model: Any, clock: Clock, can_join: bool = True) -> Lanes:
    bulk = DecodeBatch(model, lambda _: "", max_rows=MAX_ROWS, max_cells=1 << 20, can_join=can_join)
    return Lanes(bulk.make_like(), bulk, 1024, clock)


def endless(max_tokens: int = 1000) -> Row:
    return make_row(PROMPT, SamplingParams(), max_tokens, frozenset())


def end_urgent(lanes: Lanes) -> None:
    """One urgent row from its beginning to its end."""
    row = endless(2)
    lanes.add(row, is_urgent=True)
    while not row.is_done:
        lanes.turn()


def fill(lanes: Lanes) -> list[int]:
    """Sizes of the prefills until all that wait are in."""
    for _ in range(MAX_ROWS):
        lanes.add(endless(), is_urgent=False)
    sizes: list[int] = []
    while sum(sizes) < MAX_ROWS:
        sizes.append(len(lanes.turn()[0]))
    return sizes


def test_bulk_begins_together_where_nothing_urgent_came(model: Any) -> None:
    assert fill(make_lanes(model, Clock())) == [MAX_ROWS]


def test_bulks_prefills_are_short_for_a_while_after_something_urgent(model: Any) -> None:
    clock = Clock()
    lanes = make_lanes(model, clock)
    end_urgent(lanes)
    clock.now = URGENT_MEMORY_S - 1
    sizes = fill(lanes)
    assert max(sizes) * len(PROMPT) <= SHORT_PREFILL_TOKENS * MAX_ROWS
    assert sizes == [6, 6, 4]  # one after the other, while many slots are free: no step between
    lanes = make_lanes(model, clock)
    end_urgent(lanes)
    clock.now += URGENT_MEMORY_S
    assert fill(lanes) == [MAX_ROWS]


def test_the_thread_rests_after_bulks_turns_for_a_while_after_something_urgent(model: Any) -> None:
    clock = Clock()
    lanes = make_lanes(model, clock)
    lanes.add(endless(), is_urgent=False)
    lanes.turn()
    assert lanes.find_rest_s(0.5) == 0.0, "nothing urgent came"
    end_urgent(lanes)
    assert lanes.find_rest_s(0.5) == 0.0, "that was no turn of bulk's"
    lanes.turn()
    assert lanes.find_rest_s(0.5) == REST_SHARE * 0.5
    clock.now += URGENT_MEMORY_S
    lanes.turn()
    assert lanes.find_rest_s(0.5) == 0.0


def test_something_urgent_ends_a_rest(model: Any) -> None:
    """One that has ten minutes to go: to sleep it out would end this test."""

    async def main() -> None:
        engine = TransformersEngine(ModelSpec(), TransformersEngineSpec(kind="transformers"))
        engine._is_yielding = True  # this thread keeps its priority
        lanes, (bulk, urgent) = make_lanes(model, Clock()), make_jobs(2)
        urgent.request = replace(urgent.request, is_urgent=True)
        lanes.add(endless(), is_urgent=False)
        engine._rest_until = time.monotonic() + 600
        for job in (bulk, urgent):
            engine._inbox.put(job)
        assert engine._take(lanes)
        assert lanes.is_urgent

    asyncio.run(main())


def test_a_prompt_longer_than_a_short_prefill_still_begins(model: Any) -> None:
    lanes = make_lanes(model, Clock())
    end_urgent(lanes)
    long = make_row(PROMPT * 20, SamplingParams(), 10, frozenset())
    lanes.add(long, is_urgent=False)
    assert lanes.turn()[0] == [long]


def test_rows_that_cant_join_later_begin_together_always(model: Any) -> None:
    lanes = make_lanes(model, Clock(), can_join=False)
    end_urgent(lanes)
    assert fill(lanes) == [MAX_ROWS]


def test_bulk_gets_its_turns_however_much_is_urgent(model: Any) -> None:
    lanes = make_lanes(model, Clock())
    row = endless()
    lanes.add(row, is_urgent=False)
    lanes.turn()
    lengths = []
    for number in range(4 * BULK_EVERY):
        if number % 4 == 0:
            lanes.add(endless(20), is_urgent=True)  # more than it can end in the meantime
        lanes.turn()
        lengths.append(len(row.out))
    assert lengths[-1] == 1 + 4
    assert all(lengths[at] < lengths[at + BULK_EVERY] for at in range(3 * BULK_EVERY))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_only_the_thread_that_decodes_steps_back() -> None:
    def find() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def step_back() -> tuple[int, int]:
        before = find()
        lower_thread_priority()
        return before, find()

    own = find()
    with ThreadPoolExecutor(1) as pool:
        before, after = pool.submit(step_back).result()
    assert after == min(19, before + NICE)
    assert find() == own


def make_jobs(num: int) -> list[Job]:
    loop = asyncio.get_running_loop()
    request = Request(RowId("", 0, 0), PROMPT, SamplingParams())
    return [Job(request, endless(), loop, loop.create_future(), 0.0) for _ in range(num)]


def test_answers_of_one_turn_let_other_work_of_the_loop_between() -> None:
    async def main() -> None:
        jobs = make_jobs(3 * ANSWERS_AT_ONCE)
        done: list[int] = []
        answer([(job, Generation("", (), "stop", Usage())) for job in jobs])
        while not all(job.future.done() for job in jobs):
            done.append(sum(job.future.done() for job in jobs))
            await asyncio.sleep(0)
        assert done == [0, ANSWERS_AT_ONCE, 2 * ANSWERS_AT_ONCE]

    asyncio.run(main())


def test_bulks_answers_wait_while_something_urgent_is_decoded_and_not_for_ever() -> None:
    async def main() -> None:
        bulk, urgent = make_jobs(2), make_jobs(1)
        urgent[0].request = replace(urgent[0].request, is_urgent=True)
        held = HeldAnswers()
        held.note_turn(is_urgent=True)
        held.add([(job, Generation("", (), "stop", Usage())) for job in [*bulk, *urgent]])
        await asyncio.sleep(0)
        assert [job.future.done() for job in [*bulk, *urgent]] == [False, False, True]
        for _ in range(HOLD_TURNS - 1):
            assert not bulk[0].future.done()
            held.note_turn(is_urgent=True)
            await asyncio.sleep(0)
        assert all(job.future.done() for job in bulk)
        (late,) = make_jobs(1)
        held.note_turn(is_urgent=True)
        held.add([(late, EngineDied("it ended"))])
        held.note_turn(is_urgent=False)
        await asyncio.sleep(0)
        assert isinstance(late.future.exception(), EngineDied)

    asyncio.run(main())


def test_a_caller_that_went_and_a_loop_that_is_closed_are_no_harm() -> None:
    async def leave() -> list[Job]:
        return make_jobs(2)

    async def main(gone: list[Job]) -> None:
        jobs = make_jobs(3)
        jobs[1].future.cancel()
        answer([(job, EngineDied("it ended")) for job in [*gone, *jobs]])
        await asyncio.sleep(0)
        assert [job.future.cancelled() for job in jobs] == [False, True, False]
        assert all(isinstance(job.future.exception(), EngineDied) for job in (jobs[0], jobs[2]))

    asyncio.run(main(asyncio.run(leave())))
