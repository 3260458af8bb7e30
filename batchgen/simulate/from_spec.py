"""A virtual run of a job: its spec, what is known of its lengths, and the surroundings that somebody states.

Only what has a model can be simulated: `tensorrt_llm` (DeepSeek-V3.2 in NVFP4 on 8 x B200, see `calibration`) and
`simulated` (slots at a fixed rate; its prefill is left out). Anything else is refused, for a figure without a model would
be made up. Raises SpecError and InputError with what to change.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from batchgen.errors import SpecError
from batchgen.plan import choose_rows_per_shard
from batchgen.queue.tail import TailPolicy
from batchgen.simulate.calibration import make_v32_engine
from batchgen.simulate.engine import EngineModel
from batchgen.simulate.policies import ONE_SHOT, Policies, WorkerModel
from batchgen.simulate.record import ClusterModel, Surroundings
from batchgen.simulate.scenario import Scenario
from batchgen.simulate.step_cost import StepCost
from batchgen.simulate.workload import Lengths, Workload
from batchgen.spec import JobSpec
from batchgen.specs.engine import SimulatedEngineSpec
from batchgen.specs.tensorrt_llm import TensorRTLLMEngineSpec
from batchgen.worker.budget import MAX_LENGTHS, EngineCost, Ladder, choose_ladder, make_ladder

# Of a continued prompt, while its blocks stay: what the production ladder counts on, too.
REUSE_SHARE = 0.9
# NVIDIA's recipes, and ours: a rank's prefill waits for the others' so many steps.
BALANCE_STEPS = 60


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line adds to the spec. `began_at`: when the run would begin (Unix
    seconds): the spec's deadline is compared with it. `is_hinted`: rows have hints (exact ones); None: as the spec says."""

    num_rows: int
    surroundings: Surroundings
    num_engines: int | None = None
    began_at: float = 0.0
    is_hinted: bool | None = None


def make_engine(spec: JobSpec) -> EngineModel:
    engine = spec.engine
    if isinstance(engine, SimulatedEngineSpec):
        cost = StepCost(1 / engine.decode_tokens_per_s)
        return EngineModel(cost, num_ranks=1, max_batch_size=engine.slots, balance_steps=0)
    if not isinstance(engine, TensorRTLLMEngineSpec):
        raise SpecError(
            f"engine.kind: '{engine.kind}' has no model to simulate; give tensorrt_llm or simulated "
            "(--set engine.kind=simulated with its slots and rates)"
        )
    _check_modelled(engine)
    return make_v32_engine(
        max_batch_size=engine.max_batch_size,
        max_num_tokens=engine.max_num_tokens,
        kv_fraction=engine.kv_cache_free_fraction,
        balance_steps=BALANCE_STEPS if engine.attention_dp_balance else 0,
        reuses_blocks=engine.enable_block_reuse != "off",
    )


def _check_modelled(engine: TensorRTLLMEngineSpec) -> None:
    wanted = {
        "tensor_parallel_size": 8,
        "enable_attention_dp": True,
        "scheduler_policy": "GUARANTEED_NO_EVICT",
        "kv_cache_dtype": "fp8",
    }
    for name, value in wanted.items():
        if getattr(engine, name) != value:
            mend = f"simulate with --set engine.{name}={value}"
            raise SpecError(f"engine.{name}: {getattr(engine, name)} has no model; {mend}")


def choose_job_ladder(spec: JobSpec, model: EngineModel, lengths: Lengths) -> Ladder:
    """As `engine.token_budget` says; auto: what the production code chooses for these lengths."""
    budget: int | str = getattr(spec.engine, "token_budget", "off")
    if budget == "off":
        return ONE_SHOT
    if isinstance(budget, int):
        return make_ladder(budget, spec.sampling.max_tokens)
    reuse_share = REUSE_SHARE if model.reuses_blocks else 0.0
    cost = EngineCost(max_rows=model.max_batch_size, reuse_share=reuse_share)
    return choose_ladder(
        lengths.list_quantiles(MAX_LENGTHS),
        num_prompt=lengths.mean_prompt(),
        max_tokens=spec.sampling.max_tokens,
        cost=cost,
    )


def make_scenario(spec: JobSpec, lengths: Lengths, asked: Asked) -> Scenario:
    """Everything as the job would run it."""
    cluster = spec.cluster
    if asked.num_engines is not None:
        workers = {"min": asked.num_engines, "max": asked.num_engines}
        cluster = cluster.model_copy(update={"workers": type(cluster.workers).model_validate(workers)})
        spec = spec.model_copy(update={"cluster": cluster})
    model, n = make_engine(spec), spec.sampling.n
    is_hinted = spec.input.length_hint is not None if asked.is_hinted is None else asked.is_hinted
    policies = Policies(
        has_placement=model.num_ranks > 1 and getattr(spec.engine, "rank_placement", False),
        ladder=choose_job_ladder(spec, model, lengths),
        trusts_hints=is_hinted,
    )
    worker = WorkerModel(
        model,
        policies,
        window=spec.engine.max_inflight,
        num_gpus=cluster.gpus_per_worker,
        n=n,
        journal_interval_s=spec.output.journal_interval_s,
    )
    workload = Workload(lengths, spec.sampling.max_tokens, hint_sigma=0.0 if is_hinted else None)
    return Scenario(
        asked.num_rows,
        choose_rows_per_shard(spec, asked.num_rows),
        worker,
        ClusterModel(
            cluster,
            asked.surroundings,
            spec.retry,
            TailPolicy(),
            n=n,
            gpus_per_worker=cluster.gpus_per_worker,
            began_at=asked.began_at,
        ),
        workload,
    )


# ---- each policy on and off --------------------------------------------------------------------------------------------

ORDER, SPLIT, BUDGETS, PLACEMENT = "order by length", "split of the tail", "token budgets", "rank placement"
# What acts on the end of a run only.
TAIL_POLICIES = {ORDER, SPLIT}

Change = Callable[[Scenario], Scenario]


def _with(**changes: object) -> Change:
    def change(scenario: Scenario) -> Scenario:
        policies = replace(scenario.worker.policies, **changes)  # type: ignore[arg-type]
        return replace(scenario, worker=replace(scenario.worker, policies=policies))

    return change


def _hint(scenario: Scenario, sigma: float | None) -> Scenario:
    workload = replace(scenario.workload, hint_sigma=sigma)
    return _with(trusts_hints=sigma is not None)(replace(scenario, workload=workload))


def _split(scenario: Scenario, tail: TailPolicy | None) -> Scenario:
    return replace(scenario, cluster=replace(scenario.cluster, tail=tail))


def list_variants(scenario: Scenario, spec: JobSpec) -> list[tuple[str, bool, Scenario]]:
    """(policy, is it on, the same job with that one policy turned round), for each that can be turned here."""
    policies, is_hinted = scenario.worker.policies, scenario.workload.hint_sigma is not None
    variants = [
        (ORDER, not is_hinted, _hint(scenario, None if is_hinted else 0.0)),
        (SPLIT, False, _split(scenario, None)),
    ]
    if isinstance(spec.engine, TensorRTLLMEngineSpec):
        has_parts = bool(policies.ladder.rungs)
        other = ONE_SHOT if has_parts else make_ladder(8192, spec.sampling.max_tokens)
        variants.append((BUDGETS, not has_parts, _with(ladder=other)(scenario)))
        placement = not policies.has_placement
        variants.append((PLACEMENT, placement, _with(has_placement=placement)(scenario)))
    return variants
