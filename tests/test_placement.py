"""Which rank a request goes to. Pure; the figures over whole workloads are `test_bench_placement`'s."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.worker.placement import BLOCK_TOKENS, Placer


def make_prompt(prefix: int, number: int, *, prefix_tokens: int = 256, suffix_tokens: int = 64) -> list[int]:
    shared = random.Random(prefix)
    own = random.Random(f"{prefix} {number}")
    return [shared.randrange(50_000) for _ in range(prefix_tokens)] + [
        own.randrange(50_000) for _ in range(suffix_tokens)
    ]


def test_prompts_that_begin_alike_go_to_one_rank() -> None:
    placer = Placer(4, slack=10.0)
    ranks = {}
    for number in range(80):
        prefix = number % 4
        ranks.setdefault(prefix, set()).add(placer.place(number, make_prompt(prefix, number), 0))
    assert {len(each) for each in ranks.values()} == {1}


def test_the_first_of_each_group_goes_where_least_is_in_flight() -> None:
    placer = Placer(4)
    assert sorted(placer.place(prefix, make_prompt(prefix, 0), 0) for prefix in range(4)) == [0, 1, 2, 3]


def test_a_group_larger_than_a_rank_spreads() -> None:
    placer = Placer(4)
    for number in range(400):
        placer.place(number, make_prompt(0, number), 0)
    loads = placer.list_loads()
    assert max(loads) <= 1.05 * sum(loads) / 4


def test_a_common_beginning_of_all_does_not_lump_the_groups_together() -> None:
    """A system prompt before every row, and groups behind it."""
    placer = Placer(8)
    system = make_prompt(99, 0)
    ranks: dict[int, list[int]] = {}
    rng = random.Random(5)
    for number in range(2000):
        prefix = rng.randrange(64)
        ranks.setdefault(prefix, []).append(placer.place(number, system + make_prompt(prefix, number), 0))
        if number >= 256:
            placer.release(number - 256, 0)
    assert {rank for each in ranks.values() for rank in each} == set(range(8))
    late = [len(set(each[len(each) // 2 :])) for each in ranks.values()]
    assert sum(late) / len(late) < 4, "groups are spread over all ranks"


def test_generated_tokens_count() -> None:
    """Two rows of 100 tokens on rank 0 have generated 500 each: the next ones go elsewhere until rank 1 has as many."""
    placer = Placer(2)
    long = [placer.place(("long", each), [each] * 100, 0) for each in range(2)]
    assert sorted(long) == [0, 1]
    placer.release(("long", 1), 500)
    kept = long[0]
    assert placer.list_loads()[kept] == 100 + 250  # 500 tokens, two rows
    for number in range(3):
        assert placer.place(number, [1000 + number] * 100, 500) == 1 - kept


def test_a_row_that_goes_on_stays_where_it_was() -> None:
    placer = Placer(3)
    rank = placer.place("row", list(range(64)), 0)
    placer.release("row", 1000)
    assert placer.list_loads() == [0.0, 0.0, 0.0]
    placer.place_again("row", rank, 1064, 1000)
    assert placer.list_loads()[rank] == 1064


def test_a_full_rank_is_passed_over_while_another_has_room() -> None:
    placer = Placer(2, max_rows=2, slack=100.0)
    prompt = make_prompt(1, 1)
    ranks = [placer.place(number, prompt, 0) for number in range(5)]
    assert ranks[0] == ranks[1] != ranks[2] == ranks[3]
    assert ranks[4] in (0, 1)


def test_what_is_remembered_is_bounded() -> None:
    placer = Placer(2, max_runs=100)
    for number in range(200):
        placer.release(placer.place(number, make_prompt(number, 0), 0) and number, 0)
    assert len(placer._runs) == 100


def test_long_prompts_are_remembered_by_few_runs() -> None:
    placer = Placer(2)
    assert len(placer._list_runs(range(64_000))) < 64 + 32
    assert placer._list_runs(range(BLOCK_TOKENS - 1)) == []


steps = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 300), st.integers(0, 500)), max_size=60)


@given(steps, st.integers(1, 5))
def test_loads_are_the_tokens_in_flight(moves: list[tuple[int, int, int]], num_ranks: int) -> None:
    """Any coming and going, against a plain count: every row gets its share of what was generated while it was there."""
    placer, total = Placer(num_ranks), 0
    rows: dict[int, tuple[int, float]] = {}
    for key, num_tokens, generated in moves:
        total += generated
        rows = {other: (rank, tokens + generated / len(rows)) for other, (rank, tokens) in rows.items()}
        if key in rows:
            placer.release(key, total)
            del rows[key]
        else:
            rank = placer.place(key, [key] * num_tokens, total)
            assert 0 <= rank < num_ranks
            rows[key] = (rank, float(num_tokens))
    wanted = [sum(tokens for rank, tokens in rows.values() if rank == each) for each in range(num_ranks)]
    assert placer.list_loads() == pytest.approx(wanted, abs=1e-6)


def test_a_key_is_in_flight_once() -> None:
    placer = Placer(2)
    placer.place("row", [1], 0)
    with pytest.raises(ValueError, match="in flight"):
        placer.place("row", [1], 0)
    placer.release("row", 0)
    placer.release("row", 0)
    assert placer.list_loads() == [0.0, 0.0]


def test_an_engine_has_a_rank() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Placer(0)
