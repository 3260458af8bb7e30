"""The `engine` section of a spec: one class for each kind of engine, and how the right one is found.

`EngineSpec` is the type of `JobSpec.engine`: a section whose `kind` says which class validates it. The kinds of this
module come first; any other is looked up among the entry points of the group `batchgen.engines`, so that an installed
package adds an engine without a change here. Knows what an entry point's object must have to be validated (`spec`), and
nothing else of engines: see `engines`.
"""

import difflib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from pydantic import (
    Field,
    GetPydanticSchema,
    SerializeAsAny,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from batchgen.errors import SpecError
from batchgen.specs.sections import EVERY_FORM, EngineSection, GuidedForm, PromptForm
from batchgen.specs.tensorrt_llm import TensorRTLLMEngineSpec

ENTRY_POINT_GROUP = "batchgen.engines"


class SimulatedEngineSpec(EngineSection):
    """An engine without a model: real time, seeded lengths, no GPU. For tests, dry runs and benchmarks."""

    kind: Literal["simulated"]
    max_inflight: int = Field(default=256, ge=1, description="Requests sent and not answered (requests).")
    slots: int = Field(default=64, ge=1, description="Requests decoded at the same time (requests).")
    ranks: int = Field(
        default=1,
        ge=1,
        description="Attention-DP ranks that share the slots: a request pinned to one waits for its slots.",
    )
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
    die_text: str | None = Field(
        default=None, description="Die of each prompt that contains this text, once it is prefilled."
    )
    death: Literal["engine", "process", "restart"] = Field(
        default="engine",
        description="How. engine: for good; process: its process gets SIGKILL; restart: everything in flight is lost, and "
        "it starts anew by itself.",
    )
    hang_text: str | None = Field(default=None, description="Never answer a prompt that contains this text.")
    failure_rate: float = Field(
        default=0.0, ge=0.0, le=1.0, description="Share of first attempts that fail and may be retried, seeded by row."
    )
    call_log: str | None = Field(
        default=None,
        description="Local folder; every call appends a line here (row, sample, attempt), every answer that took "
        "time another one, never text.",
    )


class TransformersEngineSpec(EngineSection):
    """Any Hugging Face causal LM on this machine, decoded in batches. Needs the extra: pip install 'batchgen[local]'."""

    kind: Literal["transformers"]
    max_inflight: int = Field(
        default=256,
        ge=1,
        description="Requests sent and not answered (requests). About four times max_batch_size: from those that wait, the "
        "engine chooses prompts of like lengths to begin together.",
    )
    max_batch_size: int = Field(default=64, ge=1, description="Requests decoded together (requests).")
    num_threads: int = Field(
        default=1, ge=1, description="Torch threads; a second one was measured to slow small models."
    )
    cache_gib: float | None = Field(
        default=None,
        gt=0,
        description="Memory for the KV cache (GiB); requests are admitted by it. Absent: 60 % of the GPU's free memory, or "
        "a quarter of the machine's, 4 GiB at most.",
    )
    device: str = Field(default="auto", description="cpu, cuda, cuda:N; auto takes CUDA where there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: float32 on CPU (faster there than bfloat16), the checkpoint's on CUDA."
    )
    nvfp4: Literal["w4a16", "w4a4"] = Field(
        default="w4a16",
        description="How an NVFP4 checkpoint is run: w4a16 dequantizes its weights; w4a4 also rounds activations to NVFP4, "
        "as a B200 would, to see what that costs.",
    )

    def fingerprint_fields(self) -> dict[str, Any]:
        """`nvfp4` is younger than the fingerprint: its default asks for nothing."""
        return {"kind": self.kind} | ({"nvfp4": self.nvfp4} if self.nvfp4 != "w4a16" else {})


class OpenAIEngineSpec(EngineSection):
    """Any server that speaks OpenAI's API: trtllm-serve, vLLM, SGLang, Dynamo, or a hosted one."""

    kind: Literal["openai"]
    base_urls: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="Where the API begins, as in http://host:8000/v1. Several: each request goes to the one with the "
        "fewest in flight. A single string is taken as a list of one."
    )
    model: str | None = Field(default=None, description="Name that the server gives the model; model.path when absent.")
    api: Literal["chat", "completions"] = Field(
        default="chat",
        description="chat takes messages; completions takes bare text (prompt.chat: false) or token ids.",
    )
    api_key_env: str = Field(
        default="OPENAI_API_KEY",
        min_length=1,
        description="Environment variable, on every worker, with the API key. Without one no key is sent.",
    )
    max_inflight: int = Field(
        default=256, ge=1, description="Requests sent and not answered, all servers together (requests)."
    )
    request_timeout_s: float = Field(
        default=3600.0, gt=0, description="A request that has no answer after this fails and may be retried (s)."
    )
    connect_timeout_s: float = Field(
        default=10.0, gt=0, description="Longest wait for a connection, and for a server that is asked how it is (s)."
    )
    open_timeout_s: float = Field(
        default=60.0, gt=0, description="A worker fails to start when no server answers within this (s)."
    )
    breaker_failures: int = Field(
        default=5,
        ge=1,
        description="After this many failures in a row a server gets no request until it answers again (failures).",
    )
    give_up_s: float = Field(
        default=900.0, gt=0, description="The worker is given up when no server has answered for this long (s)."
    )
    measure_ttft: bool = Field(default=False, description="Stream the answers, to know when the first token came.")
    send_token_ids: bool = Field(
        default=False,
        description="Render and tokenise with the tokenizer of model.path and send token ids; needs api: completions.",
    )
    extra_body: dict[str, Any] = Field(
        default={}, description="Fields added to every request's body as they are; null takes a field out."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_url(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("base_urls"), str):
            return {**value, "base_urls": [value["base_urls"]]}
        return value

    @field_validator("base_urls")
    @classmethod
    def _are_plain(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("each must be a URL; write it as in http://host:8000/v1")
            if "@" in parts.netloc or parts.query or parts.fragment:
                raise ValueError("no user, password or query belongs in a base URL; the key comes from api_key_env")
        if len(set(urls)) != len(urls):
            raise ValueError("names a server twice; name each once")
        return tuple(url.rstrip("/") for url in urls)

    @field_validator("extra_body")
    @classmethod
    def _are_extra(cls, body: dict[str, Any]) -> dict[str, Any]:
        ours = sorted(body.keys() & {"model", "messages", "prompt", "n", "stream", "stream_options"})
        if ours:
            raise ValueError(f"{ours[0]} is not for extra_body: batchgen sets it; leave it out")
        return body

    @model_validator(mode="after")
    def _ids_need_completions(self) -> "OpenAIEngineSpec":
        if self.send_token_ids and self.api != "completions":
            raise ValueError("send_token_ids needs api: completions; chat takes messages only")
        return self

    @property
    def max_start_s(self) -> float:
        return self.open_timeout_s

    @property
    def max_silence_s(self) -> float:
        """All servers are away."""
        return self.give_up_s

    def fingerprint_fields(self) -> dict[str, Any]:
        return self.model_dump(mode="json", include={"kind", "model", "api", "send_token_ids", "extra_body"})

    @property
    def has_tokenizer(self) -> bool:
        return self.send_token_ids

    @property
    def prompt_forms(self) -> frozenset[PromptForm]:
        if self.send_token_ids:
            return EVERY_FORM
        return frozenset({"messages"}) if self.api == "chat" else frozenset({"text", "token_ids"})

    @property
    def guided_forms(self) -> frozenset[GuidedForm]:
        """OpenAI's API has a field for schemas only; another's field, for the whole job, goes into `extra_body`."""
        return frozenset() if "response_format" in self.extra_body else frozenset({"json_schema"})

    @property
    def has_tool_calls(self) -> bool:
        return bool(self.extra_body.get("tools"))


# ---- which one ---------------------------------------------------------------------------------------------------------

BuiltIn = Annotated[
    SimulatedEngineSpec | TransformersEngineSpec | OpenAIEngineSpec | TensorRTLLMEngineSpec,
    Field(discriminator="kind"),
]
BUILT_IN: dict[str, type[EngineSection]] = {
    "simulated": SimulatedEngineSpec,
    "transformers": TransformersEngineSpec,
    "openai": OpenAIEngineSpec,
    "tensorrt_llm": TensorRTLLMEngineSpec,
}


def list_entry_points() -> dict[str, EntryPoint]:
    """Engines of other packages by kind; a built-in kind can't be replaced."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name not in BUILT_IN}


def load_entry_point(entry: EntryPoint) -> Any:
    """What another package offers as a kind of engine. Raises SpecError where that is no such thing."""
    where = f"engine.kind: '{entry.name}' ({entry.value} of {entry.dist.name if entry.dist else 'a package'})"
    try:
        found = entry.load()
    # It runs a stranger's code, which may fail with anything; that is this package's fault and nobody else's.
    except Exception as error:
        raise SpecError(f"{where} can't be imported: {type(error).__name__}: {error}; mend that package") from error
    section = getattr(found, "spec", None)
    if not (isinstance(section, type) and issubclass(section, EngineSection)):
        raise SpecError(f"{where} is no EngineKind with a section of its own; mend that package")
    return found


def find_section(kind: str) -> type[EngineSection] | None:
    """The class that validates this kind; None where there is no such kind. Raises SpecError."""
    if kind in BUILT_IN:
        return BUILT_IN[kind]
    entry = list_entry_points().get(kind)
    return None if entry is None else cast(type[EngineSection], load_entry_point(entry).spec)


def _choose(value: Any, validate: ValidatorFunctionWrapHandler) -> EngineSection:
    """`validate` knows the built-in kinds."""
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if isinstance(value, EngineSection) or not isinstance(kind, str) or kind in BUILT_IN:
        made = value if isinstance(value, EngineSection) else validate(value)
        return cast(EngineSection, made)
    section = find_section(kind)
    if section is None:
        known = [*BUILT_IN, *list_entry_points()]
        close = difflib.get_close_matches(kind, known, n=1)
        mend = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
        raise ValueError(f"unknown kind '{kind}'; {mend}")
    # With a built-in one beside it, so that errors are told in the same way for all kinds.
    kinds: Any = SimulatedEngineSpec | section
    adapter: TypeAdapter[EngineSection] = TypeAdapter(Annotated[kinds, Field(discriminator="kind")])
    return adapter.validate_python(value)


EngineSpec = Annotated[
    EngineSection,
    GetPydanticSchema(lambda _, handler: handler.generate_schema(BuiltIn)),
    WrapValidator(_choose),
    SerializeAsAny(),
]
