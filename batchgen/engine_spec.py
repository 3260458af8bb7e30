"""The sections `engine` of a spec, one for each kind of engine, and what all sections of a spec have in common."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Refused input is not quoted: it may be a prompt or a secret."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class SimulatedEngineSpec(Section):
    """An engine without a model: real time, seeded lengths, no GPU. For tests, dry runs and benchmarks."""

    kind: Literal["simulated"]
    max_inflight: int = Field(default=256, ge=1, description="Requests sent and not answered (requests).")
    slots: int = Field(default=64, ge=1, description="Requests decoded at the same time (requests).")
    prefill_tokens_per_s: float = Field(default=20_000.0, gt=0, description="Prefill rate of the engine (tokens/s).")
    decode_tokens_per_s: float = Field(default=50.0, gt=0, description="Decode rate of one slot (tokens/s).")
    has_latency: bool = Field(default=True, description="false: answer at once, whatever the rates say.")
    length: Literal["lognormal", "max_tokens"] = Field(
        default="lognormal",
        description="Completion lengths. lognormal: drawn, seeded by row, cut at max_tokens; max_tokens: exactly each "
        "request's own, so that a column of lengths goes in through prompt.sampling.",
    )
    mean_tokens: float = Field(default=200.0, gt=0, description="Mean of the lognormal completion length (tokens).")
    sigma: float = Field(
        default=0.8, ge=0.0, description="Its sigma (of the log). 0: every answer has the mean length."
    )
    startup_s: float = Field(default=0.0, ge=0, description="Time until the engine is ready (s).")
    max_model_len: int = Field(
        default=131_072, ge=2, description="Prompt plus completion (tokens); model.max_model_len where that is smaller."
    )
    reject_text: str | None = Field(
        default=None, description="Refuse each prompt that contains this text: a stand-in for a poison row."
    )
    failure_rate: float = Field(
        default=0.0, ge=0.0, le=1.0, description="Share of first attempts that fail and may be retried, seeded by row."
    )
    call_log: str | None = Field(
        default=None, description="Local folder; every call appends a line here (row, sample, attempt), never text."
    )


class TransformersEngineSpec(Section):
    """Any Hugging Face causal LM on this machine, decoded in batches. Needs the extra: pip install 'batchgen[local]'."""

    kind: Literal["transformers"]
    max_inflight: int = Field(default=128, ge=1, description="Requests sent and not answered (requests).")
    max_batch_size: int = Field(default=64, ge=1, description="Requests decoded together (requests).")
    num_threads: int = Field(
        default=1, ge=1, description="Torch threads; a second one was measured to slow small models."
    )
    device: str = Field(default="auto", description="cpu, cuda, cuda:N; auto takes CUDA where there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: float32 on CPU (faster there than bfloat16), the checkpoint's on CUDA."
    )


EngineSpec = Annotated[SimulatedEngineSpec | TransformersEngineSpec, Field(discriminator="kind")]
