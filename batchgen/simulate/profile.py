"""What one modelled engine does in the long run, measured once on it row by row: the rate that aggregated runs go by.

Measured on a workload's own rows with its policies: rows a second while the window is full (from a fifth to seven tenths
of the tokens), and how long the engine takes from the last row it is sent to the last it ends. Both lean on a few thousand
rows, so that two seeds differ by about a percent.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

from batchgen.simulate.record import Moment, VirtualRun
from batchgen.simulate.scenario import Scenario, run_exactly
from batchgen.spec import ClusterSpec

# Windows of rows that an engine is measured on, and bounds: so many rows show a rate, more cost time.
WINDOWS = 8
MIN_ROWS, MAX_ROWS = 500, 12_000


@dataclass(frozen=True, slots=True)
class Profile:
    """One engine with a full window. `drain_s`: from the last row sent to the last one ended. `mean_running`: requests
    in its work at a time."""

    rows_per_s: float
    tokens_per_s: float
    drain_s: float
    mean_running: float


def measure(scenario: Scenario, seed: object = "profile") -> Profile:
    window = scenario.worker.window
    num_rows = min(max(WINDOWS * window // scenario.worker.n, MIN_ROWS), MAX_ROWS)
    alone = ClusterSpec.model_validate({"workers": {"min": 1, "max": 1}})
    cluster = replace(
        scenario.cluster,
        cluster=alone,
        surroundings=replace(scenario.cluster.surroundings, startup_s=0.0, losses_per_hour=0.0),
        moment_s=scenario.cluster.beat_s,
    )
    record = run_exactly(replace(scenario.with_seed(seed), num_rows=num_rows, rows_per_shard=window, cluster=cluster))
    tokens_per_s, mean_running = find_steady(record)
    rows_per_s = tokens_per_s * num_rows / record.tokens
    sending_s = max(0, num_rows - window / scenario.worker.n) / rows_per_s
    return Profile(rows_per_s, tokens_per_s, max(0.0, record.makespan_s - sending_s), mean_running)


def find_steady(record: VirtualRun) -> tuple[float, float]:
    """(tokens/s, mean requests in work) between a fifth and seven tenths of the tokens."""
    within = [moment for moment in record.moments if 0.2 <= moment.tokens / record.tokens <= 0.7]
    if len(within) < 2:
        return record.tokens / record.makespan_s, _mean_running(record.moments)
    first, last = within[0], within[-1]
    return (last.tokens - first.tokens) / (last.at - first.at), _mean_running(within)


def _mean_running(moments: list[Moment]) -> float:
    spans = [(later.at - earlier.at, earlier.running) for earlier, later in pairwise(moments)]
    total = sum(span for span, _ in spans)
    return sum(span * running for span, running in spans) / total if total else 0.0
