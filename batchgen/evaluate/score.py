"""Answers become scores. Every question has all of its samples here, or the evaluation is refused as not complete.

An error row, an empty answer and one in which the rules find nothing are counted as what they are, and never as right.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from batchgen.errors import InputError
from batchgen.evaluate.benchmarks import Benchmark, Question
from batchgen.evaluate.folder import Answer, Score
from batchgen.evaluate.math_grader import MathGrader
from batchgen.evaluate.programs import ProgramRunner


def check_complete(url: str, questions: Sequence[Question], answers: Iterable[Answer], n: int) -> None:
    """Raises InputError unless each question has each of its samples, once."""
    found = Counter((answer.question, answer.sample_index) for answer in answers)
    missing = [key for question in questions for key in ((question.id, k) for k in range(n)) if found[key] != 1]
    if missing:
        question, sample_index = missing[0]
        raise InputError(
            f"{url}: {len(missing):,} of {len(questions) * n:,} answers are not there once, first question '{question}' "
            f"sample {sample_index}; run the evaluation to its end"
        )


def score_answers(
    benchmark: Benchmark, questions: Sequence[Question], answers: Iterable[Answer], runner: ProgramRunner | None
) -> list[Score]:
    """In the order of questions and samples. `runner`: None where programs are not to be run."""
    by_question: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_question[answer.question].append(answer)
    pairs = [
        (question, answer)
        for question in questions
        for answer in sorted(by_question[question.id], key=lambda answer: answer.sample_index)
    ]
    # Programs run in processes of their own, a core each; the grader has one process, and is asked in turn.
    num_threads = 1 if runner is None else os.cpu_count() or 1
    with MathGrader() as grader, ThreadPoolExecutor(num_threads, "score") as threads:
        return list(threads.map(lambda pair: score_one(benchmark, pair[0], pair[1], grader, runner), pairs))


def score_one(
    benchmark: Benchmark, question: Question, answer: Answer, grader: MathGrader, runner: ProgramRunner | None
) -> Score:
    extracted = None if answer.text is None else benchmark.extract(answer.text)
    if answer.text is None:
        outcome = "error"
    elif extracted is None:
        outcome = "no_answer"
    else:
        outcome = judge(benchmark, question, extracted, answer.sample_index, grader, runner)
    return Score(
        question.id,
        question.cluster,
        answer.sample_index,
        outcome,
        None if outcome == "not_run" else outcome == "right",
        answer.finish_reason == "length",
        answer.text is None,
        extracted,
        answer.completion_tokens,
        answer.latency_s,
    )


def judge(
    benchmark: Benchmark,
    question: Question,
    extracted: str,
    sample_index: int,
    grader: MathGrader,
    runner: ProgramRunner | None,
) -> str:
    if benchmark.scoring in ("program", "step"):
        return "not_run" if runner is None else runner.run(question, extracted, sample_index)
    assert question.expected is not None
    if benchmark.scoring == "math":
        return "right" if grader.is_same(question.expected, extracted) else "wrong"
    return "right" if extracted == question.expected else "wrong"


def summarize(scores: Sequence[Score]) -> dict[str, Any]:
    """Counts and rates over all samples; `score` is the mean over questions, None while programs were not run."""
    outcomes = Counter(score.outcome for score in scores)
    tokens = [score.completion_tokens for score in scores if score.completion_tokens is not None]
    rights: dict[str, list[bool]] = defaultdict(list)
    for score in scores:
        rights[score.question].append(bool(score.is_right))
    return {
        "num_questions": len(rights),
        "num_samples": len(scores),
        "score": None if outcomes["not_run"] else sum(sum(r) / len(r) for r in rights.values()) / len(rights),
        "outcomes": dict(outcomes.most_common()),
        "truncated": sum(score.is_truncated for score in scores) / len(scores),
        "errors": sum(score.is_error for score in scores) / len(scores),
        "no_answer": outcomes["no_answer"] / len(scores),
        "mean_completion_tokens": sum(tokens) / len(tokens) if tokens else None,
    }
