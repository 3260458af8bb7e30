"""The `engine` section for TensorRT-LLM: every field that we set, with the reason for its default. Pure; imports nothing
of the vendor. What is not here goes through `extra`, which the vendor checks and we don't.

Sources: TensorRT-LLM 1.2.1's argument classes, its DeepSeek-V3.2 and DeepSeek-R1 recipes, and the model card of
nvidia/DeepSeek-V3.2-NVFP4.
"""

from typing import Any, Literal

from pydantic import Field, field_validator

from batchgen.specs.sections import EngineSection, GuidedForm, TokenBudget

# Whether a feature is on: auto where the running version is known to be safe, decided when it is known.
Switch = Literal["auto", "on", "off"]
# What the vendor's TorchSampler, the default in 1.2, takes and drops without a word: the penalties came with its
# pull request 16485, min_p with 16590, both of July 2026. TRTLLMSampler, which 1.2 still has, knows them.
DROPPED = frozenset({"min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"})
# Arguments of the vendor that are made from fields of the spec, or that this engine can't work without.
OURS = {
    "model": "model.path",
    "revision": "model.revision",
    "tokenizer": "engine.custom_tokenizer",
    "max_seq_len": "model.max_model_len",
    "return_perf_metrics": "engine.perf_metrics",
    "attention_dp_config": "engine.attention_dp_balance",
    "orchestrator_type": "nothing: the ranks are started by MPI",
    "backend": "nothing: the PyTorch backend is the only one",
}
MTP_IS_GREEDY = (
    "speculative_config: with it TensorRT-LLM decodes greedily and ignores temperature and top_p, unless it has "
    "allow_advanced_sampling: true; leave it out, or add that and compare the answers"
)


class TensorRTLLMEngineSpec(EngineSection):
    """One TensorRT-LLM engine in processes of its own beside each worker. The defaults are for DeepSeek-V3.2 in NVFP4 on
    8 x B200."""

    kind: Literal["tensorrt_llm"]
    max_inflight: int = Field(
        default=1152,
        ge=1,
        description="Requests sent and not answered (requests). 8 ranks x 128, and an eighth more that wait inside: a rank "
        "whose request ends has the next one at hand, and one that begins like those in its cache can wait for it.",
    )

    token_budget: TokenBudget = Field(
        default="auto",
        description="How much of max_tokens to ask for at first (tokens); an answer that is cut off goes on, doubling. "
        "The engine reserves memory for prompt + max_tokens, however short an answer is. auto: as an earlier run's lengths "
        "say (input.length_prior), else 8192; off: all at once.",
    )
    rank_placement: bool = Field(
        default=True,
        description="Send prompts that begin alike to the same rank, whose cache has their beginning, as far as the load "
        "allows. false: the engine spreads them.",
    )

    # ---- how the model is laid out
    tensor_parallel_size: int = Field(default=8, ge=1, description="GPUs of the engine (GPUs).")
    moe_expert_parallel_size: int = Field(
        default=8,
        ge=1,
        description="GPUs that the experts are spread over (GPUs). All eight, and said explicitly: whole experts on each "
        "GPU move fewer bytes than slices of all of them.",
    )
    enable_attention_dp: bool = Field(
        default=True,
        description="Each GPU attends to requests of its own. DeepSeek's latent KV has one head: split by tensor "
        "parallelism it would be copied to every GPU, and an eighth of the requests would fit.",
    )
    attention_dp_balance: bool = Field(
        default=True,
        description="Ranks wait for one another before a prefill (wait 0, timeout 60 iterations, as NVIDIA's recipes): "
        "all step together, so a lone prefill would hold up seven.",
    )
    custom_tokenizer: str | None = Field(
        default="deepseek_v32",
        description="The vendor's name of a tokenizer with the model's own chat encoding: the checkpoint of DeepSeek-V3.2 "
        "has no chat template. null: the checkpoint's own template.",
    )
    moe_backend: Literal["AUTO", "CUTLASS", "CUTEDSL", "WIDEEP", "TRTLLM", "DEEPGEMM", "VANILLA", "TRITON"] = Field(
        default="TRTLLM",
        description="Kernels of the experts. TRTLLM as in NVIDIA's DeepSeek-V3.2 recipe; CUTLASS is the other one that "
        "takes NVFP4, and may be faster with many requests: measure both.",
    )

    # ---- what fits
    max_batch_size: int = Field(
        default=128,
        ge=1,
        description="Requests decoded together, a rank (requests). Times the ranks, and an eighth more, is max_inflight.",
    )
    max_num_tokens: int = Field(
        default=8192,
        ge=1,
        description="Tokens of one step, a rank (tokens). NVIDIA's recipes' value; without chunked prefill the longest "
        "prompt.",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        default="fp8", description="fp8 holds nearly twice the tokens of auto, at no measured loss on this model."
    )
    kv_cache_free_fraction: float = Field(
        default=0.8,
        gt=0,
        lt=1,
        description="Share of the GPU memory that the weights leave free which the KV cache gets. The rest is for "
        "activations and CUDA graphs: the vendor's 0.9 was seen to run out on this family.",
    )
    enable_block_reuse: Switch = Field(
        default="auto",
        description="Keep the KV of prompts that begin alike. auto: on from version 1.2.1; before, it corrupts the cache "
        "together with chunked prefill.",
    )
    enable_chunked_prefill: Switch = Field(
        default="auto",
        description="Take prompts longer than max_num_tokens, in parts. auto: on from version 1.2.1, for the same reason.",
    )
    scheduler_policy: Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH"] = Field(
        default="GUARANTEED_NO_EVICT",
        description="A request is admitted when its prompt and max_tokens fit. MAX_UTILIZATION admits more, pauses and "
        "computes again; it crashed or lost 40 % in public reports.",
    )
    cuda_graphs: bool = Field(
        default=True,
        description="Replay decode steps as CUDA graphs, padded, up to max_batch_size: a step beyond the largest graph "
        "costs several times as much.",
    )

    # ---- what is told
    stream_interval: int = Field(
        default=10,
        ge=1,
        description="Tokens between two signs of life of a request (tokens). 10 as in NVIDIA's recipes: each one costs "
        "the vendor's front end time.",
    )
    perf_metrics: bool = Field(
        default=True, description="Ask the engine for queue time and time to first token of each request."
    )
    guided_decoding_backend: Literal["xgrammar", "llguidance"] | None = Field(
        default=None, description="What keeps answers to a schema; without one no row can ask for that."
    )

    has_penalties: bool = Field(
        default=False,
        description="Does the vendor's sampler heed min_p and the three penalties? 1.2's default one drops them unsaid, so "
        "they are refused. true with a release that heeds them; extra: {sampler_type: TRTLLMSampler} is as good in 1.2.",
    )

    # ---- how long things may take
    start_timeout_s: float = Field(
        default=5400.0,
        gt=0,
        description="An engine that has not answered its first request this long after its start is killed (s). Loading "
        "takes up to an hour from a slow disk; cluster.start_timeout_s must be above it, and cluster.stall_timeout_s above "
        "it, no_progress_s and gpu_free_timeout_s together.",
    )
    canary_interval_s: float = Field(
        default=60.0, gt=0, description="An engine that is idle is asked for one token this often (s)."
    )
    no_progress_s: float = Field(
        default=300.0,
        gt=0,
        description="With requests in flight and not one token more for this long, the engine hangs and is started anew "
        "(s). As long as the vendor's own hang detector waits.",
    )
    request_base_s: float = Field(
        default=600.0,
        ge=0,
        description="A request may take this long, and max_tokens / min_tokens_per_s more; then it fails and may be "
        "retried (s). The vendor can lose a request without a word.",
    )
    min_tokens_per_s: float = Field(
        default=5.0,
        gt=0,
        description="The slowest decoding of one request that is believed (tokens/s). Half of published.",
    )
    gpu_free_timeout_s: float = Field(
        default=120.0, gt=0, description="Longest wait for the GPUs' memory to be free before a start (s)."
    )
    recycle_drain_s: float = Field(
        default=1800.0, ge=0, description="Before it is started anew in order, what is in flight gets this long (s)."
    )

    # ---- when it is started anew, and when it is given up
    max_rss_growth_gib: float = Field(
        default=64.0,
        gt=0,
        description="The processes' host memory may grow by this much before the engine is started anew in order (GiB): "
        "the vendor is known to leak.",
    )
    max_empty_in_a_row: int = Field(
        default=4,
        ge=1,
        description="Different rows that end without a token, in a row, before the engine is started anew in order (rows). "
        "A known fault of block reuse, which spreads.",
    )
    max_empty_share: float = Field(
        default=0.02, gt=0, le=1, description="The same for the share of such answers among the last 500."
    )
    max_restarts: int = Field(
        default=3, ge=0, description="Starts in a row that finish no request before the worker is given up (starts)."
    )
    extra: dict[str, Any] = Field(
        default={},
        description="More keyword arguments of the vendor's LLM, as they are; what is a mapping here and there is merged.",
    )

    @field_validator("extra")
    @classmethod
    def _are_extra(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for name in sorted(extra):
            if name in OURS:
                raise ValueError(f"{name} is not for extra; it is made from {OURS[name]}")
            if name in cls.model_fields:
                raise ValueError(f"{name} is not for extra; set engine.{name}")
        speculative = extra.get("speculative_config")
        if speculative is not None and not (
            isinstance(speculative, dict) and speculative.get("allow_advanced_sampling") is True
        ):
            raise ValueError(MTP_IS_GREEDY)
        return extra

    @property
    def guided_forms(self) -> frozenset[GuidedForm]:
        return frozenset({"json_schema", "regex", "grammar"}) if self.guided_decoding_backend else frozenset()

    @property
    def unheeded_fields(self) -> frozenset[str]:
        is_heeded = self.has_penalties or self.extra.get("sampler_type") == "TRTLLMSampler"
        return frozenset() if is_heeded else DROPPED

    @property
    def num_gpus(self) -> int:
        return self.tensor_parallel_size

    @property
    def max_start_s(self) -> float:
        return self.start_timeout_s

    @property
    def max_silence_s(self) -> float:
        """A hang is noticed, its processes are ended, and a new engine is started."""
        return self.no_progress_s + self.gpu_free_timeout_s + self.start_timeout_s

    def fingerprint_fields(self) -> dict[str, Any]:
        return self.model_dump(mode="json", include={"kind", "kv_cache_dtype", "custom_tokenizer", "extra"})
