"""The modelled engine: closed forms against single steps, capacity, lockstep, prefixes, and its published figures."""

import itertools
import math
import random

import pytest

from batchgen.simulate.calibration import PUBLISHED, make_v32_engine, repeat_run
from batchgen.simulate.engine import EngineModel, Finished, VirtualEngine, sum_of_max
from batchgen.simulate.rank import Prefixes, VirtualRequest
from batchgen.simulate.step_cost import StepCost

SPARSE = StepCost(1e-2, 1e-4, 2e-8, 3e-8, 5e-9, 1e-9, top_k=100)


def run_all(engine: VirtualEngine, requests: list[VirtualRequest]) -> list[Finished]:
    for request in requests:
        engine.submit(request)
    ended: list[Finished] = []
    while engine.num_inflight:
        ended += engine.advance(math.inf)
    return ended


def make_requests(count: int, seed: int = 0) -> list[VirtualRequest]:
    draw = random.Random(seed)
    return [VirtualRequest(n, draw.randint(1, 300), draw.randint(1, 400), 400) for n in range(count)]


# ---- costs


def test_prefill_in_parts_costs_what_it_costs_at_once() -> None:
    cuts = [0, 7, 99, 100, 101, 150, 400]
    parts = sum(SPARSE.prefill_s(start, end) for start, end in itertools.pairwise(cuts))
    assert parts == pytest.approx(SPARSE.prefill_s(0, 400))


def test_sparse_prefill_attends_to_top_k_tokens_at_most() -> None:
    only_attention = StepCost(0, prefill_context_s=1.0, top_k=100)
    one_by_one = sum(min(position + 0.5, 100) for position in range(400))
    assert only_attention.prefill_s(0, 400) == pytest.approx(one_by_one)


def test_the_sum_of_the_slowest_rank_is_that_of_every_step() -> None:
    draw = random.Random(3)
    for _ in range(100):
        lines = [(draw.random(), draw.random() / 50) for _ in range(draw.randint(1, 8))]
        count = draw.randint(1, 200)
        by_step = sum(max(base + slope * step for base, slope in lines) for step in range(count))
        assert sum_of_max(lines, count) == pytest.approx(by_step)


# ---- steps taken together against steps taken one by one


def run_step_by_step(model: EngineModel, requests: list[VirtualRequest]) -> float:
    """Seconds of pinned requests that all fit at once, by adding up every step's cost from its rows' contexts."""
    now = 0.0
    waiting = [[[0, r] for r in requests if r.rank == rank] for rank in range(model.num_ranks)]
    rows: list[list[list[int]]] = [[] for _ in waiting]
    while any(waiting) or any(rows):
        slowest = 0.0
        for prompts, decoding in zip(waiting, rows, strict=True):
            contexts = [context for context, _ in decoding]
            cost = model.cost.decode_s(len(contexts), sum(min(c, model.cost.top_k) for c in contexts), sum(contexts))
            room = max(1, model.max_num_tokens - len(decoding))
            decoding[:] = [[context + 1, left - 1] for context, left in decoding if left > 1]
            while prompts and room > 0:
                start, request = prompts[0]
                end = min(request.prompt_tokens, start + room)
                cost, room, prompts[0][0] = cost + model.cost.prefill_s(start, end), room - (end - start), end
                if end == request.prompt_tokens:
                    prompts.pop(0)
                    if request.output_tokens > 1:
                        decoding.append([end + 1, request.output_tokens - 1])
            slowest = max(slowest, cost)
        now += model.cost.fixed_s + slowest
    return now


@pytest.mark.parametrize("seed", range(5))
def test_steps_taken_together_cost_what_single_steps_cost(seed: int) -> None:
    draw = random.Random(seed)
    requests = [VirtualRequest(n, draw.randint(1, 300), draw.randint(1, 400), 400, rank=n % 3) for n in range(40)]
    model = EngineModel(SPARSE, num_ranks=3, max_num_tokens=256, max_batch_size=64, balance_steps=0)
    engine = VirtualEngine(model)
    run_all(engine, requests)
    assert engine.now == pytest.approx(run_step_by_step(model, requests))


def test_every_request_ends_once_with_all_its_tokens() -> None:
    requests = make_requests(500)
    engine = VirtualEngine(EngineModel(SPARSE, num_ranks=4, kv_tokens=5000, max_batch_size=16, max_num_tokens=256))
    ended = run_all(engine, requests)
    assert sorted(one.request.key for one in ended) == list(range(500))
    assert engine.total_tokens == sum(request.output_tokens for request in requests)
    assert all(one.submitted_at <= one.first_token_at <= one.ended_at for one in ended)
    assert all(rank.reserved == rank.num_rows == rank.num_active == rank.prompt_tokens == 0 for rank in engine.ranks)
    assert all(rank.cost_s == pytest.approx(0) for rank in engine.ranks)


def test_the_same_requests_take_the_same_time() -> None:
    model = EngineModel(SPARSE, num_ranks=4, kv_tokens=5000, max_batch_size=16, max_num_tokens=256)
    first, second = VirtualEngine(model), VirtualEngine(model)
    assert run_all(first, make_requests(100)) == run_all(second, make_requests(100))
    assert first.now == second.now


def test_time_can_be_taken_in_pieces() -> None:
    model = EngineModel(SPARSE, num_ranks=2, max_batch_size=16, max_num_tokens=256)
    whole, pieces = VirtualEngine(model), VirtualEngine(model)
    run_all(whole, make_requests(50))
    for request in make_requests(50):
        pieces.submit(request)
    until = 0.0
    while pieces.num_inflight:
        until += 0.07
        pieces.advance(until)
    assert pieces.busy_s == pytest.approx(whole.busy_s)
    assert pieces.total_tokens == whole.total_tokens


# ---- capacity


def test_reserving_max_tokens_decides_how_many_run() -> None:
    engine = VirtualEngine(EngineModel(StepCost(1e-2), num_ranks=1, kv_tokens=10_000))
    for number in range(20):
        engine.submit(VirtualRequest(number, 100, 50, 1900))
    engine.advance(0.3)
    assert engine.num_running == 5
    exact = VirtualEngine(EngineModel(StepCost(1e-2), num_ranks=1, kv_tokens=10_000, reserves_exactly=True))
    for number in range(20):
        exact.submit(VirtualRequest(number, 100, 50, 1900))
    exact.advance(0.3)
    assert exact.num_running == 20


def test_a_request_larger_than_the_cache_runs_alone_instead_of_never() -> None:
    engine = VirtualEngine(EngineModel(StepCost(1e-2), num_ranks=1, kv_tokens=100))
    assert len(run_all(engine, [VirtualRequest(n, 90, 50, 50) for n in range(3)])) == 3


def test_a_step_costs_as_much_as_its_slowest_rank() -> None:
    model = EngineModel(StepCost(0.0, token_s=1.0), num_ranks=2, balance_steps=0)
    even = VirtualEngine(model)
    run_all(even, [VirtualRequest(n, 1, 10, 10, rank=n % 2) for n in range(8)])
    odd = VirtualEngine(model)
    run_all(odd, [VirtualRequest(n, 1, 10, 10, rank=0) for n in range(8)])
    assert odd.now == pytest.approx(2 * even.now, rel=0.1)


def test_balancing_spares_steps_in_which_one_rank_prefills_alone() -> None:
    """Rows end one by one on eight ranks: without waiting for one another almost every step prefills somewhere."""

    def time_of(balance_steps: int) -> float:
        model = EngineModel(StepCost(1e-2, 1e-4), num_ranks=8, max_batch_size=8, balance_steps=balance_steps)
        draw = random.Random(5)
        engine = VirtualEngine(model)
        run_all(engine, [VirtualRequest(n, 4000, draw.randint(50, 150), 150) for n in range(800)])
        return engine.now

    assert time_of(60) < 0.7 * time_of(0)


# ---- prefixes


def test_a_prefix_is_computed_once_a_rank() -> None:
    model = EngineModel(StepCost(1e-2, 1e-4), num_ranks=2, balance_steps=0, max_num_tokens=1000)
    engine = VirtualEngine(model)
    requests = [VirtualRequest(n, 1000, 5, 5, rank=0, prefix="a", prefix_tokens=900) for n in range(4)]
    ended = run_all(engine, [*requests, VirtualRequest(9, 1000, 5, 5, rank=1, prefix="a", prefix_tokens=900)])
    cached = {one.request.key: one.cached_tokens for one in ended}
    assert cached == {0: 0, 1: 900, 2: 900, 3: 900, 9: 0}


def test_a_prefix_that_nobody_holds_goes_when_its_room_is_reserved() -> None:
    engine = VirtualEngine(EngineModel(StepCost(1e-2), num_ranks=1, kv_tokens=1200))
    run_all(engine, [VirtualRequest(0, 1000, 5, 5, prefix="a", prefix_tokens=900)])
    assert run_all(engine, [VirtualRequest(1, 1000, 5, 5, prefix="a", prefix_tokens=900)])[0].cached_tokens == 900
    run_all(engine, [VirtualRequest(2, 1000, 5, 5)])
    assert run_all(engine, [VirtualRequest(3, 1000, 5, 5, prefix="a", prefix_tokens=900)])[0].cached_tokens == 0


# ---- taken away


def test_what_the_parts_of_a_row_leave_counts_once() -> None:
    """Counted twice, it would crowd out what other rows left."""
    prefixes, parts = Prefixes(), 5
    for row in range(3):
        for part in range(parts):
            done = 100 * part
            request = VirtualRequest(row, 50 + done, 100, 100, None, row if done else None, 50 + done, leaves=row)
            prefixes.hold(request)
            assert prefixes.count_cached(request) == (49 + done if done else 0)
            prefixes.note_computed(request)
            prefixes.leave(request)
            prefixes.release(request, 3 * (50 + 100 * parts))


def test_a_cancelled_request_gives_back_what_it_held_and_says_what_it_made() -> None:
    engine = VirtualEngine(EngineModel(StepCost(1e-2), num_ranks=1, kv_tokens=2000, balance_steps=0))
    for number in range(3):
        engine.submit(VirtualRequest(number, 100, 800, 800))
    engine.advance(1.0)
    made = engine.count_tokens()
    assert engine.cancel(0) == made[0] > 1
    assert engine.cancel(2) == 0  # it waited: two fit
    assert engine.cancel("unknown") is None
    ended = []
    while engine.num_inflight:
        ended += engine.advance(math.inf)
    assert [one.request.key for one in ended] == [1]
    assert engine.ranks[0].reserved == engine.ranks[0].num_rows == 0


# ---- the published figures


# The widest is the oldest run, of mid-2025's software: 26 % over. What the model says is good for a quarter.
@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: run.name)
def test_the_model_is_within_a_quarter_of_what_was_published(run: object) -> None:
    met = repeat_run(run, share=0.25 if run.num_requests > 10_000 else 1, num_ranks=1)  # type: ignore[attr-defined]
    assert abs(met.error) < 0.30
    if run.model == "v32":  # type: ignore[attr-defined]
        assert abs(met.error) < 0.10
        assert met.ttft_s == pytest.approx(19.5, rel=0.15)
        assert met.latency_s == pytest.approx(120.3, rel=0.15)


def test_a_flat_cap_of_64k_holds_about_28_requests_a_rank() -> None:
    """The figure that token budgets are for (computed by others for the same engine: about 28)."""
    model = make_v32_engine()
    assert 26 <= model.kv_tokens // (64_000 + 2_000) <= 31
