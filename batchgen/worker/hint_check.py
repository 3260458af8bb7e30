"""Do the length hints of a job say anything? Pure.

Rows go longest expected first while the answers that come back bear the hints out, and in input order while they don't:
so hints that are noise, or the wrong way round, cost next to nothing over having none. A worker with many rows before it
lets the hints prove themselves first: what matters there is which rows come last, and another order of the first few
hundred moves the end by up to a fortieth, either way. Where there are few, the proof would come too late, and hints are
believed until the answers speak against them. What is watched is the correlation
of the logarithms of expected and actual length, for lengths are spread over orders of magnitude; older answers count
less, so that hints which are good for one file and noise in the next are followed for the one only.
"""

import math

from batchgen.lengths import must_prove

# Of fewer answers nothing is said.
MIN_ANSWERS = 64
# Correlation below which they are noise: of 64 answers it is above this in one of 40 cases where there is none at all.
MIN_CORRELATION = 0.25
# An answer counts half once so many more have come.
HALF_LIFE = 1000


class HintCheck:
    """`note` an answer, ask `are_useful`. `num_requests`: how many one worker can expect of the run, None where nobody
    knows; `window`: how many it has in flight."""

    def __init__(self, num_requests: int | None = None, window: int = 1) -> None:
        self._are_believed = num_requests is None or not must_prove(num_requests, window)
        self._decay = 0.5 ** (1 / HALF_LIFE)
        self._weight, self._x, self._y, self._xx, self._yy, self._xy = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        self._num_answers = 0

    def note(self, expected_tokens: float, tokens: int) -> None:
        x, y, decay = math.log1p(max(0.0, expected_tokens)), math.log1p(tokens), self._decay
        self._num_answers += 1
        self._weight = self._weight * decay + 1.0
        self._x, self._y = self._x * decay + x, self._y * decay + y
        self._xx, self._yy, self._xy = self._xx * decay + x * x, self._yy * decay + y * y, self._xy * decay + x * y

    @property
    def are_useful(self) -> bool:
        return self._are_believed if (found := self.verdict) is None else found

    @property
    def verdict(self) -> bool | None:
        """What the answers say; None while there are too few."""
        return None if self._num_answers < MIN_ANSWERS else self._correlate() >= MIN_CORRELATION

    def _correlate(self) -> float:
        """0 where answers are all of one length; 1 where what was expected of them was: that says nothing against it."""
        n = self._weight
        expected, actual = n * self._xx - self._x**2, n * self._yy - self._y**2
        if expected <= 1e-9 * n * n:
            return 1.0
        spread = expected * actual
        return (n * self._xy - self._x * self._y) / math.sqrt(spread) if spread > 1e-9 else 0.0
