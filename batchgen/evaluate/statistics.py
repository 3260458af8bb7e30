"""What two runs of one benchmark say about each other. Pure; the unit is the question.

A question's score is the share of its samples that are right; a benchmark's score is the mean over questions (avg@k).
Two runs are compared question by question. Where questions belong together (the steps of one SciCode problem) the problem
is what is resampled. Samples of one question are never taken for independent of each other.

The interval is the bootstrap's over questions, its percentiles widened for the number of questions as Student's t is
(Hesterberg, "What Teachers Should Know About the Bootstrap", 2015): plain percentiles are too narrow for 30 questions.
Where hardly any question differs, resampling sees no change that could have been: there the interval also covers the
exact bounds on the share of questions that may differ.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

NUM_RESAMPLES = 10_000
# Below this many questions that differ, a bootstrap has too little to draw from.
FEW_DIFFERENT = 10
Verdict = Literal["equivalent", "worse", "better", "inconclusive"]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """Of a difference of scores, in their unit (1 = all right). `is_exact`: it is as wide as the exact bounds on the share
    of questions that differ, which only more questions make narrower."""

    low: float
    high: float
    is_exact: bool = False

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True, slots=True)
class Comparison:
    """`other` against `base`. `difference` is other minus base. `p_mcnemar`: only where each question was asked once
    and none belongs with another.
    `num_more_samples`: how many more of each run would tell, where it is inconclusive; questions where the interval
    is exact."""

    num_questions: int
    num_clusters: int
    base: float
    other: float
    difference: float
    interval: Interval
    confidence: float
    margin: float
    num_worse: int
    num_better: int
    p_mcnemar: float | None
    verdict: Verdict
    num_more_samples: int | None


def group_sums(values: Floats, clusters: Sequence[str]) -> tuple[Floats, Floats]:
    """(sum of values, number of questions) of each cluster."""
    _, numbers = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    return np.bincount(numbers, weights=values).astype(np.float64), np.bincount(numbers).astype(np.float64)


def resample_means(sums: Floats, sizes: Floats, *, num_resamples: int, seed: int) -> Floats:
    """Means over all questions when as many clusters are drawn again. Clusters alike are drawn as one kind: the same
    distribution, and the price does not grow with their number."""
    kinds, counts = np.unique(np.stack([sums, sizes]), axis=1, return_counts=True)
    total = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, size=num_resamples)
    means: Floats = (drawn @ kinds[0]) / (drawn @ kinds[1])
    return means


def make_interval(
    sums: Floats, sizes: Floats, confidence: float, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """Of the mean over questions. Raises ValueError for fewer than two clusters."""
    num = len(sums)
    if num < 2:
        raise ValueError("fewer than two questions tell nothing about others")
    tail = (1 - confidence) / 2
    wide = stats.norm.cdf(math.sqrt(num / (num - 1)) * stats.t.ppf(tail, num - 1))
    means = resample_means(sums, sizes, num_resamples=num_resamples, seed=seed)
    low, high = np.quantile(means, [wide, 1 - wide])
    worse, better = int((sums < 0).sum()), int((sums > 0).sum())
    if worse + better < FEW_DIFFERENT:
        bounds = -_share_at_most(worse, num, tail), _share_at_most(better, num, tail)
        return Interval(min(float(low), bounds[0]), max(float(high), bounds[1]), is_exact=True)
    return Interval(float(low), float(high))


def _share_at_most(count: int, num: int, tail: float) -> float:
    """Clopper's and Pearson's upper bound on the share of clusters that are such."""
    return 1.0 if count >= num else float(stats.beta.ppf(1 - tail, count + 1, num - count))


def mcnemar(num_worse: int, num_better: int) -> float:
    """Exact, two-sided: were worse and better as likely, how often would they be as far apart?"""
    discordant = num_worse + num_better
    return float(stats.binomtest(num_worse, discordant).pvalue) if discordant else 1.0


def judge(interval: Interval, margin: float) -> Verdict:
    """Equivalent only where the whole interval is within the margin stated beforehand: a difference that is not
    significant is not thereby none."""
    if -margin < interval.low and interval.high < margin:
        return "equivalent"
    if interval.high < 0:
        return "worse"
    return "better" if interval.low > 0 else "inconclusive"


def count_more_samples(num_samples: int, difference: float, interval: Interval, margin: float) -> int:
    """How many more samples of each run would tell, if the difference stays what it is: its width falls with their root,
    an exact bound with their number. Told is what needs fewer: that it is within the margin, or that it is not zero."""
    needed = max(margin - abs(difference), abs(difference))
    factor = interval.half_width / needed
    return max(1, math.ceil(num_samples * ((factor if interval.is_exact else factor**2) - 1)))


def compare_scores(
    base: Sequence[float],
    other: Sequence[float],
    clusters: Sequence[str],
    *,
    num_samples: int,
    is_single: bool,
    margin: float,
    confidence: float = 0.9,
) -> Comparison:
    """Both runs' scores by question, in one order; the cluster that each question is of. `num_samples`: of each run.
    `is_single`: each question was asked once. Raises ValueError."""
    ours, theirs = np.asarray(base, dtype=np.float64), np.asarray(other, dtype=np.float64)
    differences = theirs - ours
    sums, sizes = group_sums(differences, clusters)
    interval = make_interval(sums, sizes, confidence)
    difference = float(differences.mean())
    worse, better = int((differences < 0).sum()), int((differences > 0).sum())
    verdict = judge(interval, margin)
    num_units = len(differences) if interval.is_exact else num_samples
    more = count_more_samples(num_units, difference, interval, margin)
    return Comparison(
        num_questions=len(differences),
        num_clusters=len(sums),
        base=float(ours.mean()),
        other=float(theirs.mean()),
        difference=difference,
        interval=interval,
        confidence=confidence,
        margin=margin,
        num_worse=worse,
        num_better=better,
        # It takes questions for independent, which the steps of one problem are not.
        p_mcnemar=mcnemar(worse, better) if is_single and len(sums) == len(differences) else None,
        verdict=verdict,
        num_more_samples=more if verdict == "inconclusive" else None,
    )


def comparison_to_json(comparison: Comparison) -> dict[str, Any]:
    names = [name for name in Comparison.__slots__ if name != "interval"]
    interval = comparison.interval
    bounds = {"interval": [interval.low, interval.high], "is_interval_exact": interval.is_exact}
    return {**{name: getattr(comparison, name) for name in names}, **bounds}
