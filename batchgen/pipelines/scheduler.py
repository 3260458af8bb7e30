"""Keeps any number of pipelines going, for ever: `batchgen schedule`.

Holds nothing that the store doesn't have. What doesn't answer (a store, a Ray head) is asked again with growing pauses,
each pipeline by itself, and said once. A clock that jumps ahead is not believed at once: nothing is begun for a while, so
that a wrong time that is put right again begins no run.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from batchgen.errors import BatchgenError
from batchgen.pipelines.keeper import Keeper

TICK_S = 5.0
MAX_PAUSE_S = 60.0
JUMP_S, SETTLE_S = 120.0, 300.0


@dataclass(slots=True)
class Clock:
    """The time of day, as far as it can be believed. Pure: both clocks are read by the caller."""

    last: tuple[float, float] | None = None
    hold_until: float = 0.0

    def is_sound(self, now: float, monotonic: float) -> bool:
        """False for `SETTLE_S` after it went ahead by more than time went by. A suspended machine does that, too."""
        if self.last is not None:
            ahead_s = (now - self.last[0]) - (monotonic - self.last[1])
            if ahead_s > JUMP_S:
                self.hold_until = monotonic + SETTLE_S
            elif ahead_s < -JUMP_S:
                self.hold_until = 0.0
        self.last = (now, monotonic)
        return monotonic >= self.hold_until


@dataclass(slots=True)
class _Patience:
    """With one pipeline's store and submitter."""

    pause_s: float = 0.0
    next_at: float = 0.0
    said: str = ""

    def note_failure(self, monotonic: float, message: str) -> bool:
        """Is it news?"""
        self.pause_s = min(MAX_PAUSE_S, max(TICK_S, 2 * self.pause_s))
        self.next_at = monotonic + self.pause_s
        is_news, self.said = message != self.said, message
        return is_news

    def note_success(self) -> bool:
        """Did it fail before?"""
        was_failing, self.said, self.pause_s, self.next_at = bool(self.said), "", 0.0, 0.0
        return was_failing


@dataclass(slots=True)
class Scheduler:
    """Belongs to one thread."""

    keepers: Sequence[Keeper]
    say: Callable[[str], None]
    warn: Callable[[str], None]
    clock: Clock = field(default_factory=Clock)
    _patience: dict[int, _Patience] = field(default_factory=dict)

    def tick(self, now: float, monotonic: float) -> None:
        """One look at each pipeline whose turn it is. `now`: Unix seconds."""
        was_sound = monotonic >= self.clock.hold_until
        if not self.clock.is_sound(now, monotonic):
            if was_sound:
                self.warn(f"the clock went ahead at once; nothing is begun for {SETTLE_S:.0f} s, in case it goes back")
            return
        for number, keeper in enumerate(self.keepers):
            patience = self._patience.setdefault(number, _Patience())
            if monotonic >= patience.next_at:
                self._keep(keeper, patience, now, monotonic)

    def _keep(self, keeper: Keeper, patience: _Patience, now: float, monotonic: float) -> None:
        try:
            keeper.keep(now)
        except BatchgenError as error:  # one pipeline's trouble is no other's
            if patience.note_failure(monotonic, str(error)):
                self.warn(f"{keeper.spec.name}: {error}; trying again")
        else:
            if patience.note_success():
                self.say(f"{keeper.spec.name}: all answers again")

    def run(self, check: Callable[[], None], is_over: Callable[[], bool], tick_s: float = TICK_S) -> None:
        """Until `check` raises, or it is over. Runs under way go on without us."""
        while not is_over():
            check()
            self.tick(time.time(), time.monotonic())
            time.sleep(tick_s)
