"""The final answer in a generated text, by the rules of each benchmark's reference. Pure.

None means that the text holds no answer that the rules find: it is counted as that, and never as right. Thinking is no
part of the text here: the job cut it off, and a thinking that never ended leaves an empty text. Rules of NVIDIA's
NeMo-Skills (`evaluation/math_grader.py`, `evaluation/evaluator/mcq.py` with its tests, `evaluation/evaluator/code.py`,
`inference/eval/scicode_utils.py`), which NVIDIA's own evaluation recipes name.
"""

import re

# "Answer: B", bold or not, as Artificial Analysis describes it.
_ANSWER_LINE = re.compile(r"(?i)[*_]{0,2}Answer[*_]{0,2}\s*:[\s*_]{0,2}\s*([A-Z])(?![a-zA-Z0-9])")
_LONE_LETTER = re.compile(r"\b[A-Z]\b")
_FENCE = "```"
_BOXED = "\\boxed{"


def extract_boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds; None where there is none or it never closes."""
    start = text.rfind("\\boxed")
    if start < 0 or not text.startswith(_BOXED, start):
        return None
    depth = 0
    for place in range(start + len(_BOXED) - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len(_BOXED) : place].strip() or None
    return None


def extract_letter(text: str) -> str | None:
    """The chosen option: a boxed letter; else the last line "Answer: X"; else the last capital that stands alone in the
    box. In that order, because a box may hold a formula of the argument."""
    boxed = extract_boxed(text)
    if boxed is not None and len(boxed) == 1:
        return boxed.upper()
    if lines := _ANSWER_LINE.findall(text):
        return str(lines[-1]).upper()
    letters = _LONE_LETTER.findall(boxed or "")
    return letters[-1] if letters else None


def extract_exact(text: str) -> str | None:
    """All of it."""
    return text.strip() or None


def extract_program(text: str) -> str | None:
    """The last ```python block that is closed; the last block of any kind where none is called Python."""
    text = text.replace("\r", "")
    start = text.rfind(f"{_FENCE}python")
    length = len(f"{_FENCE}python")
    if start < 0:
        closing = text.rfind(_FENCE)
        start, length = text.rfind(_FENCE, 0, max(closing, 0)), len(_FENCE)
    if start < 0:
        return None
    body, fence, _ = text[start + length :].partition(_FENCE)
    return (body.strip("\n") or None) if fence else None


def extract_step(text: str) -> str | None:
    """A step of SciCode: the first ```python block, else the first block, else all; without import lines, for the
    problem's own come before it."""
    fence = f"{_FENCE}python" if f"{_FENCE}python" in text else _FENCE
    _, mark, rest = text.partition(fence)
    body = rest.partition(_FENCE)[0] if mark else text
    return "\n".join(line for line in body.split("\n") if not _is_import(line)) if body.strip() else None


def _is_import(line: str) -> bool:
    """Line by line: one pattern over all of it takes the square of 60,000 blank lines, which a model may well write."""
    plain = line.lstrip()
    return plain.startswith("import ") or (plain.startswith("from ") and "import" in plain.split()[2:])


def extract_gold_number(text: str) -> str:
    """What stands behind the last '####' of GSM8K's worked solutions, without commas. Raises ValueError."""
    _, mark, number = text.rpartition("####")
    if not mark or not number.strip():
        raise ValueError("has no '#### number' at its end")
    return number.strip().replace(",", "")
