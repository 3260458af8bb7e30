"""Text of a growing list of tokens, at a price a token that does not depend on how many there are. Pure.

A token's text depends on its neighbours (half a character, a space that the first one lacks), so the last few are decoded
again with each new one, and no others. Held back is what may be half a character.
"""

from collections.abc import Sequence

from batchgen.worker.stops import CUT_CHARACTER, Decode

# An answer that never ends in a whole character, as one of nothing but broken bytes, moves on after so many tokens.
MAX_WINDOW = 64
# What of its end may be half a character: four bytes at most, of which three can be there.
MAX_CUT = 3


class GrowingText:
    """`decode` turns token ids into text."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        # The last tokens, of which `_num_before` came with an earlier call, and how much of their text was given out.
        self._window: list[int] = []
        self._num_before = self._num_given = 0

    def add(self, token_ids: Sequence[int]) -> str:
        """What these tokens make sure."""
        self._window += token_ids
        text = self._decode(self._window)
        sure = text.rstrip(CUT_CHARACTER)
        is_whole = len(sure) == len(text)
        if not is_whole and len(self._window) > MAX_WINDOW:
            sure, is_whole = text[: max(len(sure), len(text) - MAX_CUT)], True
        new = sure[self._num_given :]
        self._num_given = max(self._num_given, len(sure))
        if is_whole:
            self._move(len(text) - len(sure))
        return new

    def _move(self, num_held: int) -> None:
        """Only the newest tokens stay, as context of the next; those that show as nothing are none. `num_held`: characters
        at the end not given out."""
        newest = self._window[self._num_before :][-MAX_WINDOW // 2 :]
        text = self._decode(newest)
        if text or len(self._window) > MAX_WINDOW:
            self._window, self._num_before, self._num_given = newest, len(newest), max(0, len(text) - num_held)
