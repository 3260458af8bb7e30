"""The policies' figures in virtual time, each with what it is compared with. `jobs/simulate_figures.py` prints them.

Each generator yields lines as soon as they are known. Workloads are seeded; nothing here depends on the machine but the
seconds that the simulation itself takes, which `scale` tells.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from batchgen.queue.tail import TailPolicy
from batchgen.simulate.calibration import make_v32_engine
from batchgen.simulate.engine import EngineModel
from batchgen.simulate.estimate import estimate
from batchgen.simulate.figures_moves import show_moves
from batchgen.simulate.figures_ranks import show_ranks
from batchgen.simulate.fluid import run_aggregated
from batchgen.simulate.oracle import run_oracle
from batchgen.simulate.policies import ONE_SHOT, Policies, WorkerModel
from batchgen.simulate.profile import find_steady, measure
from batchgen.simulate.record import ClusterModel, Surroundings
from batchgen.simulate.scenario import Scenario, draw_rows, run_exactly
from batchgen.simulate.step_cost import StepCost
from batchgen.simulate.workload import Lengths, Workload, make_lengths, make_lognormal
from batchgen.spec import ClusterSpec
from batchgen.worker.budget import MAX_LENGTHS, EngineCost, Ladder, choose_ladder, make_ladder

CAP = 64_000
MEAN = 4_000
# A slot engine decodes at this rate whatever its batch: 50 tokens/s, as `engine.kind: simulated`.
SLOT_STEP = StepCost(0.02)
AT_ONCE = Surroundings(startup_s=0.001, startup_spread=0.0)


def make_cluster(num_engines: int, *, has_split: bool = True) -> ClusterModel:
    workers = {"workers": {"min": num_engines, "max": num_engines}, "max_starting": num_engines}
    return ClusterModel(ClusterSpec.model_validate(workers), AT_ONCE, tail=TailPolicy() if has_split else None)


# ---- token budgets -----------------------------------------------------------------------------------------------------


def show_budgets() -> Iterator[str]:
    """One V3.2 engine, lognormal answers with mean 4,000, a cap of 64,000; tokens/s while the window is full."""
    yield "prompt  sigma  batch/rank  reuse  flat cap  8k doubling  chosen ladder  exact reservation"
    for prompt in (200, 1000):
        for sigma in (0.8, 1.2):
            flat = _steady(prompt, sigma, 128, ONE_SHOT)
            for batch, reuses in ((128, True), (384, True), (384, False)):
                ladder = _choose(prompt, sigma, batch, reuses)
                rates = [
                    _steady(prompt, sigma, batch, make_ladder(8192, CAP), reuses=reuses),
                    _steady(prompt, sigma, batch, ladder, reuses=reuses),
                    _steady(prompt, sigma, batch, ONE_SHOT, is_exact=True),
                ]
                shown = "  ".join(f"{rate:,.0f} ({rate / flat:.2f}x)" for rate in rates)
                reuse = "on" if reuses else "off"
                yield f"{prompt}  {sigma}  {batch}  {reuse}  {flat:,.0f}  {shown}  rungs {ladder.rungs[:3]}"


def _choose(prompt: int, sigma: float, batch: int, reuses: bool) -> Ladder:
    lengths = make_lognormal(MEAN, sigma, prompt).list_quantiles(MAX_LENGTHS)
    cost = EngineCost(max_rows=batch, reuse_share=0.9 if reuses else 0.0)
    return choose_ladder(lengths, num_prompt=prompt, max_tokens=CAP, cost=cost)


def _steady(
    prompt: int, sigma: float, batch: int, ladder: Ladder, *, reuses: bool = True, is_exact: bool = False
) -> float:
    engine = make_v32_engine(max_batch_size=batch, reuses_blocks=reuses, reserves_exactly=is_exact)
    worker = WorkerModel(engine, Policies(ladder=ladder, has_placement=True), window=8 * batch)
    workload = Workload(make_lognormal(MEAN, sigma, prompt), CAP, lognormal=(MEAN, sigma))
    num_rows = 12_000 if batch <= 128 else 24_000  # with fewer, many begin alike and the start is most of it
    return find_steady(run_exactly(Scenario(num_rows, 500, worker, make_cluster(1), workload)))[0]


# ---- the tail ----------------------------------------------------------------------------------------------------------


def show_tail() -> Iterator[str]:
    """16 engines; makespan over the longest-first oracle's, mean of 5 seeds. The oracle has one queue and knows all."""
    yield "engine  cap  rows/slot  FIFO oracle  no hints (split)  no hints (no split)  noisy hints  exact hints"
    for name, engine, window in (("64 slots", _slots(64), 64), ("V3.2", make_v32_engine(), 1024)):
        for cap, rows_per_slot in ((CAP, 8), (16_000, 8), (16_000, 4)):
            if name == "V3.2" and (cap, rows_per_slot) != (CAP, 8):
                continue
            num_seeds = 5 if window == 64 else 1
            columns = [_tail(engine, window, cap, rows_per_slot, seed) for seed in range(num_seeds)]
            means = [sum(column) / num_seeds for column in zip(*columns, strict=True)]
            yield f"{name}  {cap}  {rows_per_slot}  " + "  ".join(f"{mean:.3f}" for mean in means)


def _slots(count: int) -> EngineModel:
    return EngineModel(SLOT_STEP, num_ranks=1, max_batch_size=count, balance_steps=0)


def _tail(engine: EngineModel, window: int, cap: int, rows_per_slot: int, seed: int) -> list[float]:
    def make(hint_sigma: float | None, has_split: bool = True) -> Scenario:
        workload = Workload(make_lognormal(MEAN, 1.2, 1000), cap, hint_sigma, lognormal=(MEAN, 1.2), seed=str(seed))
        cluster = make_cluster(16, has_split=has_split)
        return Scenario(
            16 * window * rows_per_slot, 2 * window, WorkerModel(engine, Policies(), window), cluster, workload
        )

    rows = [row for _, rows in draw_rows(make(0.0)) for row in rows]
    first, fifo = (
        run_oracle(rows, engine, num_engines=16, window=window, max_tokens=cap, is_longest_first=is_longest_first)
        for is_longest_first in (True, False)
    )
    runs = [make(None), make(None, has_split=False), make(0.7), make(0.0)]
    return [fifo / first, *(run_exactly(run).makespan_s / first for run in runs)]


# ---- several workers ---------------------------------------------------------------------------------------------------


def show_workers() -> Iterator[str]:
    """Makespan over the longest-first oracle's, 64 slots a worker, sigma 0.8, 47 rows a slot, mean of 5 seeds."""
    yield "workers  FIFO oracle  no hints  useless hints  exact hints"
    for count in (1, 2, 4, 8, 16):
        columns = [_several(count, seed) for seed in range(5)]
        yield f"{count}  " + "  ".join(f"{sum(column) / 5:.3f}" for column in zip(*columns, strict=True))


def _several(count: int, seed: int) -> list[float]:
    engine = _slots(64)

    def make(hint_sigma: float | None) -> Scenario:
        workload = Workload(make_lognormal(500, 0.8, 100), CAP, hint_sigma, lognormal=(500, 0.8), seed=str(seed))
        worker = WorkerModel(engine, Policies(), 64, commit_s=0.0)
        return Scenario(count * 64 * 47, 64 * 12, worker, replace(make_cluster(count), beat_s=0.5), workload)

    rows = [row for _, rows in draw_rows(make(0.0)) for row in rows]
    first, fifo = (
        run_oracle(rows, engine, num_engines=count, window=64, max_tokens=CAP, is_longest_first=is_first)
        for is_first in (True, False)
    )
    return [fifo / first, *(run_exactly(make(sigma)).makespan_s / first for sigma in (None, 10.0, 0.0))]


# ---- scale -------------------------------------------------------------------------------------------------------------


def show_scale() -> Iterator[str]:
    """The driver's decisions at full size: 1,000 workers, 200,000 shards, 10^9 rows, on one core of this machine."""
    workload = Workload(make_lognormal(2000, 1.0, 500), 16_000)
    cluster = replace(make_cluster(1000), beat_s=60.0, moment_s=60.0, tail=None)
    worker = WorkerModel(make_v32_engine(), Policies(), window=1024)
    scenario = Scenario(10**9, 5_000, worker, cluster, workload)
    started = time.perf_counter()
    profile = measure(scenario)
    measured = time.perf_counter()
    record = run_aggregated(scenario, profile)
    ended = time.perf_counter()
    yield f"profile of one engine: {measured - started:.0f} s; the run: {ended - measured:.0f} s"
    yield f"{record.num_rows:,} rows in {record.num_shards:,} shards: {record.makespan_s / 3600:.1f} h virtual"


# ---- does the interval hold? -------------------------------------------------------------------------------------------


def show_coverage(num_jobs: int = 100, num_pilot: int = 200, num_runs: int = 19) -> Iterator[str]:
    """Of so many jobs: how often the time that a job really takes lies in the interval stated from a pilot's lengths."""
    truth = Workload(make_lognormal(300, 1.0, 100), 4_000, lognormal=(300, 1.0))
    worker = WorkerModel(EngineModel(SLOT_STEP, 1, max_batch_size=16, balance_steps=0), Policies(), window=16)
    cluster = replace(make_cluster(2), surroundings=Surroundings(30.0, 0.2, losses_per_hour=1.0), beat_s=5.0)
    scenario = Scenario(400, 40, worker, cluster, truth)
    held = 0
    for job in range(num_jobs):
        pilot = _see(truth.with_seed(f"pilot {job}"), num_pilot)
        known = replace(scenario, workload=Workload(pilot, truth.max_tokens))
        low, _, high = estimate(known, num_runs=num_runs, seed=job, is_exact=True).makespan_s
        real = run_exactly(scenario.with_seed(f"job {job}")).makespan_s
        held += low <= real <= high
        if (job + 1) % 20 == 0:
            yield f"{held} of {job + 1} jobs took a time within their 90 % interval"


def _see(workload: Workload, count: int) -> Lengths:
    pairs: dict[tuple[int, int], int] = {}
    for row in workload.draw("pilot", 0, count):
        pair = row.prompt_tokens, row.output_tokens
        pairs[pair] = pairs.get(pair, 0) + 1
    return make_lengths(pairs)


FIGURES: dict[str, Callable[[], Iterator[str]]] = {
    "budgets": show_budgets,
    "tail": show_tail,
    "moves": show_moves,
    "workers": show_workers,
    "ranks": show_ranks,
    "scale": show_scale,
    "coverage": show_coverage,
}
