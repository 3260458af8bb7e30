"""Answers in generated texts. The examples called published are those of NeMo-Skills' own tests (test_mcq_evaluator.py,
test_answer_extraction.py) and of GSM8K's file; the others are ours, where no published ones were at hand."""

import pytest

from batchgen.evaluate.benchmarks import BENCHMARKS, LETTERS, Question
from batchgen.evaluate.extract import (
    extract_boxed,
    extract_gold_number,
    extract_letter,
    extract_program,
    extract_step,
)
from batchgen.evaluate.math_grader import MathGrader, read_number
from batchgen.evaluate.programs import is_same_output, is_same_value
from batchgen.evaluate.rounds import make_asked
from batchgen.evaluate.templates import fill


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # published
        (
            "The adiabatic regime requires\n\n\\boxed{\\langle H\\rangle \\ll \\Delta E}\n\n"
            "so the correct statement is D.\n\n**Answer: D**",
            "D",
        ),
        ("Reasoning...\n\n\\boxed{D}", "D"),
        ("Reasoning...\n\nAnswer: \\boxed{B}", "B"),
        ("Reasoning...\n\n\\boxed{(C)}", "C"),
        ("Reasoning...\n\n\\boxed{\\text{A}}", "A"),
        ("Reasoning...\n\nAnswer: B", "B"),
        ("I am not sure.", None),
        ("Some reasoning with \\boxed{A} in the middle.\n\nThe final answer is B", "A"),
        # ours
        ("Answer: A\n\nNo, wait.\n\nAnswer: j", "J"),
        ("Answer: Because of this", None),
        ("**Answer:** E", "E"),
        ("Answer: *E*", "E"),
        ("Answer: **E**", None),  # the reference allows two signs here, and this has three
        ("\\boxed{b}", "B"),
        ("\\boxed{}", None),
        ("", None),
    ],
)
def test_a_letter_is_found_as_the_reference_finds_it(text: str, letter: str | None) -> None:
    assert extract_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("so \\boxed{\\frac{1}{\\sqrt{2}}}.", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{1} then \\boxed{70}", "70"),
        ("the answer is 7", None),
        ("\\boxed{\\frac{1}{2", None),  # cut off inside the box
        ("\\boxed 7", None),
        ("\\boxed{ }", None),
    ],
)
def test_the_last_box_counts(text: str, held: str | None) -> None:
    assert extract_boxed(text) == held


@pytest.mark.parametrize(
    ("gold", "answer", "is_same"),
    [
        ("70", "70", True),
        ("70", "070", True),
        ("70", "70.0", True),
        ("70", "\\$70", True),
        ("1000", "1,000", True),
        ("70", "71", False),
        ("70", "$70$", True),
        ("70", "70\\%", True),
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac{1}{2}", "\\dfrac{2}{4}", True),
        ("588", "2^2 \\cdot 3 \\cdot 7^2", True),
        ("\\sqrt{8}", "2\\sqrt{2}", True),
        ("\\frac{1}{3}", "0.33", False),
        ("336^\\circ", "336", True),
        ("70", "seventy", False),
        ("70", "\\text{no solution}", False),
        ("70", "}{", False),
    ],
)
def test_mathematical_answers_are_compared_by_what_they_say(
    grader: MathGrader, gold: str, answer: str, is_same: bool
) -> None:
    assert grader.is_same(gold, answer) is is_same


@pytest.fixture(scope="module")
def grader() -> MathGrader:
    with MathGrader() as made:
        yield made  # type: ignore[misc]


def test_an_answer_that_can_not_be_worked_out_counts_as_wrong_and_the_next_one_is_judged() -> None:
    with MathGrader(patience_s=1.0) as grader:
        assert not grader.is_same("70", "9^{9^{9^{9}}}")
        grader._patience_s = 20.0
        assert grader.is_same("\\frac{1}{2}", "\\frac{2}{4}")


@pytest.mark.parametrize(("text", "value"), [("1,234.50", "1234.50"), ("-.5", "-0.5"), ("1,23", None), ("1/2", None)])
def test_plain_numbers(text: str, value: str | None) -> None:
    found = read_number(text)
    assert (None if found is None else str(found)) == value


def test_the_gold_answer_of_gsm8k_stands_behind_its_mark() -> None:
    # Published: the first row of the test set, and one with a comma.
    assert extract_gold_number("She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer's market.\n#### 18") == "18"
    assert extract_gold_number("#### 1,450") == "1450"
    with pytest.raises(ValueError, match="####"):
        extract_gold_number("18")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Try:\n```python\na = 1\n```\nNo:\n```python\na = 2\n```", "a = 2"),
        ("```\na = 1\n```", "a = 1"),
        ("```python\na = 1", None),  # never closed: cut off
        ("a = 1", None),
        ("", None),
        ("```python\r\na = 1\r\n```", "a = 1"),
    ],
)
def test_the_last_closed_program_counts(text: str, code: str | None) -> None:
    assert extract_program(text) == code


def test_a_step_of_nothing_but_blanks_is_read_at_once() -> None:
    for blanks in ("\n" * 60_000, "from " + " " * 60_000):
        code = extract_step(f"```python\n{blanks}x = 1\nfrom a.b import  c\n  import d\nfrom_here = 2\n```")
        assert code is not None
        assert "import" not in code
        assert code.endswith("from_here = 2\n")


def test_a_step_of_scicode_is_the_first_block_without_imports() -> None:
    assert extract_step("```python\nimport numpy as np\ndef f():\n    return 1\n```\n```python\nf()\n```") == (
        "\ndef f():\n    return 1\n"
    )
    assert extract_step("def f(): pass") == "def f(): pass"
    assert extract_step(" ") is None


@pytest.mark.parametrize(
    ("printed", "expected", "is_same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        (" 1 2 \n3", "1 2\n3", True),
        ("1.0 2.50", "1 2.5", True),
        ("50000000000000001", "50000000000000000", False),
        ("1\n2", "1", False),
        ("YES", "yes", False),
        ("1 x", "1 y", False),
    ],
)
def test_what_was_printed_is_compared_as_livecodebench_does(printed: str, expected: str, is_same: bool) -> None:
    assert is_same_output(printed, expected) is is_same


def test_brackets_without_end_are_no_answer() -> None:
    assert not is_same_value("[" * 100_000, "[]")


def test_a_number_of_endless_signs_is_none_at_once() -> None:
    assert read_number("$" * 60_000 + "5") is None


def test_what_was_returned_is_compared_as_a_value() -> None:
    assert is_same_value("[1, 2]", "[1,2]")
    assert not is_same_value("", "[1,2]")


# ---- what is asked


def choice(**change: object) -> dict[str, object]:
    row = {"question_id": 7, "question": "Which?", "options": ["one", "two", "three"], "answer": "C"}
    return {**row, **change}


def test_a_choice_is_asked_with_its_letters() -> None:
    (question,) = BENCHMARKS["mmlu_pro"].make([choice()])
    assert (question.id, question.expected) == ("7", "C")
    prompt = fill(BENCHMARKS["mmlu_pro"].prompt, question.names)
    assert "'Answer: A/B/C'" in prompt
    assert prompt.endswith("Which?\n\nA. one\nB. two\nC. three")


@pytest.mark.parametrize(
    "change", [{"answer": "D"}, {"options": ["one"]}, {"options": ["x"] * 11}, {"question": ""}, {"options": None}]
)
def test_a_choice_that_is_none_is_refused_by_row(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="row 1"):
        BENCHMARKS["mmlu_pro"].make([choice(), choice(**change)])


def gpqa(number: int) -> dict[str, str]:
    wrong = {f"Incorrect Answer {k}": f"wrong {k} [note]" for k in (1, 2, 3)}
    return {"Record ID": f"r{number}", "Question": "Which?", "Correct Answer": "right", **wrong}


def test_the_options_of_gpqa_are_shuffled_once_and_always_alike() -> None:
    questions = BENCHMARKS["gpqa_diamond"].make([gpqa(number) for number in range(60)])
    assert questions == BENCHMARKS["gpqa_diamond"].make([gpqa(number) for number in range(60)])
    assert {question.expected for question in questions} == set(LETTERS[:4])
    for question in questions:
        assert f"{question.expected}. right" in question.names["problem"]
        assert "[note]" not in question.names["problem"]


def test_a_prompt_with_unknown_names_is_refused() -> None:
    with pytest.raises(ValueError, match="problem"):
        make_asked(BENCHMARKS["aime_2025"], "{question}", [Question("1", {"problem": "p"}, "1", "1")], 1, {}, 1)


def test_braces_of_a_problem_are_not_taken_for_names() -> None:
    (question,) = BENCHMARKS["aime_2025"].make([{"problem": "Let $a_{n}$ be {x}", "answer": 70, "id": 3}])
    assert fill(BENCHMARKS["aime_2025"].prompt, question.names).endswith("\\boxed{}.\n\nLet $a_{n}$ be {x}")
    assert question.expected == "70"
