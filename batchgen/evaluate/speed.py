"""How fast a job went, from its batch_stats: completion tokens over the time in which any batch ran, and latencies."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from batchgen.batches import BatchStats


def measure_busy_s(batches: Iterable[BatchStats]) -> float:
    """Seconds in which at least one batch was under way; pauses between two runs of a job don't count."""
    spans = sorted(
        (batch.started_at, batch.started_at + batch.wall_s)
        for batch in batches
        if batch.started_at is not None and batch.wall_s is not None
    )
    busy_s, until = 0.0, float("-inf")
    for start, end in spans:
        busy_s += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy_s


def make_speed(batches: Sequence[BatchStats], latencies: Sequence[float]) -> dict[str, Any]:
    """`tokens_per_s_per_gpu` is None where no GPU was reserved. `latencies`: of each sample, from sending to its end."""
    busy_s = measure_busy_s(batches)
    tokens = sum(batch.completion_tokens or 0 for batch in batches)
    rate = tokens / busy_s if busy_s > 0 else None
    gpus = {(batch.epoch, batch.worker): batch.num_gpus or 0.0 for batch in batches if batch.worker}
    by_epoch: dict[int, float] = {}
    for (epoch, _), num_gpus in gpus.items():
        by_epoch[epoch] = by_epoch.get(epoch, 0.0) + num_gpus
    most = max(by_epoch.values(), default=0.0)
    quantiles = np.quantile(latencies, [0.5, 0.9, 0.99]) if latencies else [None, None, None]
    shown = [None if value is None else float(value) for value in quantiles]
    return {
        "busy_s": busy_s,
        "tokens_per_s": rate,
        "tokens_per_s_per_gpu": rate / most if rate is not None and most else None,
        **dict(zip(("latency_p50_s", "latency_p90_s", "latency_p99_s"), shown, strict=True)),
    }
