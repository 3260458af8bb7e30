"""The section of a spec as the keyword arguments of the vendor's `LLM`. Pure: the version is an argument, None where it
is not known, and then nothing is on that an old version does wrong."""

import re
from typing import Any

from batchgen.engines.base import EngineFacts
from batchgen.spec import ModelSpec
from batchgen.specs.tensorrt_llm import Switch, TensorRTLLMEngineSpec

# Before it, KV blocks are counted wrongly when a prompt is both reused and prefilled in parts: silent corruption.
SAFE_VERSION = (1, 2, 1)
VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)")


def make_llm_kwargs(model: ModelSpec, section: TensorRTLLMEngineSpec, version: str | None) -> dict[str, Any]:
    """See the module. Names and values are TensorRT-LLM 1.2's; mappings stand for its argument classes."""
    is_safe = is_safe_version(version)
    kwargs: dict[str, Any] = {
        "model": model.path,
        "tensor_parallel_size": section.tensor_parallel_size,
        "moe_expert_parallel_size": section.moe_expert_parallel_size,
        "enable_attention_dp": section.enable_attention_dp,
        "max_batch_size": section.max_batch_size,
        "max_num_tokens": section.max_num_tokens,
        "kv_cache_config": {
            "dtype": section.kv_cache_dtype,
            "free_gpu_memory_fraction": section.kv_cache_free_fraction,
            "enable_block_reuse": is_on(section.enable_block_reuse, is_safe=is_safe),
        },
        "enable_chunked_prefill": is_on(section.enable_chunked_prefill, is_safe=is_safe),
        "moe_config": {"backend": section.moe_backend},
        "scheduler_config": {"capacity_scheduler_policy": section.scheduler_policy},
        "cuda_graph_config": make_cuda_graph_config(section),
        # Said explicitly: MTP would make every answer greedy, whatever the sampling section asks.
        "speculative_config": None,
        "stream_interval": section.stream_interval,
        "return_perf_metrics": section.perf_metrics,
        "guided_decoding_backend": section.guided_decoding_backend,
    }
    if section.custom_tokenizer is not None:
        kwargs["custom_tokenizer"] = section.custom_tokenizer
    if model.revision is not None:
        kwargs["revision"] = model.revision
    if model.max_model_len is not None:
        kwargs["max_seq_len"] = model.max_model_len
    if section.enable_attention_dp and section.attention_dp_balance:
        kwargs["attention_dp_config"] = {"enable_balance": True, "batching_wait_iters": 0, "timeout_iters": 60}
    return merge(kwargs, section.extra)


def make_facts(section: TensorRTLLMEngineSpec, version: str) -> EngineFacts:
    """What budgets and placement must know. The vendor refuses a prompt beyond max_num_tokens that it may not take in
    parts, and a continued answer is part of the prompt. Stop strings are cut from the token ids here."""
    is_safe = is_safe_version(version)
    has_chunked_prefill = is_on(section.enable_chunked_prefill, is_safe=is_safe)
    return EngineFacts(
        is_resumable=True,
        max_prompt_tokens=None if has_chunked_prefill else section.max_num_tokens,
        has_block_reuse=is_on(section.enable_block_reuse, is_safe=is_safe),
        num_ranks=section.tensor_parallel_size if section.enable_attention_dp and section.rank_placement else 1,
        max_rank_rows=section.max_batch_size,
        keeps_stop=False,
    )


def make_cuda_graph_config(section: TensorRTLLMEngineSpec) -> dict[str, Any] | None:
    return {"enable_padding": True, "max_batch_size": section.max_batch_size} if section.cuda_graphs else None


def merge(ours: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Fields of `extra` are added; where both have a mapping, it is the two together, and theirs counts."""
    merged = dict(ours)
    for name, value in extra.items():
        old = merged.get(name)
        merged[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def is_on(switch: Switch, *, is_safe: bool) -> bool:
    return is_safe if switch == "auto" else switch == "on"


def is_safe_version(version: str | None) -> bool:
    """1.2.1 or later; a release candidate comes before its release. None and what is no version are not."""
    found = VERSION.match(version or "")
    if found is None:
        return False
    number = (int(found[1]), int(found[2]), int(found[3] or 0))
    is_early = found[4].lower().lstrip(".-_").startswith(("rc", "a", "b", "dev"))
    return number > SAFE_VERSION or (number == SAFE_VERSION and not is_early)


def needs_safe_version(section: TensorRTLLMEngineSpec) -> bool:
    """Was block reuse together with chunked prefill asked for by name?"""
    return section.enable_block_reuse == section.enable_chunked_prefill == "on"
