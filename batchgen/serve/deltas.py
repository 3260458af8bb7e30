"""The text of a growing answer, piece by piece. Pure; `decode` turns token ids into text.

All pieces together are the answer: held back is what may yet turn out otherwise, that is half a character, the beginning of
a stop string or of the mark that ends the reasoning, and everything where the answer may call tools. A token costs the same
however long the answer is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from batchgen.records import Result
from batchgen.serve.growing import GrowingText
from batchgen.worker.stops import Decode


@dataclass(frozen=True, slots=True)
class Delta:
    """What came to one of a request's rows."""

    row: int
    text: str = ""
    reasoning: str = ""


class Deltas:
    """Of one row. `stop` strings end the answer; `think_end` the reasoning that it begins with, None where it has none."""

    def __init__(self, row: int, decode: Decode, think_end: str | None, stop: Sequence[str]) -> None:
        self._row, self._stop, self._think_end = row, [mark for mark in stop if mark], think_end or None
        self._growing = GrowingText(decode)
        self._held = ""  # sure characters that a mark may begin with
        self._is_stopped = False
        self._given_text: list[str] = []
        self._given_reasoning: list[str] = []

    def add(self, token_ids: Sequence[int]) -> Delta | None:
        """None: nothing that is sure."""
        new = self._growing.add(token_ids)
        if self._is_stopped:
            return None
        self._held += new
        if (end := find_first(self._held, self._stop)) is not None:
            self._held, self._is_stopped = self._held[:end], True
        reasoning = ""
        if self._think_end is not None:
            before, mark, _ = self._held[: self._count_sure()].partition(self._think_end)
            reasoning = self._take(len(before))
            if not mark:
                return self._give("", reasoning)
            self._take(len(mark))
            self._think_end = None
        return self._give(self._take(self._count_sure()), reasoning)

    def finish(self, result: Result) -> Delta | None:
        """The rest, from the whole answer."""
        text, reasoning = "".join(self._given_text), "".join(self._given_reasoning)
        whole, thought = result.text or "", result.reasoning or ""
        return self._give(
            whole[len(text) :] if whole.startswith(text) else "",
            thought[len(reasoning) :] if thought.startswith(reasoning) else "",
        )

    def _count_sure(self) -> int:
        """Of the held characters, those that are part of no mark any more, or of a whole end of reasoning."""
        if self._think_end is None:
            return len(hold_back(self._held, self._stop))
        sure = len(hold_back(self._held, [*self._stop, self._think_end]))
        place = self._held.find(self._think_end)
        # A stop string may yet begin inside the mark, and then the mark was none.
        return place if 0 <= place < sure < place + len(self._think_end) else sure

    def _take(self, num: int) -> str:
        taken, self._held = self._held[:num], self._held[num:]
        return taken

    def _give(self, text: str, reasoning: str) -> Delta | None:
        if not text and not reasoning:
            return None
        self._given_text.append(text)
        self._given_reasoning.append(reasoning)
        return Delta(self._row, text, reasoning)


def find_first(text: str, marks: Sequence[str]) -> int | None:
    """Where the first of the marks begins."""
    return min((place for mark in marks if (place := text.find(mark)) >= 0), default=None)


def hold_back(text: str, marks: Sequence[str]) -> str:
    """The text without an end that one of the marks may begin with."""
    held = max((size for mark in marks for size in range(1, len(mark)) if text.endswith(mark[:size])), default=0)
    return text[: len(text) - held]
