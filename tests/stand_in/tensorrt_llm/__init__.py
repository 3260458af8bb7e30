"""A TEST DOUBLE of TensorRT-LLM 1.2.1's PyTorch LLM API. It is not NVIDIA's, holds none of their code and runs no model.

Put `tests/stand_in` on the PYTHONPATH of an engine's process and `import tensorrt_llm` finds this. It has the real API's
names, signatures, defaults, strictness and bad habits, as far as they are known (`tests/stand_in/signatures.py` lists
them, `tests/test_stand_in.py` compares). Each rank is a real process in a session of its own, as MPI's are, that holds
"GPU memory" in a ledger (`gpu_ledger.py`) and draws each token from (all tokens before it, seed), the same every time.
A request pinned to a rank goes there, if it is strict and all others are; one for a rank that is not there ends the engine.

Environment, read once at the start:

- STAND_IN_GPU_DIR     folder of the GPU ledger; without it no memory is held
- STAND_IN_CONTROL     path of the control file below; may be absent
- STAND_IN_NUM_RANKS   rank processes to start, at most tensor_parallel_size (which is the default)
- STAND_IN_CALLS       file that gets a JSON line for each LLM made, each request taken, each abort: {"llm": kwargs},
                       {"prompt": ids, "sampling": {...}, "rank": n, "streaming": b,
                        "num_inflight": with it, "is_pinned": b}, {"abort": request_id}
- STAND_IN_OLD         '1': no hang detector module, no text scan for stop strings, as in older versions

The control file is JSON, read again when it changes. Write it with `write_control` of `stand_in_control.py` (atomic).

    speed
      token_s: 0.0            seconds an iteration takes (one token for every active request)
      nan_token: null         logits of prompts with this token are no numbers: seen in their logprobs alone
      max_natural_tokens: 64  an answer ends by itself after about half as many tokens
    start, read when the LLM is made
      start_s: 0.0            how long it takes
      start_fault             'oom': RuntimeError, out of memory. 'worker_died': RuntimeError as when a rank dies in
                              start-up. 'hang': never returns; its ranks live and hold memory. 'exit': the process ends
    one-shot: fires when the value differs from the one that was there when the process started, in any engine that
    is alive, and not again in the next one; give each use a value of its own (1, 2, ...), or a list [value, rank]
      die                     the rank (0) exits without a word; those who wait for it wait for ever
      fail_active             all requests of the rank (0) end with RequestError, once it has one; it goes on
      hang                    no rank makes another token; health stays True
      crash                   a background error: the next submit raises RuntimeError and the engine is shut down
      unhealthy               the executor shuts down: health False, waiters hang, submit raises RuntimeError
    while it is set
      fail_all: true          as fail_active, on every rank, again and again
      empty_answers: true     every answer is 'stop' with no token; a number: that many, counted from when it was set
      rss_bytes_per_request   the main process keeps that much for every request it takes
      cached_tokens           what every answer reports as taken from the cache
      hang_shutdown: true     shutdown() never returns
    read when a rank starts
      orphans: true           ranks ignore SIGTERM and the end of the main process
"""

import sys

from tensorrt_llm.llmapi import (
    LLM,
    AttentionDpConfig,
    CudaGraphConfig,
    GuidedDecodingParams,
    KvCacheConfig,
    MoeConfig,
    MTPDecodingConfig,
    RequestOutput,
    SamplingParams,
    SchedulerConfig,
    SchedulingParams,
)
from tensorrt_llm.version import __version__

print(f"[TensorRT-LLM] TensorRT-LLM version: {__version__}")
print("[stand-in] a line of noise on stderr", file=sys.stderr)

__all__ = [
    "LLM",
    "AttentionDpConfig",
    "CudaGraphConfig",
    "GuidedDecodingParams",
    "KvCacheConfig",
    "MTPDecodingConfig",
    "MoeConfig",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
    "SchedulingParams",
    "__version__",
]
