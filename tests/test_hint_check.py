"""Hints are followed while the answers bear them out; in virtual time, what that is worth and what it can cost."""

import heapq
import random
from collections import deque
from collections.abc import Callable

import pytest

from batchgen.bench.oracle import find_fifo_s, find_longest_first_s
from batchgen.bench.saturation import make_hints
from batchgen.bench.workload import Workload
from batchgen.lengths import MANY_WINDOWS
from batchgen.worker.hint_check import HALF_LIFE, MIN_ANSWERS, HintCheck
from batchgen.worker.read_ahead import ReadAhead, Stretch

SLOTS = 64


def draw(rng: random.Random) -> int:
    return round(rng.lognormvariate(5, 0.8)) + 1


def note(check: HintCheck, num_answers: int, hint: Callable[[random.Random, int], float], seed: int = 0) -> HintCheck:
    rng = random.Random(seed)
    for _ in range(num_answers):
        tokens = draw(rng)
        check.note(hint(rng, tokens), tokens)
    return check


def exact(_: random.Random, tokens: int) -> float:
    return tokens


def noisy(rng: random.Random, tokens: int) -> float:
    return tokens * rng.lognormvariate(0, 1)


def useless(rng: random.Random, _: int) -> float:
    return draw(rng)


@pytest.mark.parametrize("hint", [exact, noisy])
def test_hints_that_say_something_are_followed(hint: Callable[[random.Random, int], float]) -> None:
    assert all(note(HintCheck(), 1000, hint, seed).are_useful for seed in range(20))


@pytest.mark.parametrize("hint", [useless, lambda _, tokens: 1e6 / tokens])
def test_hints_that_say_nothing_are_not(hint: Callable[[random.Random, int], float]) -> None:
    assert not any(note(HintCheck(), 1000, hint, seed).are_useful for seed in range(20))


@pytest.mark.parametrize("num_requests", [None, 80 * MANY_WINDOWS - 1])
def test_they_have_the_benefit_of_the_doubt_where_the_proof_would_come_late(num_requests: int | None) -> None:
    assert HintCheck(num_requests, 80).are_useful
    assert note(HintCheck(num_requests, 80), MIN_ANSWERS - 1, useless).are_useful


def test_they_prove_themselves_first_where_many_rows_follow() -> None:
    num_requests = 80 * MANY_WINDOWS
    assert not note(HintCheck(num_requests, 80), MIN_ANSWERS - 1, exact).are_useful
    assert note(HintCheck(num_requests, 80), MIN_ANSWERS, exact).are_useful


@pytest.mark.parametrize("tokens", [0.0, 100.0, 9000.0])
def test_one_expectation_for_all_says_nothing_against_others(tokens: float) -> None:
    """As while the rows of one template come back: those of the next one still have their turn."""
    check = note(HintCheck(), 1000, lambda *_: tokens)
    assert check.are_useful
    assert not note(check, 5 * HALF_LIFE, useless).are_useful


def test_what_they_were_is_forgotten() -> None:
    check = note(HintCheck(), 5 * HALF_LIFE, exact)
    assert not note(check, 5 * HALF_LIFE, useless, seed=1).are_useful
    assert note(check, 5 * HALF_LIFE, exact, seed=2).are_useful


def simulate(services_s: list[float], hints: list[float | None]) -> float:
    """Makespan of one worker with all shards open: rows in the order of `ReadAhead`, 1.25 rows in flight for each slot, as
    many prepared ahead, the engine first come first served."""
    ahead, check = ReadAhead[int](), HintCheck(len(services_s), round(1.25 * SLOTS))
    for start in range(0, len(services_s), 125):
        some = hints[start : start + 125]
        ahead.add(Stretch(start, list(range(len(some))), 1.0, some))
    prepared, queued, running = deque[int](), deque[int](), list[tuple[float, int]]()
    now, num_done = 0.0, 0
    while num_done < len(services_s):
        ahead.sort(check.are_useful)
        while len(prepared) < SLOTS and ahead.num_rows:
            prepared += [stretch.source + place for stretch, run in ahead.take(SLOTS, 1e9) for place in run]
        while prepared and len(queued) + len(running) < 1.25 * SLOTS:
            queued.append(prepared.popleft())
        while queued and len(running) < SLOTS:
            row = queued.popleft()
            heapq.heappush(running, (now + services_s[row], row))
        now, row = heapq.heappop(running)
        num_done += 1
        if (hint := hints[row]) is not None:
            check.note(hint, round(1000 * services_s[row]))
    return now


def compare(kind: str, seed: int) -> tuple[float, float]:
    """Makespan over that of first come first served, and of longest first, on as many slots."""
    services_s = Workload(slots=SLOTS, seed=seed).list_services_s()
    found = simulate(services_s, make_hints(services_s, kind, seed))
    return found / find_fifo_s(services_s, SLOTS), found / find_longest_first_s(services_s, SLOTS)


@pytest.mark.parametrize(("kind", "over_longest_first"), [("exact", 1.001), ("noisy", 1.02)])
def test_hints_make_the_makespan_of_longest_first(kind: str, over_longest_first: float) -> None:
    assert max(compare(kind, seed)[1] for seed in range(5)) <= over_longest_first


@pytest.mark.parametrize("kind", ["none", "constant"])
def test_no_hints_and_equal_ones_make_that_of_first_come_first_served(kind: str) -> None:
    assert [compare(kind, seed)[0] for seed in range(5)] == [1.0] * 5


@pytest.mark.parametrize("kind", ["random", "reversed"])
def test_useless_hints_never_cost_a_hundredth_over_none(kind: str) -> None:
    assert max(compare(kind, seed)[0] for seed in range(20)) <= 1.01
