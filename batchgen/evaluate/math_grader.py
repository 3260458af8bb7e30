"""Are two mathematical answers the same? Plain numbers are compared here; all else by math-verify, in a process of its own.

An answer may be any formula, and `9^{9^{9}}` keeps sympy busy where no alarm reaches it: whoever does not answer in time is
killed, and the answer counts as not the same.
"""

import multiprocessing
import re
from decimal import Decimal
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from batchgen.errors import SpecError

PATIENCE_S = 20.0
# No benchmark's number is nearly as long, and stripping what stands around it costs the square of that.
MAX_NUMBER_CHARS = 1000
_NUMBER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?|[+-]?\.\d+")
# What stands around a number and does not change it.
_AROUND = re.compile(r"^\\?\$|\\?\$$|\\?%$|[.\\]+$")


def read_number(text: str) -> Decimal | None:
    """None for what is no plain decimal number."""
    plain = text.strip()
    if len(plain) > MAX_NUMBER_CHARS:
        return None
    while (shorter := _AROUND.sub("", plain).strip()) != plain:
        plain = shorter
    return Decimal(plain.replace(",", "")) if _NUMBER.fullmatch(plain) else None


def check_installed() -> None:
    """Raises SpecError. Before anything is generated: the process starts when the first formula is met, hours later."""
    if find_spec("math_verify") is None:
        raise SpecError("benchmark: scoring mathematics needs math-verify; pip install 'batchgen[evaluate]'")


def answer_questions(connection: Any) -> None:
    """The process: pairs of answers in, booleans out, until the other end closes."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs the answers
    while True:
        try:
            texts = connection.recv()
        except EOFError:
            return
        gold, answer = (text if "$" in text else f"${text}$" for text in texts)
        connection.send(bool(verify(*(parse(text, [LatexExtractionConfig()]) for text in (gold, answer)))))


class MathGrader:
    """Use as a context manager; the process starts when it is first needed."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._process: Any = None
        self._connection: Any = None

    def __enter__(self) -> "MathGrader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def is_same(self, gold: str, answer: str) -> bool:
        if gold.strip() == answer.strip():
            return True
        numbers = read_number(gold), read_number(answer)
        if None not in numbers:
            return numbers[0] == numbers[1]
        if self._process is None:
            self._start()
        try:
            self._connection.send((gold, answer))
            if self._connection.poll(self._patience_s):
                return bool(self._connection.recv())
        except (EOFError, OSError):  # it died, of memory most likely
            pass
        self._stop()
        return False

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=answer_questions, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        # Importing sympy takes seconds, and is nobody's answer: the first question is our own.
        self._connection.send(("1", "\\frac{2}{2}"))
        try:
            is_ready = self._connection.poll(120.0) and self._connection.recv()
        except (EOFError, OSError):
            is_ready = False
        if not is_ready:
            self._stop()
            raise SpecError("math-verify can't be used here; pip install 'batchgen[evaluate]'")

    def _stop(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = None
