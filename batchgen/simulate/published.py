"""Throughput that NVIDIA published for this family of models on B200, as runs that a modelled engine can repeat. Facts.

Sources: TensorRT-LLM's `docs/source/developer-guide/perf-overview.md` (R1-0528 NVFP4, 4 GPUs, all requests queued at
once, with the number of requests); `docs/source/blogs/Best_perf_practice_on_DeepSeek-R1_in_TensorRT-LLM.md` (8 GPUs,
FP8 and BF16 KV cache); tech blog 15 (V3.2). All are totals over a whole run, start and tail included, which is why whole
runs are repeated here and not steady states.

Blog 15 prints a command with 768 requests, 256 in flight. Its result does not belong to that: 365.0 s at 8.416 requests
a second are 3,072 requests, and 8.416/s times 120.3 s of latency are 1,013 in flight. It is taken as 3,072 and 1,024. It
ran MTP-1, greedily, at an acceptance that is not told; decode is a small part of that run (8,192 prompt tokens for 1,024
of answer), and `tokens_per_step` states what was assumed.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Published:
    """One run: every prompt and every answer of the same length. `tokens_per_s` is of answers, per GPU; `concurrency_limit`
    the requests in flight, None: all at once."""

    name: str
    tokens_per_s: float
    model: Literal["r1", "r1_bf16_kv", "v32"]
    num_ranks: int
    prompt_tokens: int
    output_tokens: int
    num_requests: int
    max_batch_size: int
    max_num_tokens: int
    kv_fraction: float
    balance_steps: int
    max_inflight: int | None = None
    tokens_per_step: float = 1.0
    is_fitted: bool = True


# `trtllm-bench` chose batch and step size itself where the page gives none; its choices are not published.
BENCH_BATCH, BENCH_TOKENS = 2048, 8192
PUBLISHED = (
    Published("R1 4 GPUs 1000/1000", 6463, "r1", 4, 1000, 1000, 3000, BENCH_BATCH, BENCH_TOKENS, 0.9, 60),
    Published("R1 4 GPUs 1024/8192", 3862, "r1", 4, 1024, 8192, 1500, BENCH_BATCH, BENCH_TOKENS, 0.9, 60),
    Published("R1 4 GPUs 1024/32768", 1451, "r1", 4, 1024, 32768, 1000, BENCH_BATCH, BENCH_TOKENS, 0.9, 60),
    Published("R1 4 GPUs 8192/1024", 1168, "r1", 4, 8192, 1024, 1500, BENCH_BATCH, BENCH_TOKENS, 0.9, 60),
    Published("R1 8 GPUs FP8 KV 1024/2048", 5393, "r1", 8, 1024, 2048, 114688, 896, 2048, 0.93, 0, 7168),
    Published("R1 8 GPUs BF16 KV 1024/2048", 4548, "r1_bf16_kv", 8, 1024, 2048, 49152, 384, 1536, 0.85, 0, 3072),
    Published("V3.2 8 GPUs MTP-1 8192/1024", 1077, "v32", 8, 8192, 1024, 3072, 256, 8576, 0.8, 0, 1024, 1.8, False),
)
