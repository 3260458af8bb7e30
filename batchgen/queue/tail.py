"""Who gives rows to whom when nothing waits to be leased any more. Pure: loads in, splits out.

At the end of a run some workers have requests that they could not even send yet, and others run dry. Each of these gets
requests of the one that would take longest to send its own: half of what would bring both to the mean of all loads, so
that a wrong guess of lengths is mended by the next share, but a window at least. What an engine has begun is `begun`'s.
Nothing is moved that its owner would have sent soon anyway, for a share costs an object written and read, and the row
read and tokenised again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TailPolicy:
    """`min_gain_s`: an owner that sends all it has within this time gives nothing, nor does one whose window is less full
    than `full_share`: it sends all it has as fast as it reads. `ahead_share`: a helper has no more to send than this part
    of its window. `release_after_s`: an idle worker above the least number is let go after it. `look_s`: how often loads
    are looked at, about as often as heartbeats change them.

    Of begun rows (`begun`): they are moved for a gain of `min_move_gain_s`, and then not for `settle_s`. A row has
    `left_share` x the mean answer to go (those that are long are left at an end), and takes `move_s` and a prefill of
    `prompt_tokens` and a mean answer to be moved; a token costs `prefill_share` of a decoded one in a full engine.
    `trial_share`: of an engine's rows, to see what moving them does."""

    min_gain_s: float = 2.0
    full_share: float = 0.8
    ahead_share: float = 0.25
    release_after_s: float = 30.0
    look_s: float = 1.0
    min_move_gain_s: float = 5.0
    settle_s: float = 5.0
    left_share: float = 2.0
    move_s: float = 3.0
    prompt_tokens: float = 1000.0
    prefill_share: float = 0.25
    trial_share: float = 0.125


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """Requests of one worker. `leases`: (batch_id, requests not sent yet) of its own shards that may be split; `begun`:
    (batch_id, requests in flight) of those whose rows another engine can go on with. `requests_per_s`: what it has finished
    since it joined; None before the first."""

    worker_id: str
    window: int
    num_inflight: int
    num_unsent: int
    leases: tuple[tuple[str, int], ...]
    requests_per_s: float | None = None
    begun: tuple[tuple[str, int], ...] = ()

    @property
    def load(self) -> int:
        return self.num_inflight + self.num_unsent


@dataclass(frozen=True, slots=True)
class Split:
    owner_id: str
    batch_id: str
    helper_id: str
    num_requests: int
    is_begun: bool = False


def choose_splits(workers: Sequence[WorkerLoad], policy: TailPolicy) -> list[Split]:
    """At most one for each helper; those with the least to do first."""
    helpers = sorted((w for w in workers if _runs_dry(w, policy)), key=lambda w: (w.load, w.worker_id))
    unsent = {(w.worker_id, batch_id): num for w in workers for batch_id, num in w.leases}
    loads = {w.worker_id: w.load for w in workers}
    level = sum(loads.values()) / max(1, len(loads))
    full = [w for w in workers if _is_full(w, policy)]
    splits: list[Split] = []
    for helper in helpers:
        owners = [w for w in full if w.worker_id != helper.worker_id and loads[w.worker_id] > level]
        split = _take_from_slowest(helper, owners, unsent, loads, level, policy)
        if split is None:
            return splits
        unsent[split.owner_id, split.batch_id] -= split.num_requests
        loads[split.owner_id] -= split.num_requests
        splits.append(split)
    return splits


def _runs_dry(worker: WorkerLoad, policy: TailPolicy) -> bool:
    return worker.num_unsent <= policy.ahead_share * worker.window


def _is_full(worker: WorkerLoad, policy: TailPolicy) -> bool:
    return worker.num_inflight >= policy.full_share * worker.window


def _take_from_slowest(
    helper: WorkerLoad,
    owners: Sequence[WorkerLoad],
    unsent: dict[tuple[str, str], int],
    loads: dict[str, int],
    level: float,
    policy: TailPolicy,
) -> Split | None:
    waits = [(_wait_s(w, unsent), w) for w in owners]
    wait_s, owner = max(waits, key=lambda pair: (pair[0], pair[1].worker_id), default=(0.0, None))
    if owner is None or wait_s <= policy.min_gain_s:
        return None
    batch_id = max((batch_id for batch_id, _ in owner.leases), key=lambda b: (unsent[owner.worker_id, b], b))
    room = min(level - helper.load, loads[owner.worker_id] - level)
    num_requests = min(unsent[owner.worker_id, batch_id], math.ceil(min(room, max(room / 2, helper.window))))
    return Split(owner.worker_id, batch_id, helper.worker_id, num_requests) if num_requests > 0 else None


def _wait_s(owner: WorkerLoad, unsent: dict[tuple[str, str], int]) -> float:
    """Until the last request that it may give is sent, at its own pace; of one that finished none yet, for ever."""
    left = sum(unsent[owner.worker_id, batch_id] for batch_id, _ in owner.leases)
    if left == 0 or owner.requests_per_s is None:
        return float("inf") if left else 0.0
    return left / owner.requests_per_s
