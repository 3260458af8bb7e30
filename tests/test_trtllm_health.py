"""The policy of a TensorRT-LLM engine's health, in times of its own."""

from typing import Any

import pytest

from batchgen.engines.trtllm.health import (
    MAX_ANSWER_RECYCLES,
    MAX_LOOK_GAP_S,
    MENDED_ANSWERS,
    SHARE_ANSWERS,
    Health,
    History,
    Kill,
    Recycle,
)
from batchgen.specs.tensorrt_llm import TensorRTLLMEngineSpec

GIB = 2**30


def make_section(**fields: Any) -> TensorRTLLMEngineSpec:
    return TensorRTLLMEngineSpec(kind="tensorrt_llm", **fields)


def make_up(now: float = 100.0, **fields: Any) -> Health:
    health = Health(make_section(**fields), now - 10)
    health.note_up(now)
    return health


def beat(health: Health, now: float, tokens: int, rss: int = GIB, is_healthy: bool = True) -> None:
    health.note_beat(now, total_tokens=tokens, rss_bytes=rss, is_healthy=is_healthy)


def judge_often(health: Health, start: float, end: float) -> tuple[float, Kill | Recycle] | None:
    """The first verdict of looks every second, and when it fell."""
    now = start
    while now <= end:
        if (verdict := health.judge(now)) is not None:
            return now, verdict
        now += 1.0
    return None


def test_a_start_has_its_time() -> None:
    health = Health(make_section(start_timeout_s=60), 100.0)
    found = judge_often(health, 100, 300)
    assert found is not None
    assert found[0] == 161
    assert "engine.start_timeout_s" in found[1].reason


def test_beats_during_a_start_are_no_reason_to_wait_longer() -> None:
    health = Health(make_section(start_timeout_s=60), 100.0)
    for now in range(100, 161, 5):
        beat(health, now, 0, is_healthy=False)
        assert health.judge(now) is None
    assert isinstance(health.judge(160.1), Kill)


def test_no_token_while_requests_wait_is_a_hang() -> None:
    health = make_up(no_progress_s=30)
    health.note_sent(200.0, 1, 1000)
    beat(health, 210.0, 5)
    beat(health, 225.0, 5)
    found = judge_often(health, 200, 300)
    assert found is not None
    assert found[0] == 241
    assert found[1] == Kill("it made no token for 30 s with 1 requests in flight (engine.no_progress_s)")


def test_tokens_or_answers_are_progress() -> None:
    health = make_up(no_progress_s=30)
    for number in range(20):
        health.note_sent(100.0 + number, number, 1000)
    for step in range(1, 10):
        beat(health, 100.0 + 20 * step, step)
        assert judge_often(health, 100.0 + 20 * step, 119.0 + 20 * step) is None
    for number in range(9):
        health.note_ended(300.0 + 20 * number, number)
        assert judge_often(health, 300.0 + 20 * number, 319.0 + 20 * number) is None


def test_a_hang_does_not_hide_behind_requests_whose_time_is_over() -> None:
    """A thousand in flight were sent at as many times, so one of them is given up at any moment."""
    health = make_up(no_progress_s=30)
    for number in range(100):
        health.note_sent(100.0, number, 1000)
    beat(health, 101.0, 5)
    for number in range(30):
        health.note_given_up(101.0 + number, number)
        assert health.judge(101.0 + number) is None
    assert isinstance(health.judge(131.1), Kill)


def test_a_hang_is_seen_when_each_request_is_given_up_before_it() -> None:
    """Idle time counts for nothing; time in which somebody waited in vain adds up."""
    health = make_up(no_progress_s=30)
    for number in range(3):
        start = 1000.0 * (number + 1)
        health.note_sent(start, number, 1000)
        assert judge_often(health, start, start + 9) is None
        health.note_given_up(start + 10, number)
        assert judge_often(health, start + 10, start + 999) is None
    health.note_sent(4000.0, 9, 1000)
    assert isinstance(health.judge(4001.0), Kill)
    health = make_up(no_progress_s=30)
    for number in range(50):
        health.note_sent(1000.0 * number, number, 1000)
        beat(health, 1000.0 * number + 5, number + 1)
        health.note_given_up(1000.0 * number + 10, number)
        assert health.judge(1000.0 * number + 10) is None


def test_an_engine_that_fails_nearly_all_it_gets_is_started_anew() -> None:
    """One rank's failure takes what it had, and is no reason."""
    health = make_up(max_batch_size=64)
    for number in range(1000):
        health.note_answer(number, is_empty=False)
    for _ in range(64):
        health.note_failure()
    assert health.judge(101.0) is None
    for number in range(31):
        health.note_failure()
        health.note_answer(number, is_empty=False)
    assert health.judge(101.0) is None
    for _ in range(128):
        health.note_failure()
    verdict = health.judge(101.0)
    assert isinstance(verdict, Recycle)
    assert (verdict.reason, verdict.is_for_answers) == ("it failed 128 of the last 128 requests", True)


def test_an_idle_engine_does_not_hang() -> None:
    health = make_up(no_progress_s=30)
    assert judge_often(health, 100, 1000) is None
    health.note_sent(1000.0, 1, 10)
    assert judge_often(health, 1000, 1029) is None


def test_a_pause_of_this_process_is_not_the_engines() -> None:
    health = make_up(no_progress_s=30)
    health.note_sent(200.0, 1, 1000)
    assert health.judge(201.0) is None
    late = 201.0 + MAX_LOOK_GAP_S + 100
    assert health.judge(late) is None
    found = judge_often(health, late, late + 100)
    assert found is not None
    assert found[0] == late + 31


def test_the_vendors_own_word_counts_when_it_is_bad() -> None:
    health = make_up()
    beat(health, 101.0, 0, is_healthy=False)
    assert isinstance(health.judge(101.0), Kill)


def test_a_canary_is_due_when_nothing_else_shows_life() -> None:
    health = make_up(now=100.0, canary_interval_s=60)
    assert not health.is_canary_due(159.0)
    assert health.is_canary_due(160.0)
    health.note_sent(160.0, 1, 1)
    assert not health.is_canary_due(500.0), "what is in flight shows whether it lives"
    health.note_ended(500.0, 1)
    assert not health.is_canary_due(559.0)
    assert health.is_canary_due(560.0)
    assert not Health(make_section(), 0.0).is_canary_due(1e6), "one that starts is not asked"


def test_a_canary_that_is_not_answered_is_a_hang() -> None:
    health = make_up(now=100.0, canary_interval_s=60, no_progress_s=30)
    health.note_sent(160.0, 1, 1)
    found = judge_often(health, 160, 300)
    assert found is not None
    assert found[0] == 191


def test_a_request_has_the_time_that_its_tokens_need() -> None:
    health = make_up(request_base_s=100, min_tokens_per_s=10)
    health.note_sent(1000.0, 1, 50)
    health.note_sent(1000.0, 2, 5000)
    assert health.list_overdue(1105.0) == []
    assert health.list_overdue(1105.1) == [1]
    health.note_ended(1105.1, 1)
    assert health.list_overdue(1600.0) == []
    assert health.list_overdue(1600.1) == [2]


def test_memory_may_grow_so_much_since_it_was_up() -> None:
    health = Health(make_section(max_rss_growth_gib=8), 0.0)
    beat(health, 1.0, 0, rss=GIB)
    health.note_up(10.0)
    beat(health, 11.0, 0, rss=50 * GIB)
    assert health.judge(11.0) is None, "loading is no growth"
    beat(health, 12.0, 0, rss=58 * GIB)
    assert health.judge(12.0) is None
    beat(health, 13.0, 0, rss=58 * GIB + 2**28)
    verdict = health.judge(13.0)
    assert isinstance(verdict, Recycle)
    assert not verdict.is_for_answers
    assert "58" not in verdict.reason, "it is the growth that is told"


def test_empty_answers_of_different_rows_in_a_row() -> None:
    health = make_up(max_empty_in_a_row=3)
    for _ in range(10):
        health.note_answer("one row", is_empty=True)
    assert health.judge(101.0) is None, "a row may be the reason itself"
    health.note_answer("b", is_empty=True)
    health.note_answer("c", is_empty=False)
    health.note_answer("d", is_empty=True)
    health.note_answer("e", is_empty=True)
    assert health.judge(101.0) is None
    health.note_answer("f", is_empty=True)
    verdict = health.judge(101.0)
    assert isinstance(verdict, Recycle)
    assert verdict.is_for_answers


def test_empty_answers_among_many() -> None:
    health = make_up(max_empty_in_a_row=100, max_empty_share=0.02)
    for number in range(SHARE_ANSWERS):
        health.note_answer(number, is_empty=number % 56 == 0)
    assert sum(health.was_empty) == 9
    assert health.judge(101.0) is None
    health.note_answer("more", is_empty=True)
    assert sum(health.was_empty) == 9, "the oldest one left"
    health.note_answer("more", is_empty=True)
    assert isinstance(health.judge(101.0), Recycle)


def test_restarts_that_help_nobody_are_numbered() -> None:
    history = History(max_restarts=2)
    assert history.may_restart()
    assert history.may_restart()
    assert not history.may_restart()
    history.note_finished()
    assert history.may_restart()


def test_what_starting_anew_does_not_mend_is_left() -> None:
    history, recycle = History(max_restarts=1), Recycle("empty", is_for_answers=True)
    for _ in range(MAX_ANSWER_RECYCLES):
        assert history.can_recycle(recycle)
        history.note_recycle(recycle)
    assert not history.can_recycle(recycle)
    assert history.can_recycle(Recycle("memory"))


def test_what_it_mended_may_be_mended_again() -> None:
    history, recycle = History(max_restarts=1), Recycle("empty", is_for_answers=True)
    for _ in range(MAX_ANSWER_RECYCLES):
        history.note_recycle(recycle)
    for _ in range(MENDED_ANSWERS):
        assert not history.can_recycle(recycle)
        history.note_finished()
    for _ in range(MAX_ANSWER_RECYCLES):
        assert history.can_recycle(recycle)
        history.note_recycle(recycle)
    assert not history.can_recycle(recycle)


@pytest.mark.parametrize("rss", [0, GIB])
def test_an_unknown_memory_is_no_growth(rss: int) -> None:
    health = make_up()
    beat(health, 101.0, 0, rss=0)
    beat(health, 102.0, 0, rss=rss)
    assert health.judge(102.0) is None
