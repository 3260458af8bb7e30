"""Is the checkpoint whole and of the kind that the engine takes, and how many requests will its KV cache hold? Pure.

Memory figures are estimates from files' sizes and a config: activations and CUDA graphs are not in them, so they are upper
bounds, and said to be about.
"""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batchgen.preflight.checkpoint import QUANT_CONFIG, CheckpointFacts, name_experts
from batchgen.preflight.preflight import BLACKWELL, GIB, Check, EngineNeeds, NodeFacts

ARCHITECTURE = "DeepseekV32ForCausalLM"
TOKENIZERS = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json"})
# Of a prompt nothing is known here; what a request reserves is max_tokens and this many.
ASSUMED_PROMPT_TOKENS = 1024
# The indexer keeps a key of a byte a dimension, and a float for each 128 of them.
INDEXER_BLOCK, INDEXER_SCALE_BYTES = 128, 4


def check_files(checkpoint: CheckpointFacts) -> list[Check]:
    """Is all of it there? For every engine that loads weights."""
    again = "copy the checkpoint there again"
    name, source = "checkpoint", checkpoint.source
    if "config.json" not in checkpoint.sizes:
        return [Check(name, "fail", f"{source} has no config.json", "correct model.path", is_spec=True)]
    if checkpoint.missing:
        what = f"{len(checkpoint.missing)} files that the index names are missing, the first is {checkpoint.missing[0]}"
        return [Check(name, "fail", what, again, is_spec=True)]
    if checkpoint.faults:
        return [Check(name, "fail", fault, again, is_spec=True) for fault in checkpoint.faults]
    weights = [path for path in checkpoint.sizes if path.endswith(".safetensors")]
    if not weights:
        return [Check(name, "fail", f"{source} has no safetensors files", "convert the checkpoint", is_spec=True)]
    what = f"whole: {len(weights)} weight files, {sum(checkpoint.sizes[path] for path in weights) / 1e9:,.1f} GB"
    checks = [Check(name, "ok", what)]
    if TOKENIZERS & checkpoint.sizes.keys():
        return [*checks, Check("tokenizer", "ok", "its files are there")]
    what = f"{source} has none of {', '.join(sorted(TOKENIZERS))}"
    return [*checks, Check("tokenizer", "fail", what, "copy the tokenizer's files there too", is_spec=True)]


def check_model(checkpoint: CheckpointFacts, needs: EngineNeeds, node: NodeFacts) -> list[Check]:
    """For TensorRT-LLM: files, architecture, quantisation, and what fits."""
    checks = check_files(checkpoint)
    if checks[0].verdict == "fail":
        return checks
    return [
        *checks,
        _check_architecture(checkpoint, needs),
        *check_quantization(checkpoint, node),
        *check_capacity(checkpoint, needs, node),
    ]


def _check_architecture(checkpoint: CheckpointFacts, needs: EngineNeeds) -> Check:
    named = checkpoint.config.get("architectures")
    found = ", ".join(map(str, named if isinstance(named, list) and named else ["none"]))
    if found == ARCHITECTURE:
        return Check("architecture", "ok", found)
    if needs.custom_tokenizer == "deepseek_v32":
        what = f"{found}, but engine.custom_tokenizer is deepseek_v32, which is for {ARCHITECTURE}"
        return Check("architecture", "fail", what, "set engine.custom_tokenizer: null", is_spec=True)
    return Check("architecture", "warn", f"{found}; the defaults are for {ARCHITECTURE}", "look at each engine field")


# ---- quantisation


def check_quantization(checkpoint: CheckpointFacts, node: NodeFacts) -> list[Check]:
    """Without hf_quant_config.json TensorRT-LLM 1.2 takes packed weights for plain ones."""
    if checkpoint.quant_config is None:
        if not checkpoint.packed:
            return [Check("quantisation", "ok", f"none: no {QUANT_CONFIG}, and no packed weights")]
        what = (
            f"{len(checkpoint.packed)} modules hold NVFP4 weights and there is no {QUANT_CONFIG}: it goes unrecognised"
        )
        return [Check("quantisation", "fail", what, f"copy {QUANT_CONFIG} beside the weights", is_spec=True)]
    section = checkpoint.quant_config.get("quantization")
    if not isinstance(section, Mapping):
        what = f"{QUANT_CONFIG} has no section 'quantization'"
        return [Check("quantisation", "fail", what, "copy it from the checkpoint's publisher again", is_spec=True)]
    if section.get("quant_algo") != "NVFP4":
        what = f"{QUANT_CONFIG} says {section.get('quant_algo')}, not NVFP4"
        return [Check("quantisation", "warn", what, "the defaults are for NVFP4: look at each engine field")]
    kv, excluded = section.get("kv_cache_quant_algo"), section.get("exclude_modules") or []
    if not isinstance(excluded, list):
        what = f"exclude_modules of {QUANT_CONFIG} is no list"
        return [Check("quantisation", "fail", what, "copy it from the checkpoint's publisher again", is_spec=True)]
    return [
        Check("quantisation", "ok", f"NVFP4, KV cache {kv or 'not quantised'}"),
        *_check_excluded(checkpoint, excluded),
        *_check_blackwell(node),
    ]


def _check_excluded(checkpoint: CheckpointFacts, patterns: Sequence[Any]) -> list[Check]:
    """What is packed must not be excluded, and what is plain must: the engine makes each module after this list."""
    is_excluded = re.compile("|".join(fnmatch.translate(name_experts(str(p) + ".")[:-1]) for p in patterns) or r"(?!)")
    both = sorted(name for name in checkpoint.packed if is_excluded.match(name))
    neither = sorted(name for name in checkpoint.plain if not is_excluded.match(name) and _is_linear(name))
    mend = f"take {QUANT_CONFIG} and the weights from one export"
    if both:
        what = f"{len(both)} modules are packed and excluded by exclude_modules, the first is {both[0]}"
        return [Check("exclude_modules", "fail", what, mend, is_spec=True)]
    if neither:
        what = f"{len(neither)} plain modules are not in exclude_modules, the first is {neither[0]}"
        return [Check("exclude_modules", "warn", what, mend)]
    return [Check("exclude_modules", "ok", f"{len(patterns)} patterns, at one with the weights")]


def _is_linear(name: str) -> bool:
    """A router's gate and the embeddings are no linear layers to the engine."""
    return name.endswith("_proj") or name == "lm_head"


def _check_blackwell(node: NodeFacts) -> list[Check]:
    old = sorted({gpu.name for gpu in node.gpus if gpu.capability[0] < BLACKWELL})
    if old:
        mend = "use Blackwell (B200, sm_100), or an FP8 checkpoint"
        return [Check("gpu kind", "fail", f"NVFP4 needs Blackwell and here is {', '.join(old)}", mend)]
    if any(gpu.capability[0] > BLACKWELL for gpu in node.gpus):
        return [
            Check("gpu kind", "warn", "Blackwell, but not the kind (sm_100) that this model was tested on", "measure")
        ]
    return [Check("gpu kind", "ok", "Blackwell: has NVFP4")] if node.gpus else []


# ---- what fits


@dataclass(frozen=True, slots=True)
class Capacity:
    """Of one GPU, about. `num_requests`: admitted at the same time by a rank, each reserving `reserved_tokens`."""

    weight_bytes: int
    kv_bytes: int
    kv_tokens: int
    reserved_tokens: int

    @property
    def num_requests(self) -> int:
        return self.kv_tokens // self.reserved_tokens


def read_count(checkpoint: CheckpointFacts, name: str) -> int:
    """A number of the config; 0 where it has none, or something else there."""
    value = checkpoint.config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def find_kv_token_bytes(checkpoint: CheckpointFacts, needs: EngineNeeds) -> int | None:
    """Bytes of one token in the KV cache of one GPU; None for a config that doesn't say."""
    quantization = (checkpoint.quant_config or {}).get("quantization")
    kv_algo = quantization.get("kv_cache_quant_algo") if isinstance(quantization, Mapping) else None
    is_fp8 = needs.kv_dtype == "fp8" or (needs.kv_dtype == "auto" and kv_algo == "FP8")
    value_bytes, layers = 1 if is_fp8 else 2, read_count(checkpoint, "num_hidden_layers")
    if not layers:
        return None
    if rank := read_count(checkpoint, "kv_lora_rank"):  # latent attention keeps one vector a layer, on every GPU
        latent = (rank + read_count(checkpoint, "qk_rope_head_dim")) * value_bytes
        indexer = read_count(checkpoint, "index_head_dim")
        return layers * (latent + indexer + indexer // INDEXER_BLOCK * INDEXER_SCALE_BYTES)
    queries = read_count(checkpoint, "num_attention_heads")
    heads = read_count(checkpoint, "num_key_value_heads") or queries
    dim = read_count(checkpoint, "head_dim") or read_count(checkpoint, "hidden_size") // (queries or 1)
    if not heads or not dim:
        return None
    on_one = heads if needs.has_attention_dp else -(-heads // needs.num_gpus)
    return layers * 2 * on_one * dim * value_bytes


def find_capacity(checkpoint: CheckpointFacts, needs: EngineNeeds, gpu_bytes: int) -> Capacity | None:
    """`gpu_bytes`: free on the fullest GPU. With attention DP all but the routed experts lies on every GPU whole."""
    token_bytes = find_kv_token_bytes(checkpoint, needs)
    max_len = needs.max_model_len or read_count(checkpoint, "max_position_embeddings")
    if token_bytes is None or not max_len:
        return None
    shared = checkpoint.num_shared_bytes // (1 if needs.has_attention_dp else needs.num_gpus)
    weights = shared + checkpoint.num_expert_bytes // needs.num_gpus
    kv_bytes = max(0, int((gpu_bytes - weights) * needs.kv_free_fraction))
    wanted = max_len if needs.max_tokens is None else needs.max_tokens + ASSUMED_PROMPT_TOKENS
    return Capacity(weights, kv_bytes, kv_bytes // token_bytes, min(wanted, max_len))


def check_capacity(checkpoint: CheckpointFacts, needs: EngineNeeds, node: NodeFacts) -> list[Check]:
    checks = _check_ram(checkpoint, node)
    if needs.max_model_len is None:
        what = f"the engine takes the model's own limit, {checkpoint.config.get('max_position_embeddings')} tokens"
        checks.append(Check("max_model_len", "warn", what, "set model.max_model_len to prompt plus completion"))
    if not node.gpus:
        return checks
    found = find_capacity(checkpoint, needs, min(gpu.free_bytes for gpu in node.gpus))
    if found is None:
        return [
            *checks,
            Check("kv cache", "warn", "the config doesn't say how big a token is", "look at the engine's log"),
        ]
    weights = f"weights take about {found.weight_bytes / GIB:,.0f} GiB a GPU"
    if not found.kv_bytes:
        mend = "use more or larger GPUs (engine.tensor_parallel_size)"
        return [*checks, Check("weights", "fail", f"{weights}, which are not free", mend)]
    return [*checks, Check("weights", "ok", weights), _check_kv(found, needs)]


def _check_kv(found: Capacity, needs: EngineNeeds) -> Check:
    size = f"about {found.kv_bytes / GIB:,.0f} GiB or {found.kv_tokens:,} tokens a rank at most"
    if not found.num_requests:
        what = f"{size}, and one request reserves {found.reserved_tokens:,}"
        return Check("kv cache", "fail", what, "lower model.max_model_len or sampling.max_tokens", is_spec=True)
    fitting = min(found.num_requests, needs.max_batch_size) * needs.num_ranks
    what = f"{size}: {found.num_requests:,} requests of {found.reserved_tokens:,} tokens"
    if needs.scheduler_policy != "GUARANTEED_NO_EVICT" or needs.max_inflight <= fitting:
        return Check("kv cache", "ok", what)
    what += f", {fitting:,} in the engine; engine.max_inflight is {needs.max_inflight:,}, and the rest waits inside it"
    mend = "lower sampling.max_tokens or engine.token_budget (each request reserves it), or engine.max_inflight to that"
    return Check("kv cache", "warn", what, mend)


def _check_ram(checkpoint: CheckpointFacts, node: NodeFacts) -> list[Check]:
    if not checkpoint.num_weight_bytes or node.ram_bytes >= checkpoint.num_weight_bytes:
        return []
    what = f"{node.ram_bytes / GIB:,.0f} GiB hold less than the weights: they are read from the disk at every start"
    return [Check("host memory", "warn", what, "use a node with more")]


def check_disk(num_bytes: int, node: NodeFacts, *, is_copied: bool) -> Check:
    """Of a model that is copied to the node first."""
    if is_copied or node.free_disk_bytes > num_bytes * 1.01:
        done = "lies there already" if is_copied else f"takes {num_bytes / 1e9:,.0f} GB"
        return Check("staging", "ok", f"the copy {done} ({node.disk}, {node.free_disk_bytes / 1e9:,.0f} GB free)")
    what = f"the copy takes {num_bytes / 1e9:,.0f} GB and {node.free_disk_bytes / 1e9:,.0f} GB are free at {node.disk}"
    return Check("staging", "fail", what, "free some space, or set model.stage_dir to a larger disk")
