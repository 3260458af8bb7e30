"""What two runs say about each other: the intervals cover as often as they say, verdicts need the margin."""

import numpy as np
import pytest
from scipy import stats

from batchgen.evaluate.statistics import (
    Interval,
    compare_scores,
    count_more_samples,
    group_sums,
    judge,
    make_interval,
    mcnemar,
)

NUM_TRIALS = 2000


def cover(draw: object, truth: float, *, clusters: list[str] | None = None, confidence: float = 0.9) -> float:
    """Share of trials whose interval holds the true difference. `draw`: differences by question, of one trial."""
    hits = 0
    for trial in range(NUM_TRIALS):
        values = draw(np.random.default_rng(trial))  # type: ignore[operator]
        sums, sizes = group_sums(values, clusters or [str(k) for k in range(len(values))])
        interval = make_interval(sums, sizes, confidence, num_resamples=1000, seed=trial)
        hits += interval.low <= truth <= interval.high
    return hits / NUM_TRIALS


def draw_runs(num: int, repeats: int, change: float, mean: float = 0.8, spread: float = 1.0):  # type: ignore[no-untyped-def]
    """Two runs over `num` questions drawn anew each time; the second is worse by `change` of what each is worth."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        p = rng.beta(mean * spread, (1 - mean) * spread, num)
        base, other = rng.binomial(repeats, p), rng.binomial(repeats, p * (1 - change))
        return (other - base) / repeats

    return draw, -mean * change


@pytest.mark.parametrize(("num", "repeats", "change"), [(198, 16, 0.05), (30, 64, 0.0), (500, 1, 0.02)])
def test_a_90_percent_interval_covers_88_to_92_of_100(num: int, repeats: int, change: float) -> None:
    draw, truth = draw_runs(num, repeats, change)
    assert 0.88 <= cover(draw, truth) <= 0.92


def test_questions_of_one_problem_are_drawn_together() -> None:
    num_problems, steps = 80, 4
    clusters = [str(k // steps) for k in range(num_problems * steps)]

    def draw(rng: np.random.Generator) -> np.ndarray:
        shared = np.repeat(rng.binomial(2, 0.5, num_problems) - 1, steps)
        return (shared + rng.binomial(2, 0.4, num_problems * steps) - 1) / 4

    assert 0.88 <= cover(draw, -0.05, clusters=clusters) <= 0.92
    assert cover(draw, -0.05) < 0.85  # taken for independent, they claim too much


def test_where_hardly_anything_differs_an_interval_covers_at_least_what_it_says() -> None:
    draw, truth = draw_runs(200, 1, 0.01, mean=0.99, spread=1000.0)
    assert cover(draw, truth) >= 0.88


def test_no_difference_among_few_questions_is_no_proof_of_equivalence() -> None:
    same = [1.0] * 30
    few = compare_scores(same, same, [str(k) for k in range(30)], num_samples=30, is_single=True, margin=0.01)
    assert (few.verdict, few.difference) == ("inconclusive", 0.0)
    assert few.interval.is_exact
    assert few.num_more_samples is not None
    enough = [1.0] * (30 + few.num_more_samples)
    names = [str(k) for k in range(len(enough))]
    told = compare_scores(enough, enough, names, num_samples=len(enough), is_single=True, margin=0.0105)
    assert told.verdict == "equivalent"
    many = [1.0] * 2000
    clusters = [str(k) for k in range(2000)]
    assert compare_scores(many, many, clusters, num_samples=2000, is_single=True, margin=0.01).verdict == "equivalent"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.005, 0.005, "equivalent"),
        (-0.009, -0.001, "equivalent"),
        (-0.01, 0.005, "inconclusive"),
        (-0.05, -0.02, "worse"),
        (0.005, 0.05, "better"),
        (-0.05, 0.05, "inconclusive"),
    ],
)
def test_only_an_interval_within_the_margin_is_called_equivalent(low: float, high: float, verdict: str) -> None:
    assert judge(Interval(low, high), 0.01) == verdict


def test_mcnemar_is_exact() -> None:
    assert mcnemar(8, 0) == pytest.approx(2 * 0.5**8)
    assert mcnemar(32, 5) == pytest.approx(stats.binomtest(5, 37).pvalue)
    assert mcnemar(0, 0) == 1.0


def test_the_samples_that_would_tell_do_tell() -> None:
    rng = np.random.default_rng(5)
    p = rng.beta(4, 1, 200)

    def run(repeats: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.binomial(repeats, p) / repeats, rng.binomial(repeats, p) / repeats

    clusters = [str(k) for k in range(200)]
    first = compare_scores(*run(2), clusters, num_samples=400, is_single=False, margin=0.01)
    assert first.verdict == "inconclusive"
    assert first.num_more_samples is not None
    repeats = 2 + -(-first.num_more_samples // 200)
    half = compare_scores(*run(4 * repeats), clusters, num_samples=1, is_single=False, margin=0.01)
    assert half.verdict in ("equivalent", "worse", "better")


def test_more_samples_are_counted_for_the_nearer_goal() -> None:
    # 0.02 wide each way, no difference: half the width needs four times the samples.
    assert count_more_samples(100, 0.0, Interval(-0.02, 0.02), 0.01) == 300
    assert count_more_samples(100, 0.02, Interval(-0.02, 0.06), 0.01) == 300


def test_the_score_is_the_mean_over_questions_and_a_single_run_has_mcnemar() -> None:
    base, other = [1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]
    found = compare_scores(base, other, list("abcd"), num_samples=4, is_single=True, margin=0.01)
    assert (found.base, found.other, found.num_worse, found.num_better) == (0.75, 0.25, 2, 0)
    assert found.p_mcnemar == 0.5
    assert compare_scores(base, other, list("abcd"), num_samples=8, is_single=False, margin=0.01).p_mcnemar is None


def test_questions_that_would_tell_are_counted_as_questions_however_often_each_was_asked() -> None:
    same, names = [1.0] * 12, [str(number) for number in range(12)]
    made = [
        compare_scores(same, same, names, num_samples=12 * n, is_single=n == 1, margin=0.01, confidence=0.9)
        for n in (1, 4)
    ]
    assert made[0].interval.is_exact
    assert made[0].num_more_samples == made[1].num_more_samples


def test_steps_of_one_problem_have_no_mcnemar() -> None:
    made = compare_scores(
        [1.0] * 4, [0.0] * 4, ["a", "a", "b", "b"], num_samples=4, is_single=True, margin=0.01, confidence=0.9
    )
    assert made.p_mcnemar is None


def test_one_question_tells_nothing() -> None:
    with pytest.raises(ValueError, match="two questions"):
        compare_scores([1.0], [0.0], ["a"], num_samples=1, is_single=True, margin=0.01)
