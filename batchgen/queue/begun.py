"""Rows that an engine has begun, moved to one that has less to do: when that pays. Pure: loads in, splits out.

An engine that decodes few rows is faster a row than one that decodes many, so at the end of a run rows of the fullest may
go on at the emptiest: what they have so far travels with them and is prefilled there again. That pays where an engine's
pace depends on how many rows it has, and where engines differ in that: those that came up late, or anew after a loss, or
wait for rows inside a full engine. Engines that began together drain together, and there nothing is moved.

How pace depends on rows is seen in this run (`PaceCurve`), not known; until it has been seen with different numbers of
rows, a small share of them moves to an idle engine, which shows it. An engine whose pace is always the same keeps its rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from batchgen.queue.tail import Split, TailPolicy, WorkerLoad

# A sample's weight in the mean of its bin; bins are half an octave of rows wide.
NEW_SHARE = 0.2
BINS_PER_OCTAVE = 2
# The numbers of rows that were seen must differ by this factor before a line through them says anything.
MIN_SPREAD = 1.5


@dataclass(slots=True)
class PaceCurve:
    """Seconds that each of an engine's requests takes for a token, by how many it has in flight: a line through the means
    of what was seen. What waits inside the engine counts as in flight, and makes its pace the slower."""

    _bins: dict[int, tuple[float, float]] = field(default_factory=dict)

    def note(self, num_rows: float, pace_s: float) -> None:
        place = round(BINS_PER_OCTAVE * math.log2(max(1.0, num_rows)))
        rows, pace = self._bins.get(place, (num_rows, pace_s))
        self._bins[place] = rows + NEW_SHARE * (num_rows - rows), pace + NEW_SHARE * (pace_s - pace)

    def find_slope(self) -> float | None:
        """Seconds a token that one more request costs each other one; None until it has shown."""
        seen = list(self._bins.values())
        rows = [each for each, _ in seen]
        if not rows or max(rows) < MIN_SPREAD * max(1.0, min(rows)):
            return None
        mean_rows, mean_pace = sum(rows) / len(seen), sum(pace for _, pace in seen) / len(seen)
        together = sum((each - mean_rows) * (pace - mean_pace) for each, pace in seen)
        return max(0.0, together / sum((each - mean_rows) ** 2 for each in rows))

    def estimate(self, num_rows: float) -> float | None:
        """Pace with so many, from the bin that is nearest."""
        if not self._bins:
            return None
        rows, pace = min(self._bins.values(), key=lambda seen: abs(seen[0] - num_rows))
        return pace + (self.find_slope() or 0.0) * (num_rows - rows)


def choose_moves(
    workers: Sequence[WorkerLoad], curve: PaceCurve, mean_tokens: float | None, policy: TailPolicy
) -> list[Split]:
    """The emptiest gets half of what the fullest has more, and so on inwards. `mean_tokens`: of a finished request; None
    before the first. Nothing while anybody has requests that were not sent: those cost less to move."""
    if mean_tokens is None or any(worker.num_unsent for worker in workers):
        return []
    ordered = sorted(workers, key=lambda worker: (worker.num_inflight, worker.worker_id))
    splits: list[Split] = []
    for helper, owner in zip(ordered, reversed(ordered), strict=True):
        num = _choose_num(owner, helper, curve, mean_tokens, policy)
        if num == 0:
            return splits
        splits += _take(owner, helper, num)
    return splits


def _choose_num(owner: WorkerLoad, helper: WorkerLoad, curve: PaceCurve, mean_tokens: float, policy: TailPolicy) -> int:
    num = min((owner.num_inflight - helper.num_inflight) // 2, sum(count for _, count in owner.begun))
    slope = curve.find_slope()
    if slope is None:
        is_trial = helper.num_inflight == 0 and owner.num_inflight > 1
        return min(num, math.ceil(policy.trial_share * owner.num_inflight)) if is_trial else 0
    return num if num > 0 and _gain_s(owner, num, curve, mean_tokens, policy) >= policy.min_move_gain_s else 0


def _gain_s(owner: WorkerLoad, num: int, curve: PaceCurve, mean_tokens: float, policy: TailPolicy) -> float:
    """Time that the rows left behind save, less what the moved ones need to come to where they were."""
    slope, pace = curve.find_slope() or 0.0, curve.estimate(owner.num_inflight) or 0.0
    saved = policy.left_share * mean_tokens * slope * num
    token_s = policy.prefill_share * pace / owner.num_inflight
    return saved - policy.move_s - num * (policy.prompt_tokens + mean_tokens) * token_s


def _take(owner: WorkerLoad, helper: WorkerLoad, num: int) -> list[Split]:
    """From the owner's batches with the most in flight."""
    splits = []
    for batch_id, count in sorted(owner.begun, key=lambda lease: (-lease[1], lease[0])):
        taken = min(num, count)
        if taken > 0:
            splits.append(Split(owner.worker_id, batch_id, helper.worker_id, taken, is_begun=True))
            num -= taken
    return splits
