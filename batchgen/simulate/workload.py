"""The rows of a job that never existed: how long their prompts and answers are, what is known of them before, and which
begin alike. Deterministic by seed; each shard draws its own rows, so that they are the same in any order of leases.

Lengths come from a sample of (prompt, completion) tokens: an earlier run's rows, a histogram of them (`lengths`, by
buckets: the middle of each stands for all), or a lognormal whose parameters somebody states. `resample` draws a sample of
the same size with replacement, each length moved a little (the smoothed bootstrap): how much a small sample might have told
otherwise, answers longer than its longest included.
"""

import math
import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import NormalDist

from batchgen.lengths import LengthCounts, bucket_middle

# Prompt tokens in the middle (by ratio) of an octave, where a histogram has only that.
OCTAVE_MIDDLE = 0.5**0.5

# A larger sample's mean is known to well below a percent: it is taken as it is.
MAX_RESAMPLED = 100_000


@dataclass(frozen=True, slots=True)
class VirtualRow:
    """`expected_tokens`: of the answer, where a hint or prior tells. `prefix`: the group whose first `prefix_tokens` of
    the prompt are alike."""

    number: int
    prompt_tokens: int
    output_tokens: int
    expected_tokens: float | None = None
    prefix: int | None = None
    prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Lengths:
    """(prompt tokens, completion tokens) pairs and how often each was seen; the pairs sorted by completion."""

    pairs: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return sum(self.counts)

    def mean(self, max_tokens: int | None = None) -> float:
        """Completion tokens of a row, cut at `max_tokens`."""
        most = math.inf if max_tokens is None else max_tokens
        return (
            sum(min(pair[1], most) * count for pair, count in zip(self.pairs, self.counts, strict=True)) / self.num_rows
        )

    def mean_prompt(self) -> float:
        return sum(pair[0] * count for pair, count in zip(self.pairs, self.counts, strict=True)) / self.num_rows

    def list_quantiles(self, count: int) -> list[float]:
        """Completion tokens as a sorted sample in which each weighs the same."""
        sums, total = list(accumulate(self.counts)), self.num_rows
        return [float(self.pairs[bisect_left(sums, (2 * each + 1) * total / (2 * count))][1]) for each in range(count)]

    def resample(self, seed: str, max_tokens: int | None = None) -> "Lengths":
        """Answers that were cut off at `max_tokens` stay there: how long they would have been, the sample doesn't say."""
        if self.num_rows > MAX_RESAMPLED:
            return self
        source, width = random.Random(f"{seed}:resample"), self._choose_width()
        most = math.inf if max_tokens is None else max_tokens
        found: dict[tuple[int, int], int] = {}
        for prompt, output in source.choices(self.pairs, self.counts, k=self.num_rows):
            # The factor's mean is 1: a wider sample is no longer one.
            moved = output if output >= most else round(output * math.exp(source.gauss(-width * width / 2, width)))
            pair = prompt, max(1, moved)
            found[pair] = found.get(pair, 0) + 1
        return make_lengths(found)

    def _choose_width(self) -> float:
        """How far a length is moved, as a standard deviation of its logarithm: Silverman's rule for a kernel density."""
        logs, count = [math.log(output) for _, output in self.pairs], self.num_rows
        mean = sum(log * number for log, number in zip(logs, self.counts, strict=True)) / count
        variance = sum((log - mean) ** 2 * number for log, number in zip(logs, self.counts, strict=True)) / count
        return 0.9 * math.sqrt(variance) / math.pow(count, 0.2)


def make_lengths(pairs: Mapping[tuple[int, int], int]) -> Lengths:
    """Of (prompt, completion) pairs with their counts. Raises ValueError for none."""
    kept = sorted(((pair, count) for pair, count in pairs.items() if count > 0), key=lambda item: item[0][::-1])
    if not kept:
        raise ValueError("no lengths")
    return Lengths(tuple(pair for pair, _ in kept), tuple(count for _, count in kept))


def make_histogram_lengths(counts: LengthCounts, prompt_tokens: int) -> Lengths:
    """`prompt_tokens`: where nobody counted those."""
    pairs: dict[tuple[int, int], int] = {}
    for (prompt, completion), rows in counts.items():
        tokens = prompt_tokens if prompt is None else max(1, round(2**prompt * OCTAVE_MIDDLE))
        pair = tokens, max(1, round(bucket_middle(completion)))
        pairs[pair] = pairs.get(pair, 0) + rows
    return make_lengths(pairs)


def make_lognormal(mean: float, sigma: float, prompt_tokens: int, num_points: int = 4096) -> Lengths:
    """Evenly spaced quantiles of a lognormal with this mean (completion tokens) and this sigma of its logarithm."""
    middle = math.log(mean) - sigma * sigma / 2
    normal = NormalDist()
    pairs: dict[tuple[int, int], int] = {}
    for point in range(num_points):
        tokens = max(1, round(math.exp(middle + sigma * normal.inv_cdf((point + 0.5) / num_points))))
        pairs[prompt_tokens, tokens] = pairs.get((prompt_tokens, tokens), 0) + 1
    return make_lengths(pairs)


@dataclass(frozen=True, slots=True)
class Workload:
    """`hint_sigma`: None, nothing is expected of a row; 0, its hint is right; else the standard deviation of the logarithm
    of hint / truth. `lognormal` (mean, sigma): lengths are drawn from it itself and not from `lengths`' points of it."""

    lengths: Lengths
    max_tokens: int
    hint_sigma: float | None = None
    num_prefixes: int = 0
    prefix_tokens: int = 0
    lognormal: tuple[float, float] | None = None
    seed: str = "0"

    def draw(self, name: object, first: int, count: int) -> list[VirtualRow]:
        """`count` rows of which the first has this number; the same for the same name."""
        source = random.Random(f"{self.seed}:{name}")
        pairs = self._draw_pairs(source, count)
        return [self._make_row(source, first + each, *pair) for each, pair in enumerate(pairs)]

    def _draw_pairs(self, source: random.Random, count: int) -> Sequence[tuple[int, int]]:
        if self.lognormal is None:
            return source.choices(self.lengths.pairs, self.lengths.counts, k=count)
        mean, sigma = self.lognormal
        prompt, middle = self.lengths.pairs[0][0], math.log(mean) - sigma * sigma / 2
        return [(prompt, max(1, round(source.lognormvariate(middle, sigma)))) for _ in range(count)]

    def _make_row(self, source: random.Random, number: int, prompt: int, output: int) -> VirtualRow:
        output = min(output, self.max_tokens)
        expected = None
        if self.hint_sigma is not None:
            noise = math.exp(source.gauss(0.0, self.hint_sigma)) if self.hint_sigma else 1.0
            expected = min(max(1.0, output * noise), float(self.max_tokens))
        if not self.num_prefixes:
            return VirtualRow(number, prompt, output, expected)
        return VirtualRow(number, prompt, output, expected, source.randrange(self.num_prefixes), self.prefix_tokens)

    def with_seed(self, seed: object) -> "Workload":
        return replace(self, seed=str(seed))
