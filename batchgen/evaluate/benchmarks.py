"""The benchmarks, one value each: what a row of the user's dataset must have, what is asked, how answers are found and
scored, how often each question is asked. Rows in, questions out; what is drawn comes from fixed
seeds.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from batchgen.demo_questions import CHAT_MIX, THINKING_MIX, make_question
from batchgen.demo_questions import Question as DemoQuestion
from batchgen.evaluate.extract import (
    extract_boxed,
    extract_exact,
    extract_gold_number,
    extract_letter,
    extract_program,
    extract_step,
)
from batchgen.evaluate.templates import CHOICE, MATH, PROGRAM, STEP, WITH_STARTER, WITHOUT_STARTER

Row = Mapping[str, Any]
Scoring = Literal["equal", "math", "program", "step"]
LETTERS = "ABCDEFGHIJ"
OPTION_SEED = 42


@dataclass(frozen=True, slots=True)
class Question:
    """`expected`: what the extracted answer must be. `cluster`: questions of one cluster are not independent. `tests`:
    JSON, of what a program must pass. `names`: what stands for the names in the prompt's braces."""

    id: str
    names: dict[str, str]
    expected: str | None
    cluster: str
    tests: str | None = None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """`columns`: what each row of the dataset must have. `make`: all rows at once, for some shuffle over all of them; it
    raises ValueError, with the row's number, for one that no question can be made of."""

    title: str
    columns: tuple[str, ...]
    make: Callable[[Sequence[Row]], list[Question]]
    prompt: str
    extract: Callable[[str], str | None]
    scoring: Scoring
    repeats: int
    max_tokens: int = 64_000
    has_dataset: bool = True


@contextmanager
def _naming_row(number: int) -> Iterator[None]:
    """What is wrong with a row, in words that quote none of its text."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"row {number}: lacks {error}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"row {number}: has a column of another type than docs/evaluate.md says") from error
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error


def _each(make_one: Callable[[Row, int], Question]) -> Callable[[Sequence[Row]], list[Question]]:
    def make_all(rows: Sequence[Row]) -> list[Question]:
        questions = []
        for number, row in enumerate(rows):
            with _naming_row(number):
                questions.append(make_one(row, number))
        return questions

    return make_all


def _plain(row: Row, number: int, id_column: str, names: dict[str, str], expected: str | None) -> Question:
    question_id = str(row[id_column]) if row.get(id_column) is not None else str(number)
    return Question(question_id, names, expected, question_id)


def _text(row: Row, column: str) -> str:
    value = row[column]
    if value is None or not str(value).strip():
        raise ValueError(f"column '{column}' is empty")
    return str(value)


def _list(row: Row, column: str) -> list[Any]:
    value = row[column]
    if not isinstance(value, list):  # of a string each character would be taken for an entry
        raise ValueError(f"column '{column}' is no list; convert it as docs/evaluate.md says")
    return value


# ---- mathematics


def _make_aime(row: Row, number: int) -> Question:
    return _plain(row, number, "id", {"problem": _text(row, "problem")}, _text(row, "answer"))


def _make_gsm8k(row: Row, number: int) -> Question:
    gold = extract_gold_number(_text(row, "answer"))
    return _plain(row, number, "custom_id", {"problem": _text(row, "question")}, gold)


def make_arithmetic(num: int, *, is_thinking: bool) -> list[Question]:
    """Questions that the embedded model never saw in training."""
    rng = random.Random(1)
    found: dict[str, DemoQuestion] = {}
    while len(found) < num:
        question = make_question(rng, THINKING_MIX if is_thinking else CHAT_MIX, held_out=True)
        found.setdefault(question.text, question)
    return [
        Question(f"{question.kind}-{number}", {"problem": text}, question.answer, f"{question.kind}-{number}")
        for number, (text, question) in enumerate(found.items())
    ]


# ---- multiple choice


def _make_choice(row: Row, number: int, id_column: str, options: Sequence[str], answer: str, column: str) -> Question:
    letters = LETTERS[: len(options)]
    if not 2 <= len(options) <= len(LETTERS) or answer not in letters:
        raise ValueError(f"has {len(options)} options; 2 to 10, and the letter of one of them as the answer")
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    names = {"problem": f"{_text(row, column)}\n\n{listed}", "letters": "/".join(letters)}
    return _plain(row, number, id_column, names, answer)


def _make_mmlu_pro(row: Row, number: int) -> Question:
    options = [str(option) for option in _list(row, "options")]
    return _make_choice(row, number, "question_id", options, _text(row, "answer"), "question")


GPQA_OPTIONS = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Correct Answer")


def _make_gpqa(rows: Sequence[Row]) -> list[Question]:
    rng = random.Random(OPTION_SEED)

    def make_one(row: Row, number: int) -> Question:
        order = [0, 1, 2, 3]
        rng.shuffle(order)
        options = [_tidy(_text(row, GPQA_OPTIONS[place])) for place in order]
        return _make_choice(row, number, "Record ID", options, LETTERS[order.index(3)], "Question")

    return _each(make_one)(rows)


def _tidy(option: str) -> str:
    """As lm-evaluation-harness and NeMo-Skills clean GPQA's options."""
    return re.sub(r"\[.*?\]", "", option.strip().replace(" [title]", ". ")).replace("  ", " ")


# ---- programs


def _make_livecodebench(row: Row, number: int) -> Question:
    starter = str(row["starter_code"] or "")
    names = {
        "problem": _text(row, "question_content"),
        "format": WITH_STARTER if starter else WITHOUT_STARTER,
        "starter": starter or "# YOUR CODE HERE",
    }
    cases = [*_parse(row, "public_test_cases"), *_parse(row, "private_test_cases")]
    if not cases:
        raise ValueError("has no test cases")
    if not all(isinstance(case[name], str) for case in cases for name in ("input", "output")):
        raise ValueError("has a test case whose input or output is no text")
    function = _parse(row, "metadata").get("func_name") if starter else None
    if starter and function is None:
        raise ValueError("has starter code and no func_name in its metadata")
    tests = {"function": function, "cases": [[case["input"], case["output"]] for case in cases]}
    question = _plain(row, number, "question_id", names, None)
    return Question(question.id, names, None, question.id, json.dumps(tests))


def _parse(row: Row, column: str) -> Any:
    value = row[column]
    try:
        return json.loads(value) if isinstance(value, str) else value or []
    except ValueError:
        raise ValueError(f"column '{column}' is not JSON; convert it as docs/evaluate.md says") from None


# Given to every model by the reference, and not scored: (problem, step), counted from 1.
GIVEN_STEPS = {("13", 6), ("62", 1), ("76", 3)}


def _make_scicode(row: Row) -> list[Question]:
    problem, dependencies = _text(row, "problem_id"), str(row["required_dependencies"] or "")
    questions: list[Question] = []
    before: list[dict[str, str | None]] = []
    for place, step in enumerate(_list(row, "sub_steps"), 1):
        is_given = (problem, place) in GIVEN_STEPS
        if is_given and not step.get("given_code"):
            raise ValueError(f"step {step['step_number']} lacks given_code, the reference's own code of it")
        told = "\n".join(filter(None, (step["step_description_prompt"], step.get("step_background"))))
        if not is_given:
            names = {
                "next": f"{told}\n\n{step['function_header']}\n\n{step['return_line']}",
                "dependencies": dependencies,
            }
            tests = {
                "place": place,
                "before": before[:],
                "dependencies": dependencies,
                "cases": _list(step, "test_cases"),
            }
            questions.append(Question(str(step["step_number"]), names, None, problem, json.dumps(tests)))
        before.append({"told": told, "given": step["given_code"] if is_given else None})
    return questions


def _make_all_scicode(rows: Sequence[Row]) -> list[Question]:
    questions: list[Question] = []
    for number, row in enumerate(rows):
        with _naming_row(number):
            questions += _make_scicode(row)
    return questions


BENCHMARKS: dict[str, Benchmark] = {
    "mmlu_pro": Benchmark(
        "MMLU-Pro",
        ("question", "options", "answer"),
        _each(_make_mmlu_pro),
        CHOICE,
        extract_letter,
        "equal",
        repeats=1,
    ),
    "gpqa_diamond": Benchmark(
        "GPQA Diamond", ("Question", *GPQA_OPTIONS), _make_gpqa, CHOICE, extract_letter, "equal", repeats=16
    ),
    "aime_2025": Benchmark(
        "AIME 2025", ("problem", "answer"), _each(_make_aime), MATH, extract_boxed, "math", repeats=64
    ),
    "livecodebench_v6": Benchmark(
        "LiveCodeBench v6",
        ("question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata"),
        _each(_make_livecodebench),
        PROGRAM,
        extract_program,
        "program",
        repeats=8,
    ),
    "scicode": Benchmark(
        "SciCode",
        ("problem_id", "required_dependencies", "sub_steps"),
        _make_all_scicode,
        STEP,
        extract_step,
        "step",
        repeats=8,
    ),
    "gsm8k": Benchmark("GSM8K", ("question", "answer"), _each(_make_gsm8k), MATH, extract_boxed, "math", repeats=1),
    "arithmetic": Benchmark(
        "Arithmetic",
        (),
        lambda _: [],
        "{problem}",
        extract_exact,
        "equal",
        repeats=1,
        max_tokens=1000,
        has_dataset=False,
    ),
}
# The model card of nvidia/DeepSeek-V3.2-NVFP4: score in FP8, score as NVFP4.
CARD: dict[str, tuple[float, float]] = {
    "mmlu_pro": (0.802, 0.799),
    "gpqa_diamond": (0.849, 0.835),
    "livecodebench_v6": (0.756, 0.756),
    "scicode": (0.391, 0.401),
    "aime_2025": (0.934, 0.923),
}
