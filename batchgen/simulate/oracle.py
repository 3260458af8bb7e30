"""What no real system can be faster than, to compare with: one queue over all engines, with every length known.

Engines are the same models; whichever has room takes the next row at once, first come first served or longest first. No
leases, no shards, no start-up and no store. Not a lower bound where an engine's step costs depend on its batch, but the
best list scheduling there is.
"""

import heapq
import math
from collections.abc import Iterable, Sequence

from batchgen.simulate.engine import EngineModel, VirtualEngine
from batchgen.simulate.rank import VirtualRequest
from batchgen.simulate.workload import VirtualRow


def run_oracle(
    rows: Iterable[VirtualRow],
    model: EngineModel,
    *,
    num_engines: int,
    window: int,
    max_tokens: int,
    is_longest_first: bool,
) -> float:
    """Seconds from the first request to the end of the last."""
    queue: Sequence[VirtualRow] = sorted(rows, key=lambda row: -row.output_tokens) if is_longest_first else list(rows)
    engines = [VirtualEngine(model) for _ in range(num_engines)]
    turns = [(0.0, number) for number in range(num_engines)]
    sent, end = 0, 0.0
    # Rows are dealt round when all begin at once: the longest ones would all meet in one engine else.
    while sent < min(len(queue), num_engines * window):
        _submit(engines[sent % num_engines], queue[sent], max_tokens)
        sent += 1
    while turns:
        _, number = heapq.heappop(turns)
        engine = engines[number]
        while sent < len(queue) and engine.num_inflight < window:
            _submit(engine, queue[sent], max_tokens)
            sent += 1
        if engine.num_inflight:
            engine.advance(math.inf)
            end = max(end, engine.now)
            heapq.heappush(turns, (engine.now, number))
    return end


def _submit(engine: VirtualEngine, row: VirtualRow, max_tokens: int) -> None:
    engine.submit(VirtualRequest(row.number, row.prompt_tokens, row.output_tokens, max_tokens, prefix=row.prefix))
