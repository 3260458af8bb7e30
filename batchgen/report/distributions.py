"""Histograms from what batches left: latencies from sketches, lengths from counts by octave. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.lengths import STEPS_PER_OCTAVE, LengthCounts, merge_lengths
from batchgen.stats import LATENCIES, QUANTILES, SKETCH_FIELDS, bucket_bounds_s, merge_sketch_lists, read_quantile

MAX_BARS = 36

Bar = tuple[float, float, int]


def make_latency(table: pa.Table) -> dict[str, float | None]:
    """{latency_p99_s: ...} over all rows of the batches; a maximum is a bucket's middle too."""
    latency: dict[str, float | None] = {}
    for name, merged in merge_latencies(table).items():
        latency |= {f"{name}_{key}_s": read_quantile(merged, q) for key, q in QUANTILES.items()}
    return latency


def merge_latencies(table: pa.Table) -> dict[str, Counter[int]]:
    return {name: merge_sketch_lists(table[SKETCH_FIELDS[name]]) for name in LATENCIES}


def make_histograms(table: pa.Table) -> dict[str, list[Bar]]:
    """Bars of (from, to, rows): seconds for latencies, tokens for lengths. [] where nothing is known."""
    latencies = {name: make_bars(merged, bucket_bounds_s) for name, merged in merge_latencies(table).items()}
    counts = merge_lengths(iter_texts(table["lengths"]))
    return latencies | make_length_bars(counts)


def iter_texts(column: pa.ChunkedArray) -> Iterable[str]:
    """Equal ones once, as often as they are: batches of one row are alike."""
    for chunk in column.chunks:
        yield from pc.drop_null(chunk).to_pylist()


def make_length_bars(counts: LengthCounts) -> dict[str, list[Bar]]:
    prompts: Counter[int] = Counter()
    completions: Counter[int] = Counter()
    for (prompt, completion), rows in counts.items():
        completions[completion] += rows
        if prompt is not None:
            prompts[prompt] += rows
    return {
        "prompt_tokens": make_bars(prompts, lambda bucket: (2.0 ** (bucket - 1), 2.0**bucket)),
        "completion_tokens": make_bars(
            completions, lambda bucket: (2 ** ((bucket - 1) / STEPS_PER_OCTAVE), 2 ** (bucket / STEPS_PER_OCTAVE))
        ),
    }


def make_bars(counts: Mapping[int, int], bounds: Any) -> list[Bar]:
    """Neighbouring buckets together until there are few enough bars; empty ones between are kept."""
    if not counts:
        return []
    first, last = min(counts), max(counts)
    step = -(-(last - first + 1) // MAX_BARS)
    bars = []
    for start in range(first, last + 1, step):
        rows = sum(counts.get(bucket, 0) for bucket in range(start, start + step))
        bars.append((float(bounds(start)[0]), float(bounds(start + step - 1)[1]), rows))
    return bars
