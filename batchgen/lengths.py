"""Expected completion tokens: of a row, of a shard, and as a run has measured them. Pure: Arrow and numbers in, values out.

Best first: the row's hint (`input.length_hint`), what an earlier run measured for prompts of that length
(`input.length_prior`), else nothing is expected (None) and the prompt's length stands in where something must be ordered.
An expectation decides order, split and scale, never what a row becomes; a wrong one costs time at the tail and no more.

Measured lengths are counts of rows by (prompt bucket, completion bucket): prompts by octave, completions by quarter
octave, so that those of any batches add up. As text, 'prompt.completion:rows' pairs, they ride in a batch's stats.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.records import Shard

STEPS_PER_OCTAVE = 4
# A prompt bucket with fewer rows than this leans on the mean of all of them.
MIN_ROWS = 16
# Rough size of a token in a prompt column; it decides an order, nothing else.
BYTES_PER_TOKEN = 4.5

# Rows by (prompt bucket, completion bucket); the prompt bucket is None where nobody counted prompt tokens.
LengthCounts = Counter[tuple[int | None, int]]


# ---- what a run measured ---------------------------------------------------------------------------------------------


def choose_prompt_bucket(prompt_tokens: float | None) -> int | None:
    return None if prompt_tokens is None else int(prompt_tokens).bit_length()


def bucket_middle(bucket: int) -> float:
    """Completion tokens in the middle (by ratio) of a bucket, which ends at 2 ** (bucket / STEPS_PER_OCTAVE)."""
    return float(2.0 ** ((bucket - 0.5) / STEPS_PER_OCTAVE)) if bucket > 0 else 1.0


def make_lengths(rows: pa.Table) -> str:
    """Lengths of the generations among result rows; '' where none is known."""
    known = rows.filter(pc.is_valid(rows["completion_tokens"]))
    tokens = pc.cast(pc.max_element_wise(known["completion_tokens"], 1), pa.float64())
    lengths = pc.cast(pc.ceil(pc.multiply(pc.log2(tokens), STEPS_PER_OCTAVE)), pa.int64())
    prompts = pc.cast(pc.ceil(pc.log2(pc.cast(pc.add(known["prompt_tokens"], 1), pa.float64()))), pa.int64())
    counts = (
        pa.table({"prompt": prompts, "length": lengths}).group_by(["prompt", "length"]).aggregate([([], "count_all")])
    )
    return format_lengths(Counter({(row["prompt"], row["length"]): row["count_all"] for row in counts.to_pylist()}))


def format_lengths(counts: LengthCounts) -> str:
    ordered = sorted(counts.items(), key=lambda item: (item[0][0] is not None, item[0][0] or 0, item[0][1]))
    return " ".join(f"{'' if prompt is None else prompt}.{length}:{rows}" for (prompt, length), rows in ordered)


def merge_lengths(texts: Iterable[str | None]) -> LengthCounts:
    """The sum of many. Raises ValueError for what is none."""
    merged: LengthCounts = Counter()
    for text in texts:
        for pair in (text or "").split():
            key, _, rows = pair.partition(":")
            prompt, _, length = key.partition(".")
            merged[int(prompt) if prompt else None, int(length)] += int(rows)
    return merged


@dataclass(frozen=True, slots=True)
class LengthPrior:
    """What an earlier run measured. `mean_tokens` is over all its rows."""

    counts: Mapping[tuple[int | None, int], int]
    mean_tokens: float
    _means: Mapping[int | None, float] = field(repr=False)

    def expect(self, prompt_tokens: float | None) -> float:
        """Mean completion tokens of prompts of about this length; of all where there were none."""
        return self._means.get(choose_prompt_bucket(prompt_tokens), self.mean_tokens)


def make_prior(counts: LengthCounts) -> LengthPrior | None:
    """None where nothing was measured."""
    rows: Counter[int | None] = Counter()
    tokens: dict[int | None, float] = {}
    for (prompt, length), number in counts.items():
        rows[prompt] += number
        tokens[prompt] = tokens.get(prompt, 0.0) + number * bucket_middle(length)
    if not rows.total():
        return None
    mean = sum(tokens.values()) / rows.total()
    means = {prompt: _lean(tokens[prompt], number, mean) for prompt, number in rows.items()}
    return LengthPrior(dict(counts), mean, means)


def list_quantiles(prior: LengthPrior, num: int) -> list[float]:
    """The measured completion lengths, all prompts together, as `num` of equal weight, sorted."""
    lengths: Counter[int] = Counter()
    for (_, length), rows in prior.counts.items():
        lengths[length] += rows
    ordered = sorted(lengths.items())
    ends = list(accumulate(rows for _, rows in ordered))
    places = ((2 * each + 1) * ends[-1] / (2 * num) for each in range(num))
    return [bucket_middle(ordered[bisect_left(ends, place)][0]) for place in places]


def _lean(tokens: float, num_rows: int, mean: float) -> float:
    missing = max(0, MIN_ROWS - num_rows)
    return (tokens + missing * mean) / (num_rows + missing)


# ---- what is expected ------------------------------------------------------------------------------------------------


def is_hint(value: object) -> bool:
    """A finite number, not below 0: anything else says nothing."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def expect_tokens(
    hint: object, *, prompt_tokens: int | None, max_tokens: int, prior: LengthPrior | None
) -> float | None:
    """Expected completion tokens of one request. None: nothing is known."""
    if isinstance(hint, int | float) and is_hint(hint):
        return float(min(max(1.0, hint), max_tokens))
    return None if prior is None else min(prior.expect(prompt_tokens), float(max_tokens))


@dataclass(frozen=True, slots=True)
class HintTotals:
    """Hints of some rows: how many there were, their sum and the largest one."""

    num_known: int = 0
    tokens: float = 0.0
    max_tokens: float = 0.0

    def add(self, other: "HintTotals") -> "HintTotals":
        largest = max(self.max_tokens, other.max_tokens)
        return HintTotals(self.num_known + other.num_known, self.tokens + other.tokens, largest)

    def expect(self, num_rows: int) -> tuple[float, float] | tuple[None, None]:
        """(sum over all rows, those without a hint counted as the mean of the others; the largest); None for unknown."""
        if self.num_known == 0:
            return None, None
        return self.tokens * num_rows / self.num_known, self.max_tokens


def total_hints(values: pa.Array | pa.ChunkedArray, max_tokens: int | None) -> HintTotals:
    """Of a column of numbers. `max_tokens`: no row gets more; None where rows have limits of their own."""
    numbers = pc.cast(values, pa.float64(), safe=False)
    known = numbers.filter(pc.fill_null(pc.and_(pc.is_finite(numbers), pc.greater_equal(numbers, 0.0)), False))
    if len(known) == 0:
        return HintTotals()
    known = pc.max_element_wise(known, 1.0)
    if max_tokens is not None:
        known = pc.min_element_wise(known, float(max_tokens))
    return HintTotals(len(known), pc.sum(known).as_py(), pc.max(known).as_py())


def choose_work(
    shard: Shard, *, n: int, window: int, max_tokens: int, prior: LengthPrior | None, default_tokens: float
) -> float:
    """A shard's share of one worker's full window, in tokens decoded one after the other: loads are balanced by it. With
    nothing known of its rows their prompts' size tells shards apart, scaled so that rows without a prompt count as
    `default_tokens`."""
    if shard.expected_tokens is not None:
        return shard.expected_tokens / window
    prompt_tokens = shard.prompt_bytes / BYTES_PER_TOKEN / shard.num_rows if shard.prompt_bytes is not None else None
    if prior is not None:
        row_tokens = min(prior.expect(prompt_tokens), float(max_tokens))
    else:
        row_tokens = default_tokens + (prompt_tokens or 0.0)
    return n * shard.num_rows * row_tokens / window


def choose_cost(
    shard: Shard, *, n: int, window: int, max_tokens: int, prior: LengthPrior | None, default_tokens: float
) -> float:
    """How long a shard keeps one worker busy: its work, or its longest row alone where that is more. What is longest
    begins first."""
    work = choose_work(shard, n=n, window=window, max_tokens=max_tokens, prior=prior, default_tokens=default_tokens)
    return max(work, shard.max_expected_tokens or 0.0)
