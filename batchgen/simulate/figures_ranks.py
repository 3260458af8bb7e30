"""What rank placement does for shared prefixes: cached tokens and balance, on one modelled engine, row by row."""

import random
from collections.abc import Iterator, Sequence

from batchgen.records import Lease
from batchgen.simulate.calibration import make_v32_engine
from batchgen.simulate.open_rows import VirtualStore
from batchgen.simulate.policies import Policies, WorkerModel
from batchgen.simulate.scenario import cut_shards
from batchgen.simulate.worker import VirtualWorker
from batchgen.simulate.workload import Workload, make_lognormal
from batchgen.worker.placement import Placer

NUM_ROWS = 12_000
# All slots, and an eighth more (as jobs/deepseek_v32_throughput.yaml has it).
WINDOWS = (1024, 1152)
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
    """Prompts of 256 shared and 256 own tokens, answers lognormal (mean 500, sigma 1), 8 ranks of 128 rows."""
    yield "window  prefixes  router  of the one-cache ideal  imbalance (max / mean of tokens in flight)  tokens/s"
    for window in WINDOWS:
        for num_prefixes in (8, 64, 512, 4096):
            routers = (
                ("placement", Placer(8, max_rows=128)),
                ("random", RandomPlacer(8, 1)),
                ("the engine's own", None),
            )
            for name, placer in routers:
                share, imbalance, rate = route(num_prefixes, window, placer)
                yield f"{window}  {num_prefixes}  {name}  {share:.3f}  {imbalance:.3f}  {rate:,.0f}"


def route(
    num_prefixes: int, window: int, placer: Placer | None, num_rows: int = NUM_ROWS
) -> tuple[float, float, float]:
    """(cached prefix tokens over those that one cache for all ranks would have had, imbalance, tokens/s)."""
    model = WorkerModel(make_v32_engine(), Policies(), window)
    lengths = make_lognormal(500, 1.0, PREFIX + SUFFIX)
    workload = Workload(lengths, 4_000, None, num_prefixes, PREFIX, lognormal=(500, 1.0))
    worker = VirtualWorker("worker", model, workload, VirtualStore(), 0.0, placer)
    (shard,) = cut_shards(num_rows, num_rows)
    worker.assign(Lease(shard, 1, 1, "worker"))
    now, ratios = 0.0, []
    while worker.open:
        now += LOOK_S
        worker.advance(now)
        loads = [rank.num_context for rank in worker.engine.ranks]
        done = num_rows - sum(opened.num_left for opened in worker.open.values())
        if 0.1 < done / num_rows < 0.9:
            ratios.append(len(loads) * max(loads) / sum(loads))
    used = len({row.prefix for row in workload.draw(shard.number, 0, num_rows)})
    ideal = (num_rows - used) * PREFIX
    return (
        worker.engine.cached_tokens / ideal,
        sum(ratios) / len(ratios),
        worker.engine.total_tokens / worker.engine.now,
    )
