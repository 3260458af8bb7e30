"""What rank placement does for shared prefixes: cached tokens and balance, on one modelled engine, row by row."""

import random
from collections.abc import Iterator, Sequence

from batchgen.placement import Placer
from batchgen.records import Lease
from batchgen.simulate.calibration import make_v32_engine
from batchgen.simulate.open_rows import VirtualStore
from batchgen.simulate.policies import Policies, WorkerModel
from batchgen.simulate.scenario import cut_shards
from batchgen.simulate.worker import VirtualWorker
from batchgen.simulate.workload import Workload, make_lognormal

NUM_ROWS = 30_000
PREFIX, SUFFIX = 256, 256
# Ranks are looked at this often (s); while the window is full, which the first and last tenth of the rows are not.
LOOK_S = 1.0


class RandomPlacer(Placer):
    """Any rank, whatever it has or does."""

    def __init__(self, num_ranks: int, seed: int) -> None:
        super().__init__(num_ranks)
        self._draw = random.Random(seed)

    def _choose(self, matched: Sequence[int], num_tokens: int) -> int:  # noqa: ARG002 - that is the point
        return self._draw.randrange(self.num_ranks)


def show_ranks() -> Iterator[str]:
    """Prompts of 256 shared and 256 own tokens, answers lognormal (mean 500, sigma 1), 30,000 rows, 8 ranks."""
    yield "prefixes  router  of the one-cache ideal  imbalance (max / mean of tokens in flight)  tokens/s"
    for num_prefixes in (8, 64, 512, 4096):
        routers = (("placement", True, None), ("random", False, RandomPlacer(8, 1)), ("the engine's own", False, None))
        for name, has_placement, placer in routers:
            share, imbalance, rate = _route(num_prefixes, has_placement, placer)
            yield f"{num_prefixes}  {name}  {share:.3f}  {imbalance:.3f}  {rate:,.0f}"


def _route(num_prefixes: int, has_placement: bool, placer: Placer | None) -> tuple[float, float, float]:
    model = WorkerModel(make_v32_engine(), Policies(has_placement=has_placement), window=1024)
    lengths = make_lognormal(500, 1.0, PREFIX + SUFFIX)
    workload = Workload(lengths, 4_000, None, num_prefixes, PREFIX, lognormal=(500, 1.0))
    worker = VirtualWorker("worker", model, workload, VirtualStore(), 0.0, placer)
    (shard,) = cut_shards(NUM_ROWS, NUM_ROWS)
    worker.assign(Lease(shard, 1, 1, "worker"))
    now, ratios = 0.0, []
    while worker.open:
        now += LOOK_S
        worker.advance(now)
        loads = [rank.num_context for rank in worker.engine.ranks]
        done = NUM_ROWS - sum(opened.num_left for opened in worker.open.values())
        if 0.1 < done / NUM_ROWS < 0.9:
            ratios.append(len(loads) * max(loads) / sum(loads))
    used = len({row.prefix for row in workload.draw(shard.number, 0, NUM_ROWS)})
    ideal = (NUM_ROWS - used) * PREFIX
    return (
        worker.engine.cached_tokens / ideal,
        sum(ratios) / len(ratios),
        worker.engine.total_tokens / worker.engine.now,
    )
