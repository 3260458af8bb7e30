"""When a worker's next heartbeat is due."""

from hypothesis import given
from hypothesis import strategies as st

from batchgen.worker.pace import MIN_WAIT_S, Pace


def beat(pace: Pace, per_s: float, num: int, max_wait_s: float = 2.0) -> list[float]:
    """The waits of so many heartbeats, sending at this rate."""
    waits, now, sent = [], pace.now, float(pace.num_sent)
    for _ in range(num):
        wait = pace.choose_wait_s(int(sent), now, max_wait_s)
        waits.append(wait)
        now, sent = now + wait, sent + per_s * wait
    return waits


def test_fast_rows_are_told_of_before_half_a_window_was_sent_anew() -> None:
    waits = beat(Pace(window=80, now=0.0), per_s=120.0, num=20)
    assert all(wait * 120.0 <= 40 for wait in waits), waits


def test_slow_rows_cost_a_large_cluster_no_more_heartbeats_than_the_longest_wait() -> None:
    assert beat(Pace(window=1152, now=0.0), per_s=19.0, num=20)[-5:] == [2.0] * 5


def test_an_idle_worker_is_asked_for_less_and_less() -> None:
    assert beat(Pace(window=80, now=0.0), per_s=0.0, num=6) == [0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


def test_a_worker_that_begins_to_send_fast_is_told_of_at_the_next_heartbeat() -> None:
    pace = Pace(window=80, now=0.0)
    beat(pace, per_s=0.0, num=8)
    now = pace.now
    assert pace.choose_wait_s(240, now + 2.0, 2.0) < 0.2


@given(st.lists(st.tuples(st.integers(0, 10_000), st.floats(0, 10)), max_size=30), st.floats(0.2, 10))
def test_a_wait_stays_within_its_bounds(steps: list[tuple[int, float]], longest: float) -> None:
    pace, sent, now = Pace(window=64, now=0.0), 0, 0.0
    for num, spent in steps:
        sent, now = sent + num, now + spent
        assert MIN_WAIT_S <= pace.choose_wait_s(sent, now, longest) <= longest
