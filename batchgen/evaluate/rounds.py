"""What is asked in which round. Pure. All questions at once, but for SciCode: each step sees the code that the same sample
wrote for the steps before it, so its questions are asked place by place, and each sample by a row of its own."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from batchgen.evaluate.benchmarks import Benchmark, Question
from batchgen.evaluate.folder import Asked
from batchgen.evaluate.templates import fill

# (problem, place, sample) -> the code that was extracted.
Codes = Mapping[tuple[str, int, int], str]


def list_places(benchmark: Benchmark, questions: Sequence[Question]) -> list[int]:
    """The rounds, counted from 1."""
    if benchmark.scoring != "step":
        return [1]
    return sorted({read_step(question)["place"] for question in questions})


def make_asked(
    benchmark: Benchmark, template: str, questions: Sequence[Question], place: int, codes: Codes, n: int
) -> list[Asked]:
    """Rows of one round. Raises ValueError for a template with a name that the benchmark does not have."""
    if benchmark.scoring != "step":
        return [Asked(question.id, question.id, 0, fill(template, question.names)) for question in questions]
    here = [question for question in questions if read_step(question)["place"] == place]
    return [
        Asked(f"{question.id}#{sample}", question.id, sample, fill(template, add_previous(question, codes, sample)))
        for question in here
        for sample in range(n)
    ]


def add_previous(question: Question, codes: Codes, sample: int) -> dict[str, str]:
    told = [f"{step['told']}\n\n{code}" for step, code in list_previous(question, codes, sample)]
    return {**question.names, "previous": "\n\n------\n\n".join(told)}


def list_previous(question: Question, codes: Codes, sample: int) -> list[tuple[dict[str, Any], str]]:
    """The steps before this one, each with its code: given by the benchmark, or written by this sample."""
    before = read_step(question)["before"]
    return [
        (step, step["given"] if step["given"] is not None else codes.get((question.cluster, place, sample), ""))
        for place, step in enumerate(before, 1)
    ]


def read_step(question: Question) -> dict[str, Any]:
    assert question.tests is not None
    step: dict[str, Any] = json.loads(question.tests)
    return step
