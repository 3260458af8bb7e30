"""The text of a growing answer, piece by piece. Pure; `decode` turns token ids into text.

All pieces together are the answer: held back is what may yet turn out otherwise, that is half a character, the beginning of
a stop string or of the mark that ends the reasoning, and everything where the answer may call tools.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from batchgen.records import Result
from batchgen.worker.stops import CUT_CHARACTER, Decode

# (text, reasoning) of an answer so far.
Split = Callable[[str], tuple[str, str | None]]


@dataclass(frozen=True, slots=True)
class Delta:
    """What came to one of a request's rows."""

    row: int
    text: str = ""
    reasoning: str = ""


class Deltas:
    """Of one row. `marks`: strings whose beginning is held back; `stop` of them end the answer."""

    def __init__(self, row: int, decode: Decode, split: Split, marks: Sequence[str], stop: Sequence[str]) -> None:
        self._row, self._decode, self._split = row, decode, split
        self._marks, self._stop = marks, stop
        self._ids: list[int] = []
        self._text = self._reasoning = ""

    def add(self, token_ids: Sequence[int]) -> Delta | None:
        """None: nothing that is sure."""
        self._ids += token_ids
        text = self._decode(self._ids).rstrip(CUT_CHARACTER)
        for mark in self._stop:
            text = text.partition(mark)[0]
        return self._advance(*self._split(hold_back(text, self._marks)))

    def finish(self, result: Result) -> Delta | None:
        """The rest, from the whole answer."""
        return self._advance(result.text or "", result.reasoning)

    def _advance(self, text: str, reasoning: str | None) -> Delta | None:
        more = text[len(self._text) :] if text.startswith(self._text) else ""
        thought = reasoning or ""
        more_thought = thought[len(self._reasoning) :] if thought.startswith(self._reasoning) else ""
        self._text, self._reasoning = self._text + more, self._reasoning + more_thought
        return Delta(self._row, more, more_thought) if more or more_thought else None


def hold_back(text: str, marks: Sequence[str]) -> str:
    """The text without an end that one of the marks may begin with."""
    held = max((size for mark in marks for size in range(1, len(mark)) if text.endswith(mark[:size])), default=0)
    return text[: len(text) - held]
