"""What a virtual worker is made of, and which of the policies it has."""

from dataclasses import dataclass

from batchgen.simulate.engine import EngineModel
from batchgen.worker.budget import Ladder

ONE_SHOT = Ladder()


@dataclass(frozen=True, slots=True)
class Policies:
    """Which of the policies a run has, as values. `ladder` without rungs: one shot. `trusts_hints`: rows' expectations are
    their own, so that budgets follow them. `can_move`: rows that an engine has begun go on elsewhere."""

    is_ordered: bool = True
    has_placement: bool = False
    ladder: Ladder = ONE_SHOT
    trusts_hints: bool = False
    can_move: bool = True


@dataclass(frozen=True, slots=True)
class WorkerModel:
    """All that a virtual worker is made of. `window` in requests; `num_requests`: as in `WorkerSetup`."""

    engine: EngineModel
    policies: Policies
    window: int
    num_gpus: float = 8.0
    n: int = 1
    max_prompt_tokens: int | None = None
    commit_s: float = 2.0
    journal_interval_s: float = 30.0
    num_requests: int | None = None
