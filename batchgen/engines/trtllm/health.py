"""Is the engine well, and what is to be done if not? Pure: time is an argument (monotonic seconds).

`Health` judges one start of the engine by what its process says and by what it does not say. The vendor's own word is
worth little: a dead rank leaves waiters hanging, and its liveness answer stays true meanwhile. So what counts is tokens,
and answers: a request that was given up is no sign of life, or a hang would hide behind those whose time is over.
`History` is what is remembered from one start to the next: restarts that helped nobody. Which row an engine dies of is
not found here (`suspects`).
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from batchgen.specs.tensorrt_llm import TensorRTLLMEngineSpec

# Answers that the share of empty ones is taken of, and how many of these make a share at all.
SHARE_ANSWERS = 500
MIN_SHARE_EMPTY = 8
# A look that comes this much later than the one before: this process stood still, not the engine.
MAX_LOOK_GAP_S = 30.0
# Empty answers and failures that starting anew does not mend are the model's own, or the rows'. It did mend them, if so
# many rows were finished since.
MAX_ANSWER_RECYCLES = 3
MENDED_ANSWERS = 10_000
# A rank whose CUDA context is broken fails all it has, goes on, calls itself healthy, and gets ever more because it is
# never busy: left alone it turns a whole job into error rows. One failure takes a rank's requests, which are at most half
# of those that are looked at; more than that is no single accident.
FAILURE_BATCHES, MIN_FAILURE_ANSWERS = 2, 16
MAX_FAILED_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class Kill:
    """End it now; what is in flight is lost."""

    reason: str


@dataclass(frozen=True, slots=True)
class Recycle:
    """Take nothing new, let it finish, start it anew."""

    reason: str
    is_for_answers: bool = False


@dataclass(slots=True)
class Health:
    """One start of the engine, which began at `created_at`. Requests are known by their numbers."""

    section: TensorRTLLMEngineSpec
    created_at: float
    is_up: bool = False
    is_healthy: bool = True
    total_tokens: int = 0
    progress_at: float = 0.0
    ended_at: float = 0.0
    looked_at: float = 0.0
    first_rss_bytes: int | None = None
    rss_bytes: int = 0
    waited_s: float = 0.0  # in vain, when the last one in flight was given up
    deadlines: dict[int, float] = field(default_factory=dict)
    empty_in_a_row: set[Hashable] = field(default_factory=set)
    was_empty: deque[bool] = field(default_factory=lambda: deque(maxlen=SHARE_ANSWERS))
    has_failed: deque[bool] = field(init=False)

    def __post_init__(self) -> None:
        num_answers = max(MIN_FAILURE_ANSWERS, FAILURE_BATCHES * self.section.max_batch_size)
        self.has_failed = deque(maxlen=num_answers)

    # ---- what happened

    def note_up(self, now: float) -> None:
        """It has started, and takes requests."""
        self.is_up, self.progress_at, self.ended_at = True, now, now

    def note_beat(self, now: float, *, total_tokens: int, rss_bytes: int, is_healthy: bool) -> None:
        if total_tokens > self.total_tokens:
            self.total_tokens = total_tokens
            self._note_progress(now)
        self.is_healthy, self.rss_bytes = is_healthy, rss_bytes
        if self.is_up and self.first_rss_bytes is None and rss_bytes > 0:
            self.first_rss_bytes = rss_bytes

    def note_sent(self, now: float, number: int, max_tokens: int) -> None:
        if not self.deadlines:  # an idle engine makes no progress
            self.progress_at = now - self.waited_s
        section = self.section
        self.deadlines[number] = now + section.request_base_s + max_tokens / section.min_tokens_per_s

    def note_ended(self, now: float, number: int) -> None:
        """Answered or failed, by the engine."""
        if self.deadlines.pop(number, None) is not None:
            self.ended_at = now
            self._note_progress(now)

    def note_given_up(self, now: float, number: int) -> None:
        """Nobody waits for it any more."""
        if self.deadlines.pop(number, None) is not None and not self.deadlines:
            self.ended_at, self.waited_s = now, now - self.progress_at

    def _note_progress(self, now: float) -> None:
        self.progress_at, self.waited_s = now, 0.0

    def note_failure(self) -> None:
        """The engine failed a request, through no fault of the row."""
        self.has_failed.append(True)

    def note_answer(self, row: Hashable, *, is_empty: bool) -> None:
        """Of one row, or a canary."""
        self.was_empty.append(is_empty)
        self.has_failed.append(False)
        if is_empty:
            self.empty_in_a_row.add(row)
        else:
            self.empty_in_a_row.clear()

    # ---- what follows from it

    def judge(self, now: float) -> Kill | Recycle | None:
        """What is to be done now; None: nothing."""
        if now - self.looked_at > MAX_LOOK_GAP_S:
            self.progress_at = max(self.progress_at, now)
        self.looked_at = now
        section = self.section
        if not self.is_up and now - self.created_at > section.start_timeout_s:
            return Kill(f"it was not up after {section.start_timeout_s:g} s (engine.start_timeout_s)")
        if not self.is_up:
            return None
        if not self.is_healthy:
            return Kill("TensorRT-LLM says that it is shut down")
        if self.deadlines and now - self.progress_at > section.no_progress_s:
            waiting = f"with {len(self.deadlines)} requests in flight"
            return Kill(f"it made no token for {section.no_progress_s:g} s {waiting} (engine.no_progress_s)")
        return self._judge_wear()

    def is_canary_due(self, now: float) -> bool:
        """Is it idle, and was it for so long that nothing says whether it still works?"""
        return self.is_up and not self.deadlines and now - self.ended_at >= self.section.canary_interval_s

    def list_overdue(self, now: float) -> list[int]:
        """Requests that have had their time."""
        return [number for number, deadline in self.deadlines.items() if deadline < now]

    def _judge_wear(self) -> Recycle | None:
        section, first = self.section, self.first_rss_bytes
        grown_gib = 0.0 if first is None else (self.rss_bytes - first) / 2**30
        if grown_gib > section.max_rss_growth_gib:
            return Recycle(f"its host memory grew by {grown_gib:.1f} GiB (engine.max_rss_growth_gib)")
        num_empty = sum(self.was_empty)
        if len(self.empty_in_a_row) >= section.max_empty_in_a_row:
            return Recycle(f"{len(self.empty_in_a_row)} rows in a row got an empty answer", is_for_answers=True)
        is_full = len(self.was_empty) == SHARE_ANSWERS
        if is_full and num_empty >= max(MIN_SHARE_EMPTY, section.max_empty_share * SHARE_ANSWERS):
            return Recycle(f"{num_empty} of the last {SHARE_ANSWERS} answers were empty", is_for_answers=True)
        return self._judge_failures()

    def _judge_failures(self) -> Recycle | None:
        num_failed, num_answers = sum(self.has_failed), len(self.has_failed)
        if num_answers == self.has_failed.maxlen and num_failed >= MAX_FAILED_SHARE * num_answers:
            return Recycle(f"it failed {num_failed} of the last {num_answers} requests", is_for_answers=True)
        return None


@dataclass(slots=True)
class History:
    """See the module."""

    max_restarts: int
    num_restarts: int = 0
    _num_answer_recycles: int = 0
    _num_finished: int = 0

    def note_finished(self) -> None:
        self.num_restarts = 0
        self._num_finished += 1

    def note_recycle(self, recycle: Recycle) -> None:
        if recycle.is_for_answers:
            self._num_answer_recycles = 1 + (0 if self._is_mended else self._num_answer_recycles)
            self._num_finished = 0

    def can_recycle(self, recycle: Recycle) -> bool:
        return not recycle.is_for_answers or self._is_mended or self._num_answer_recycles < MAX_ANSWER_RECYCLES

    @property
    def _is_mended(self) -> bool:
        return self._num_finished >= MENDED_ANSWERS

    def may_restart(self) -> bool:
        """Counts the restart where it may be."""
        if self.num_restarts >= self.max_restarts:
            return False
        self.num_restarts += 1
        return True
