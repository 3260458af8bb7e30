"""Expected completion tokens: of a row, of a shard, and as a run has measured them. Pure: Arrow and numbers in, values out.

Best first: the row's hint (`input.length_hint`), what an earlier run measured for prompts of that length
(`input.length_prior`) and, where a column names it, of that template (`input.length_template`), else nothing is expected
(None) and the prompt's length stands in where something must be ordered.
An expectation decides order, split and scale, never what a row becomes; a wrong one costs time at the tail and no more.

Measured lengths are counts of rows by (prompt bucket, completion bucket): prompts by octave, completions by quarter
octave, so that those of any batches add up. As text, 'prompt.completion:rows' pairs, they ride in a batch's stats, and
those of each template in the footer of a shard file.
"""

import hashlib
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.records import Shard

STEPS_PER_OCTAVE = 4
# A prompt bucket with fewer rows than this leans on the mean of all of them.
MIN_ROWS = 16
# Many requests are so many, and so many times what a worker has in flight: what goes by before a proof is there, some 130
# and a window, is a small part of them.
MANY_REQUESTS, MANY_WINDOWS = 2048, 32
# Rough size of a token in a prompt column; it decides an order, nothing else.
BYTES_PER_TOKEN = 4.5

# A footer holds the lengths of so many templates at most, a run's of so many; rows of others count for all alike.
MAX_FILE_TEMPLATES = 64
MAX_TEMPLATES = 1024
# A longer name is known by its digest.
MAX_NAME_CHARS = 64

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
    return format_lengths(Counter({(prompt, length): number for prompt, length, number in _count_lengths(rows, [])}))


def make_template_lengths(rows: pa.Table, column: str) -> dict[str, str]:
    """The same of each template that the column names, those with the most rows."""
    found: dict[str, LengthCounts] = {}
    for prompt, length, value, number in _count_lengths(rows, [column]):
        if (name := name_template(value)) is not None:
            found.setdefault(name, Counter())[prompt, length] += number
    return {name: format_lengths(counts) for name, counts in keep_largest(found, MAX_FILE_TEMPLATES).items()}


def _count_lengths(rows: pa.Table, columns: list[str]) -> list[tuple[Any, ...]]:
    """(prompt bucket, completion bucket, values of the columns, rows)."""
    plain = {f"key_{place}": to_plain(rows[name]) for place, name in enumerate(columns)}
    known = pa.table({**{name: rows[name] for name in ("prompt_tokens", "completion_tokens")}, **plain})
    known = known.filter(pc.is_valid(known["completion_tokens"]))
    tokens = pc.cast(pc.max_element_wise(known["completion_tokens"], 1), pa.float64())
    lengths = pc.cast(pc.ceil(pc.multiply(pc.log2(tokens), STEPS_PER_OCTAVE)), pa.int64())
    prompts = pc.cast(pc.ceil(pc.log2(pc.cast(pc.add(known["prompt_tokens"], 1), pa.float64()))), pa.int64())
    keys = {"prompt": prompts, "length": lengths, **{name: known[name] for name in plain}}
    names = list(keys)
    counts = pa.table(keys).group_by(names).aggregate([([], "count_all")])
    return list(zip(*(counts[name].to_pylist() for name in [*names, "count_all"]), strict=True))


def to_plain(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A column of names as one that can be grouped and counted; text as bytes, for it may be no text."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return column.cast(kind if pa.types.is_integer(kind) or pa.types.is_null(kind) else pa.large_binary())


def name_template(value: object) -> str | None:
    """What a template is called by whom its rows' column says so; None where it says nothing."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    name = str(value)
    if len(name) <= MAX_NAME_CHARS:
        return name
    return hashlib.blake2b(name.encode(errors="replace"), digest_size=16).hexdigest()


def keep_largest(found: Mapping[str, LengthCounts], most: int) -> dict[str, LengthCounts]:
    """Those with the most rows, by name."""
    largest = sorted(found, key=lambda name: (-found[name].total(), name))[:most]
    return {name: found[name] for name in sorted(largest)}


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
    """What an earlier run measured. `mean_tokens` is over all its rows; `templates` has those of each by itself; `source`
    is the run's output folder."""

    counts: Mapping[tuple[int | None, int], int]
    mean_tokens: float
    _means: Mapping[int | None, float] = field(repr=False)
    templates: Mapping[str, "LengthPrior"] = field(default_factory=dict)
    source: str = ""

    def expect(self, prompt_tokens: float | None, template: str | None = None) -> float:
        """Mean completion tokens of prompts of this template and about this length; of all where there were none."""
        if template is not None and (own := self.templates.get(template)) is not None:
            return own.expect(prompt_tokens)
        return self._means.get(choose_prompt_bucket(prompt_tokens), self.mean_tokens)


def make_prior(
    counts: LengthCounts, templates: Mapping[str, LengthCounts] | None = None, source: str = ""
) -> LengthPrior | None:
    """None where nothing was measured."""
    if (prior := _make_one(counts, None)) is None:
        return None
    made = {name: _make_one(own, prior.mean_tokens) for name, own in (templates or {}).items()}
    return replace(prior, templates={name: own for name, own in made.items() if own is not None}, source=source)


def _make_one(counts: LengthCounts, mean_of_all: float | None) -> LengthPrior | None:
    """Few rows lean on `mean_of_all`."""
    rows: Counter[int | None] = Counter()
    tokens: dict[int | None, float] = {}
    for (prompt, length), number in counts.items():
        rows[prompt] += number
        tokens[prompt] = tokens.get(prompt, 0.0) + number * bucket_middle(length)
    if not rows.total():
        return None
    mean = sum(tokens.values()) / rows.total()
    if mean_of_all is not None:
        mean = _lean(sum(tokens.values()), rows.total(), mean_of_all)
    means = {prompt: _lean(tokens[prompt], number, mean) for prompt, number in rows.items()}
    return LengthPrior(dict(counts), mean, means)


def list_quantiles(prior: LengthPrior, num: int) -> list[float]:
    """The measured completion lengths, all prompts together, as `num` of equal weight, sorted."""
    return _find_ranks(prior.counts, [(2 * each + 1) / (2 * num) for each in range(num)])


def find_quantile(counts: LengthCounts, q: float) -> float | None:
    """Completion tokens of the answer of this rank, to a tenth; None where nothing was counted."""
    return _find_ranks(counts, [q])[0] if counts.total() else None


def _find_ranks(counts: Mapping[tuple[int | None, int], int], shares: list[float]) -> list[float]:
    lengths: Counter[int] = Counter()
    for (_, length), rows in counts.items():
        lengths[length] += rows
    ordered = sorted(lengths.items())
    ends = list(accumulate(rows for _, rows in ordered))
    return [bucket_middle(ordered[bisect_left(ends, share * ends[-1])][0]) for share in shares]


def _lean(tokens: float, num_rows: int, mean: float) -> float:
    missing = max(0, MIN_ROWS - num_rows)
    return (tokens + missing * mean) / (num_rows + missing)


# ---- what is expected ------------------------------------------------------------------------------------------------


def is_hint(value: object) -> bool:
    """A finite number, not below 0: anything else says nothing."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def expect_tokens(
    hint: object, *, prompt_tokens: int | None, max_tokens: int, prior: LengthPrior | None, template: object = None
) -> float | None:
    """Expected completion tokens of one request. `template`: what its column says. None: nothing is known."""
    if isinstance(hint, int | float) and is_hint(hint):
        return float(min(max(1.0, hint), max_tokens))
    return None if prior is None else min(prior.expect(prompt_tokens, name_template(template)), float(max_tokens))


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


def total_templates(
    values: pa.Array | pa.ChunkedArray, prior: LengthPrior, prompt_tokens: float | None, max_tokens: int | None
) -> HintTotals:
    """Of a column of templates' names, as if what the prior says of each were a hint."""
    total = HintTotals()
    for each in to_plain(values).value_counts().to_pylist():
        one, num = prior.expect(prompt_tokens, name_template(each["values"])), each["counts"]
        one = one if max_tokens is None else min(one, float(max_tokens))
        total = total.add(HintTotals(num, num * one, one))
    return total


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


def must_prove(num_requests: int, window: int) -> bool:
    """Must hints of a worker's rows prove themselves before they are followed? Where many rows follow; of few they would
    be proved too late."""
    return num_requests >= max(MANY_REQUESTS, MANY_WINDOWS * window)


def must_go_in_order(num_requests: int, num_workers: int, window: int, *, is_hinted: bool) -> bool:
    """Are shards lent as they come until answers bear the hints out? Where rows would be sent so, too; and to a lone worker
    without hints: other orders are of no use to it."""
    return must_prove(num_requests // num_workers, window) and (is_hinted or num_workers == 1)


def choose_cost(
    shard: Shard,
    *,
    n: int,
    window: int,
    max_tokens: int,
    prior: LengthPrior | None,
    default_tokens: float,
) -> float:
    """How long a shard keeps one worker busy: its work, or its longest row alone where that is more. What is longest
    begins first."""
    work = choose_work(shard, n=n, window=window, max_tokens=max_tokens, prior=prior, default_tokens=default_tokens)
    return max(work, shard.max_expected_tokens or 0.0)
