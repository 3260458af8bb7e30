"""Token budgets: which rows may be continued, what is asked for, and which ladder is chosen. Pure."""

import math
import random
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.records import Guided, SamplingParams
from batchgen.simulate.calibration import make_v32_engine
from batchgen.simulate.policies import Policies, WorkerModel
from batchgen.simulate.profile import find_steady
from batchgen.simulate.record import ClusterModel, Surroundings
from batchgen.simulate.scenario import Scenario, run_exactly
from batchgen.simulate.workload import Workload, make_lognormal
from batchgen.spec import ClusterSpec
from batchgen.worker.budget import (
    ALWAYS_RESUMABLE,
    FIRST_TOKENS,
    EngineCost,
    Ladder,
    choose_budget,
    choose_ladder,
    count_first,
    estimate,
    list_unresumable,
    make_ladder,
)


def draw_lengths(mean: float, sigma: float, num: int = 400) -> list[float]:
    rng = random.Random(1)
    mu = math.log(mean) - sigma * sigma / 2
    return sorted(max(1.0, rng.lognormvariate(mu, sigma)) for _ in range(num))


# ---- which rows


@pytest.mark.parametrize(
    ("fields_set", "why"),
    [
        ({}, []),
        ({"temperature": 0.0, "stop": ("x",), "stop_token_ids": (3,), "top_k": 5, "min_p": 0.1, "logprobs": 2}, []),
        ({"seed": 1}, ["seed"]),
        ({"guided": Guided(regex="a+"), "seed": 0}, ["guided", "seed"]),
        ({"presence_penalty": 0.5, "frequency_penalty": 0.0}, ["presence_penalty"]),
        ({"repetition_penalty": 1.0}, []),
        ({"repetition_penalty": 1.1}, ["repetition_penalty"]),
    ],
)
def test_what_keeps_a_row_in_one_piece(fields_set: dict[str, object], why: list[str]) -> None:
    assert list_unresumable(SamplingParams(**fields_set)) == why


def test_an_engine_may_allow_more() -> None:
    sampling = SamplingParams(seed=1, repetition_penalty=1.2)
    assert list_unresumable(sampling, frozenset({"repetition_penalty"})) == ["seed"]


def test_a_new_sampling_field_keeps_rows_whole_until_it_was_thought_about() -> None:
    known = ALWAYS_RESUMABLE | {"seed", "guided", "presence_penalty", "frequency_penalty", "repetition_penalty"}
    assert {each.name for each in fields(SamplingParams)} == known, "does the new one mean the same over a seam?"


# ---- how much

rungs = st.sets(st.integers(1, 3000), max_size=6).map(lambda each: Ladder(tuple(sorted(each))))


@given(rungs, st.integers(1, 500), st.integers(1, 4000), st.none() | st.integers(1, 4000), st.integers(1, 4000))
def test_parts_sum_up_to_max_tokens_and_each_can_be_continued(
    ladder: Ladder, num_prompt: int, max_tokens: int, max_prompt_tokens: int | None, expected: int
) -> None:
    num_done = num_parts = 0
    while num_done < max_tokens:
        if num_done:
            assert max_prompt_tokens is None or num_prompt + num_done <= max_prompt_tokens
        part = choose_budget(
            ladder,
            num_prompt=num_prompt,
            num_done=num_done,
            max_tokens=max_tokens,
            max_prompt_tokens=max_prompt_tokens,
            expected=float(expected),
        )
        assert part >= 1
        num_done += part
        num_parts += 1
    assert num_done == max_tokens
    assert num_parts <= len(ladder.rungs) + 1


def ask(ladder: Ladder, num_done: int, **more: float) -> int:
    known = {"num_prompt": 100, "max_tokens": 64_000, "max_prompt_tokens": None, **more}
    return choose_budget(ladder, num_done=num_done, **known)  # type: ignore[arg-type]


def test_a_part_goes_to_the_next_rung() -> None:
    ladder = Ladder((8192, 16_384, 32_768))
    assert [ask(ladder, done) for done in (0, 8192, 16_384, 32_768)] == [8192, 8192, 16_384, 31_232]
    assert ask(ladder, 8000) == 192  # cut off by something else
    assert ask(Ladder(), 0) == 64_000
    assert ask(ladder, 0, max_tokens=500) == 500


def test_a_row_that_could_not_be_continued_is_asked_for_whole() -> None:
    ladder = Ladder((4096, 8192, 16_384))
    assert ask(ladder, 0, max_prompt_tokens=4196) == 4096
    assert ask(ladder, 0, max_prompt_tokens=4195) == 64_000
    assert ask(ladder, 4096, max_prompt_tokens=8192) == 64_000 - 4096


@pytest.mark.parametrize(("wanted", "first"), [("off", 64_000), ("auto", 8192), (500, 500), (10**6, 64_000)])
def test_what_a_request_reserves_at_first(wanted: str | int, first: int) -> None:
    assert count_first(wanted, 64_000) == first


def test_a_hint_skips_seams_below_it() -> None:
    ladder = Ladder((4096, 8192, 16_384))
    assert ask(ladder, 0, expected=5000.0) == 8192
    assert ask(ladder, 0, expected=20_000.0) == 64_000
    assert ask(ladder, 8192, expected=5000.0) == 8192


@given(st.integers(1, 70_000), st.integers(1, 70_000), st.sampled_from([1.0, 1.1, 1.5, 2.0]))
def test_ladders_rise_and_stay_below_max_tokens(first: int, max_tokens: int, growth: float) -> None:
    ladder = make_ladder(first, max_tokens, growth)
    assert all(rung < max_tokens for rung in ladder.rungs)
    assert len(ladder.rungs) < 32


@pytest.mark.parametrize("bad", [(0, 5), (5, 5), (7, 3)])
def test_a_ladder_must_rise(bad: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rise"):
        Ladder(bad)


# ---- which ladder


def test_without_a_prior_the_first_part_is_the_documented_one() -> None:
    assert choose_ladder((), num_prompt=1000, max_tokens=64_000).rungs[:2] == (FIRST_TOKENS, 2 * FIRST_TOKENS)
    assert choose_ladder((), num_prompt=1000, max_tokens=4000) == Ladder()


def test_long_caps_over_short_answers_are_cut() -> None:
    lengths = draw_lengths(4000, 1.0)
    cost = EngineCost(max_rows=384, reuse_share=0.9)
    ladder = choose_ladder(lengths, num_prompt=1000, max_tokens=64_000, cost=cost)
    flat = estimate(Ladder(), lengths, num_prompt=1000, max_tokens=64_000, cost=cost)
    cut = estimate(ladder, lengths, num_prompt=1000, max_tokens=64_000, cost=cost)
    assert flat.mean_rows < 31  # 1.96 million tokens of cache over 65,000
    assert flat.row_s > 2 * cut.row_s
    assert ladder.rungs[0] < 16_384


@pytest.mark.parametrize(
    ("lengths", "cost"),
    [
        (draw_lengths(4000, 1.0), EngineCost(kv_tokens=100_000_000)),  # room for all: a seam buys nothing
        ([63_999.0] * 10, EngineCost()),  # every answer needs it all
    ],
)
def test_where_continuing_does_not_help_rows_go_in_one_shot(lengths: list[float], cost: EngineCost) -> None:
    ladder = choose_ladder(lengths, num_prompt=1000, max_tokens=64_000, cost=cost)
    if cost.kv_tokens > 10**7:
        assert ladder == Ladder()
    else:  # growing in steps still holds less than the end from the start
        flat = estimate(Ladder(), lengths, num_prompt=1000, max_tokens=64_000, cost=cost)
        assert estimate(ladder, lengths, num_prompt=1000, max_tokens=64_000, cost=cost).row_s <= flat.row_s


def test_block_reuse_makes_seams_cheaper_and_ladders_finer() -> None:
    lengths = draw_lengths(4000, 1.2)

    def choose(reuse_share: float) -> tuple[Ladder, float]:
        cost = EngineCost(reuse_share=reuse_share)
        ladder = choose_ladder(lengths, num_prompt=2000, max_tokens=64_000, cost=cost)
        return ladder, estimate(ladder, lengths, num_prompt=2000, max_tokens=64_000, cost=cost).row_s

    (without, slow), (with_reuse, fast) = choose(0.0), choose(1.0)
    assert fast < slow
    assert len(with_reuse.rungs) >= len(without.rungs)


def test_an_estimate_by_hand() -> None:
    """Two rows, of 100 and 300 tokens, prompt 50; parts of 200. One row in the cache at a time."""
    cost = EngineCost(kv_tokens=1, max_rows=9, step_s=1.0, step_row_s=0.0, step_kv_s=0.0, prefill_token_s=0.01)
    found = estimate(Ladder((200,)), [100.0, 300.0], num_prompt=50, max_tokens=400, cost=cost)
    assert found.num_parts == 1.5
    assert found.prefilled_again == (50 + 200) / 2
    assert found.held_tokens == (300 * 250 + 100 * 450) / 400
    assert found.row_s == pytest.approx(200 * 1.0 + (50 + 125) * 0.01)


@given(st.lists(st.floats(1, 70_000), min_size=1, max_size=8).map(sorted), st.integers(1, 70_000), st.integers(0, 4000))
def test_any_lengths_have_a_ladder(lengths: list[float], max_tokens: int, num_prompt: int) -> None:
    ladder = choose_ladder(lengths, num_prompt=num_prompt, max_tokens=max_tokens)
    assert all(rung < max_tokens for rung in ladder.rungs)


def test_rows_that_wait_lose_what_they_left_in_a_cache_that_others_fill() -> None:
    """With room for all there is none to wait for; with few rows at a time, many small parts go by meanwhile."""
    lengths = draw_lengths(4000, 1.2)

    def find_reuse(first: int, **changes: int) -> float:
        cost = replace(EngineCost(max_rows=384, reuse_share=0.9), **changes)
        ladder = make_ladder(first, 64_000, 1.0)
        return estimate(ladder, lengths, num_prompt=1000, max_tokens=64_000, cost=cost).reuse_share

    assert find_reuse(1024, kv_tokens=10**8) == find_reuse(1024, max_rows=64) == 0.9
    assert find_reuse(1024) < find_reuse(8192) < 0.9


def test_the_default_costs_are_the_simulators() -> None:
    cost, engine = EngineCost(), make_v32_engine()
    step = engine.cost
    assert cost.kv_tokens == pytest.approx(engine.kv_tokens, rel=0.01)
    assert cost.step_s == step.fixed_s
    assert cost.step_row_s == pytest.approx(step.token_s + step.context_s * step.top_k, rel=0.01)
    assert cost.step_kv_s == pytest.approx(step.index_s, rel=0.01)


def test_the_ladder_that_is_chosen_is_better_in_the_simulator_than_8k_doubling() -> None:
    prompt, sigma = 200, 0.8
    lengths = make_lognormal(4000, sigma, prompt)
    cost = EngineCost(max_rows=384, reuse_share=0.9)
    chosen = choose_ladder(lengths.list_quantiles(256), num_prompt=prompt, max_tokens=64_000, cost=cost)

    def measure_rate(ladder: Ladder) -> float:
        worker = WorkerModel(make_v32_engine(max_batch_size=384), Policies(ladder=ladder, has_placement=True), 8 * 384)
        cluster = ClusterModel(ClusterSpec(), Surroundings(0.001, 0.0))
        workload = Workload(lengths, 64_000, lognormal=(4000, sigma))
        return find_steady(run_exactly(Scenario(8_000, 500, worker, cluster, workload)))[0]

    assert measure_rate(chosen) > 1.05 * measure_rate(make_ladder(8192, 64_000))


def test_a_ladder_of_many_parts_must_be_worth_them() -> None:
    """Of ladders that differ by less than the model can tell; small parts were 10 % worse here in the simulator."""
    lengths = make_lognormal(4000, 1.2, 1000).list_quantiles(256)
    cost = EngineCost(max_rows=384, reuse_share=0.9)
    assert choose_ladder(lengths, num_prompt=1000, max_tokens=64_000, cost=cost).rungs[0] >= 8192
