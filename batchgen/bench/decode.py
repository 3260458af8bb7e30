"""Our decode loop beside the library's own two ways, on the same requests with long-tailed lengths.

A model of random weights stands in for a checkpoint: speed doesn't depend on what the weights say. Every way generates
exactly the wanted number of tokens for each request; only those count. On a GPU the figure also stands beside the
memory-bandwidth roofline: the time that reading the weights once a step and the live cache takes at measured bandwidth.
"""

import inspect
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from batchgen.records import SamplingParams

VOCAB = 32_000


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts (token ids) and the number of tokens each answer has."""

    prompts: Sequence[tuple[int, ...]]
    lengths: Sequence[int]


@dataclass(frozen=True, slots=True)
class Measured:
    """`cpu_s` is of all threads of this process, so that a busy machine shows. `roofline_s` is known for our own loop
    on a GPU only."""

    name: str
    num_tokens: int
    wall_s: float
    cpu_s: float
    roofline_s: float | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s


def make_workload(num_requests: int, mean: float, sigma: float, max_tokens: int, seed: int = 0) -> Workload:
    """Lognormal answer lengths of the given mean; prompts of 16 to 128 tokens."""
    rng = random.Random(seed)
    scale = mean / 2.718281828 ** (sigma * sigma / 2)
    lengths = [max(1, min(max_tokens, round(scale * rng.lognormvariate(0, sigma)))) for _ in range(num_requests)]
    prompts = [tuple(rng.randrange(10, VOCAB) for _ in range(rng.randint(16, 128))) for _ in range(num_requests)]
    return Workload(prompts, lengths)


def make_model(size: str, device: str) -> Any:
    """A Llama of random weights: 'tiny' (about 10 M parameters, for a CPU) or '1b' (for a GPU)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shapes = {"tiny": (128, 384, 4, 4, 2), "1b": (2048, 8192, 16, 32, 8)}
    hidden, inner, layers, heads, kv_heads = shapes[size]
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as the engine does, and better for `generate` too
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


def run_ours(model: Any, work: Workload, max_rows: int) -> Measured:
    """`DecodeBatch`, rows admitted while others run."""
    from batchgen.engines.decode import DecodeBatch
    from batchgen.engines.sampling import make_row

    sampling = SamplingParams(temperature=1.0, top_p=0.95, seed=1)
    pairs = zip(work.prompts, work.lengths, strict=True)
    waiting = deque(make_row(ids, sampling, length, frozenset()) for ids, length in pairs)
    batch = DecodeBatch(model, lambda _: "", max_rows=max_rows, max_cells=1 << 40, can_join=True)
    weights, cell = count_weight_bytes(model), count_cell_bytes(model)
    num_bytes, start = 0, read_clocks()
    while waiting or batch.rows:
        group = batch.pick(waiting)
        _ = batch.admit(group) if group else batch.step()
        num_bytes += weights + cell * sum(len(row.token_ids) + len(row.out) for row in batch.rows)
    synchronize(model)
    clocks = read_clocks(start)
    bandwidth = measure_bandwidth(model)
    roofline_s = num_bytes / bandwidth if bandwidth else None
    return Measured(f"this loop, {max_rows} rows", batch.num_tokens, *clocks, roofline_s)


def run_generate(model: Any, work: Workload, max_rows: int) -> Measured:
    """`generate` over padded batches in order of arrival; each batch lasts as long as its longest answer."""
    import torch

    start = read_clocks()
    for first in range(0, len(work.prompts), max_rows):
        prompts = work.prompts[first : first + max_rows]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
        longest = max(work.lengths[first : first + max_rows])
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=longest, do_sample=True, temperature=1.0, top_p=0.95
            )
    synchronize(model)
    return Measured(f"generate, batches of {max_rows}", sum(work.lengths), *read_clocks(start))


def run_continuous(model: Any, work: Workload, max_rows: int) -> Measured:
    """The library's continuous batching, its cache sized for `max_rows` of the longest request."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    longest = max(len(ids) + length for ids, length in zip(work.prompts, work.lengths, strict=True))
    page = 32
    # The page's name changed between the library's releases.
    sized = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"
    options = ContinuousBatchingConfig(
        **{sized: page},
        num_blocks=max_rows * (longest // page + 2),
        max_batch_tokens=max(1024, 2 * max_rows),
    )
    config = GenerationConfig(do_sample=True, temperature=1.0, top_p=0.95, eos_token_id=-1, pad_token_id=0)
    start = read_clocks()
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=options
    ) as manager:
        for number, (ids, length) in enumerate(zip(work.prompts, work.lengths, strict=True)):
            manager.add_request(list(ids), request_id=str(number), max_new_tokens=length)
        done = 0
        for answer in manager:
            if answer.is_finished():
                done += len(answer.generated_tokens)
                if answer.error:
                    raise RuntimeError(answer.error)
            if done >= sum(work.lengths):
                break
    synchronize(model)
    return Measured(f"continuous batching, {max_rows} rows", done, *read_clocks(start))


WAYS: dict[str, Callable[[Any, Workload, int], Measured]] = {
    "ours": run_ours,
    "generate": run_generate,
    "continuous": run_continuous,
}


def read_clocks(since: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float]:
    """(wall, CPU) seconds since an earlier reading."""
    return time.perf_counter() - since[0], time.process_time() - since[1]


def count_weight_bytes(model: Any) -> int:
    """What one step reads of the weights; of the input embedding only a few lines."""
    total = sum(each.numel() * each.element_size() for each in model.parameters())
    embedding = model.get_input_embeddings().weight
    return int(total - embedding.numel() * embedding.element_size())


def count_cell_bytes(model: Any) -> int:
    config = model.config
    size = next(model.parameters()).element_size()
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size)


def measure_bandwidth(model: Any) -> float | None:
    """Bytes read and written a second by a large copy on the GPU; None on a CPU."""
    import torch

    if model.device.type != "cuda":
        return None
    source = torch.empty(2 << 30, dtype=torch.uint8, device=model.device)
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize()
    seconds: float = time.perf_counter() - started
    return float(10 * 2 * source.numel()) / seconds


def synchronize(model: Any) -> None:
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize()
