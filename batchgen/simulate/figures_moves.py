"""What moving rows that an engine has begun does to the end of a run, by when the engines come up."""

from collections.abc import Iterator
from dataclasses import replace

from batchgen.queue.tail import TailPolicy
from batchgen.simulate.calibration import make_v32_engine
from batchgen.simulate.policies import Policies, WorkerModel
from batchgen.simulate.record import ClusterModel, Surroundings
from batchgen.simulate.scenario import Scenario, run_exactly
from batchgen.simulate.workload import Workload, make_lognormal
from batchgen.spec import ClusterSpec
from batchgen.worker.budget import make_ladder

NUM_ENGINES, WINDOW, CAP, MEAN = 4, 1024, 64_000, 4_000
BUDGETS = make_ladder(8192, CAP)
TOGETHER = Surroundings(startup_s=0.001, startup_spread=0.0)
STAGGERED = Surroundings(startup_s=600.0, startup_spread=0.2)


def show_moves(num_seeds: int = 5) -> Iterator[str]:
    """4 V3.2 engines, sigma 1.2, mean 4,000, cap 64,000, budgets from 8k: with begun rows moved over without."""
    yield "come up  rows/slot  makespan (worst seed)  GPU-hours  shares"
    for surroundings in (TOGETHER, STAGGERED):
        for rows_per_slot in (0.5, 1.0, 2.0):
            found = [_compare(surroundings, rows_per_slot, seed) for seed in range(num_seeds)]
            spans, hours, shares = zip(*found, strict=True)
            when = "together" if surroundings is TOGETHER else "over 4 minutes"
            means = [sum(column) / num_seeds for column in (spans, hours, shares)]
            yield f"{when}  {rows_per_slot:g}  {means[0]:.3f} ({max(spans):.3f})  {means[1]:.3f}  {means[2]:.0f}"


def _compare(surroundings: Surroundings, rows_per_slot: float, seed: int) -> tuple[float, float, int]:
    workers = {"workers": {"min": NUM_ENGINES, "max": NUM_ENGINES}, "max_starting": NUM_ENGINES}
    cluster = ClusterModel(ClusterSpec.model_validate(workers), surroundings, tail=TailPolicy())
    workload = Workload(make_lognormal(MEAN, 1.2, 1000), CAP, lognormal=(MEAN, 1.2), seed=str(seed))
    stay = WorkerModel(make_v32_engine(), Policies(ladder=BUDGETS, can_move=False), WINDOW)
    move = replace(stay, policies=Policies(ladder=BUDGETS))
    num_rows = int(NUM_ENGINES * WINDOW * rows_per_slot)
    before, after = (run_exactly(Scenario(num_rows, 128, each, cluster, workload)) for each in (stay, move))
    return after.makespan_s / before.makespan_s, after.gpu_s / before.gpu_s, after.num_shares
