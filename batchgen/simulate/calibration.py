"""The frozen constants of the modelled engines, where each comes from, and how closely they meet what was published.

Three numbers are fitted, on the six published R1 runs of `published` (`python jobs/calibrate_simulator.py --fit` repeats
that): `FIXED_S`, `TOKEN_S`, `CONTEXT_S`. They were frozen before any policy of this project was measured on them and are
not touched after. The optimum is flat: 9.2 ms, 57.6 us and 23.7 ns fit as well. All else follows from the model's shape:

- a query meets a context token in decode (absorbed MLA) with 128 heads x (576 + 512) x 2 operations a layer, in dense
  prefill with 128 x (192 + 128) x 2: 0.294 of that; a BF16 cache has twice the bytes and half the arithmetic rate;
- V3.2 attends to 2,048 tokens at most, in prefill by the decode kernel; its indexer reads 132 bytes of each context
  token where attention reads 576 (decode is bound by bytes: 0.229), and does 64 x 128 x 2 operations (prefill is bound by
  arithmetic: 0.059);
- KV cache of a token: (512 + 64) x 61 bytes in FP8, twice that in BF16, and 132 x 61 more for V3.2's indexer;
- a B200 has 186 GB that a process can use, 10 GB of it for activations and CUDA graphs; weights on each GPU are 68 GB of
  R1 over 8 GPUs, 111 GB over 4, 70 GB of V3.2 over 8 (attention on every GPU, experts spread): arithmetic, not measured.

The V3.2 run was not fitted: it checks the steps from R1 to V3.2. What it can't check: long answers on V3.2 (nothing is
published), temperatures above 0, and an engine without MTP, which is how this project runs it. Differences of up to a
quarter are what this model is good for; ratios between two policies on the same model are better than that.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from batchgen.simulate.engine import EngineModel, VirtualEngine
from batchgen.simulate.published import PUBLISHED, Published
from batchgen.simulate.rank import VirtualRequest
from batchgen.simulate.step_cost import DENSE, StepCost

FIXED_S = 11.56e-3
TOKEN_S = 60.8e-6
CONTEXT_S = 20.0e-9

PREFILL_SHARE = (192 + 128) / (576 + 512)
INDEX_BYTES_SHARE = 132 / 576
INDEX_WORK_SHARE = (64 * 128) / (128 * (576 + 512))
V32_TOP_K = 2048

USABLE_BYTES = 186e9
ACTIVATION_BYTES = 10e9
KV_BYTES = {"r1": 576 * 61, "r1_bf16_kv": 2 * 576 * 61, "v32": (576 + 132) * 61}
WEIGHT_BYTES = {("r1", 4): 111e9, ("r1", 8): 68e9, ("r1_bf16_kv", 8): 68e9, ("v32", 8): 70e9}


@dataclass(frozen=True, slots=True)
class Fitted:
    """The three numbers, in seconds."""

    fixed_s: float = FIXED_S
    token_s: float = TOKEN_S
    context_s: float = CONTEXT_S


FROZEN = Fitted()


def make_cost(model: str, fitted: Fitted = FROZEN) -> StepCost:
    context_s = fitted.context_s * (2 if model == "r1_bf16_kv" else 1)
    if model != "v32":
        return StepCost(fitted.fixed_s, fitted.token_s, context_s, context_s * PREFILL_SHARE, top_k=DENSE)
    return StepCost(
        fitted.fixed_s,
        fitted.token_s,
        context_s,
        prefill_context_s=context_s,
        index_s=context_s * INDEX_BYTES_SHARE,
        prefill_index_s=context_s * INDEX_WORK_SHARE,
        top_k=V32_TOP_K,
    )


def count_kv_tokens(model: str, num_ranks: int, fraction: float) -> int:
    """Tokens that a rank's KV cache holds when it gets this share of what the weights leave."""
    free = USABLE_BYTES - ACTIVATION_BYTES - WEIGHT_BYTES[model, num_ranks]
    return int(free * fraction / KV_BYTES[model])


def make_v32_engine(
    *,
    max_batch_size: int = 128,
    max_num_tokens: int = 8192,
    kv_fraction: float = 0.8,
    balance_steps: int = 60,
    reserves_exactly: bool = False,
    reuses_blocks: bool = True,
) -> EngineModel:
    """DeepSeek-V3.2 in NVFP4 on 8 x B200 without MTP, with the defaults of `engine.kind: tensorrt_llm`."""
    return EngineModel(
        make_cost("v32"),
        num_ranks=8,
        kv_tokens=count_kv_tokens("v32", 8, kv_fraction),
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        balance_steps=balance_steps,
        reserves_exactly=reserves_exactly,
        reuses_blocks=reuses_blocks,
    )


@dataclass(frozen=True, slots=True)
class Met:
    """What the model makes of a published run. `tokens_per_s` is a GPU's."""

    run: Published
    tokens_per_s: float
    latency_s: float
    ttft_s: float

    @property
    def error(self) -> float:
        return self.tokens_per_s / self.run.tokens_per_s - 1


def repeat_run(run: Published, fitted: Fitted = FROZEN, *, share: float = 1.0, num_ranks: int | None = None) -> Met:
    """The published run on the model, or that share of its requests, or as many ranks of it with their own requests."""
    num_ranks = num_ranks or run.num_ranks
    engine = VirtualEngine(
        EngineModel(
            make_cost(run.model, fitted),
            num_ranks,
            count_kv_tokens(run.model, run.num_ranks, run.kv_fraction),
            run.max_batch_size,
            run.max_num_tokens,
            run.balance_steps,
        )
    )
    count = math.ceil(run.num_requests * share * num_ranks / run.num_ranks)
    max_inflight = count if run.max_inflight is None else run.max_inflight * num_ranks // run.num_ranks
    output = round(run.output_tokens / run.tokens_per_step)
    sent = ended = 0
    latency_s = ttft_s = 0.0
    while ended < count:
        while sent < count and sent - ended < max_inflight:
            engine.submit(VirtualRequest(sent, run.prompt_tokens, output, output))
            sent += 1
        for finished in engine.advance(math.inf):
            ended += 1
            latency_s += finished.ended_at - finished.submitted_at
            ttft_s += finished.first_token_at - finished.submitted_at
    rate = count * run.output_tokens / engine.now / num_ranks
    return Met(run, rate, latency_s / count, ttft_s / count)


def repeat_all() -> Iterator[Met]:
    for run in PUBLISHED:
        yield repeat_run(run)


# ---- the fit -----------------------------------------------------------------------------------------------------------

# Where the search begins: round values of the right order.
START = Fitted(10e-3, 60e-6, 20e-9)


def fit(on_better: Callable[[Fitted, float], None], start: Fitted = START) -> Fitted:
    """The three numbers with the least sum of squared logarithms of (model / published), by turns along each of them.

    All requests of these runs are alike, so that one rank stands for all; of the two longest a quarter is run.
    """
    best, loss, step = start, _loss(start), 0.2
    while step > 0.01:
        better = min(((_loss(found), found) for found in _neighbours(best, step)), key=lambda pair: pair[0])
        if better[0] < loss - 1e-6:
            loss, best = better
            on_better(best, loss)
        else:
            step /= 2
    return best


def _neighbours(point: Fitted, step: float) -> Iterator[Fitted]:
    for factor in (1 + step, 1 / (1 + step)):
        yield Fitted(point.fixed_s * factor, point.token_s, point.context_s)
        yield Fitted(point.fixed_s, point.token_s * factor, point.context_s)
        yield Fitted(point.fixed_s, point.token_s, point.context_s * factor)


def _loss(fitted: Fitted) -> float:
    runs = (run for run in PUBLISHED if run.is_fitted)
    met = (repeat_run(run, fitted, share=0.25 if run.num_requests > 10_000 else 1, num_ranks=1) for run in runs)
    return sum(math.log(one.tokens_per_s / one.run.tokens_per_s) ** 2 for one in met)
