"""The table of engines.

`ENGINES` is the table of the built-in kinds, and entry points of the group `batchgen.engines` add to it: the section
that a spec gives each, what it may ask of it, how one is made. It is read before any engine is imported, so a spec that
asks for too much is refused on a laptop without torch. The functions in the table import lazily.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from batchgen.engines.base import Capabilities, Engine, EngineFacts, EngineKind, Tokenizer
from batchgen.errors import SpecError
from batchgen.spec import JobSpec, ModelSpec
from batchgen.specs.engine import (
    OpenAIEngineSpec,
    SimulatedEngineSpec,
    TransformersEngineSpec,
    list_entry_points,
    load_entry_point,
)
from batchgen.specs.sections import EngineSection
from batchgen.specs.tensorrt_llm import TensorRTLLMEngineSpec

# The last one is used.
_wrappers: list[Callable[[Engine], Engine]] = []

# Sampling fields that not every engine can honour -> the capability each needs.
NEEDS = {
    "seed": "is_seeded",
    "logprobs": "has_logprobs",
    "top_k": "has_sampling",
    "min_p": "has_sampling",
    "presence_penalty": "has_sampling",
    "frequency_penalty": "has_sampling",
    "repetition_penalty": "has_sampling",
    "guided": "is_guided",
}
FORM_MENDS = {
    "text": "prompt.chat: false makes bare text of every row; set prompt.chat: true",
    "messages": "chat prompts need engine.api: chat, or a tokenizer here (engine.send_token_ids: true)",
    "token_ids": "prompt_token_ids needs engine.api: completions",
}
UNHEEDED_MENDS = {
    "tensorrt_llm": "1.2's default sampler drops it without a word: set engine.extra {sampler_type: TRTLLMSampler}, "
    "or engine.has_penalties with a release whose sampler knows it"
}
GUIDED_MENDS = {
    "openai": "what else a server knows goes into engine.extra_body, for the whole job (vLLM: structured_outputs)",
    "tensorrt_llm": "set engine.guided_decoding_backend, which it needs for any",
}


def _create_simulated(model: ModelSpec, section: SimulatedEngineSpec) -> Engine:
    from batchgen.engines.simulated import SimulatedEngine

    return SimulatedEngine(section, max_model_len=model.max_model_len)


def _create_byte_tokenizer(_: ModelSpec, __: SimulatedEngineSpec) -> Tokenizer:
    from batchgen.engines.simulated import ByteTokenizer

    return ByteTokenizer()


def _create_transformers(model: ModelSpec, section: TransformersEngineSpec) -> Engine:
    from batchgen.engines.transformers import TransformersEngine

    return TransformersEngine(model, section)


def _create_hf_tokenizer(model: ModelSpec, _: TransformersEngineSpec | OpenAIEngineSpec) -> Tokenizer:
    from batchgen.engines.hf_tokenizer import HFTokenizer

    return HFTokenizer(model)


def _create_openai(model: ModelSpec, section: OpenAIEngineSpec) -> Engine:
    from batchgen.engines.openai import OpenAIEngine

    return OpenAIEngine(model, section)


def _create_tensorrt_llm(model: ModelSpec, section: TensorRTLLMEngineSpec) -> Engine:
    from batchgen.engines.tensorrt_llm import TensorRTLLMEngine

    return TensorRTLLMEngine(model, section)


def _create_trtllm_tokenizer(model: ModelSpec, section: TensorRTLLMEngineSpec) -> Tokenizer:
    from batchgen.engines.trtllm.tokenizer import create_trtllm_tokenizer

    return create_trtllm_tokenizer(model, section)


def _make_simulated_facts(section: SimulatedEngineSpec, _: str) -> EngineFacts:
    # An answer that is as long as it may be has no end to go on to.
    is_resumable = section.length != "max_tokens"
    max_rank_rows = -(-section.slots // section.ranks)
    return EngineFacts(is_resumable=is_resumable, num_ranks=section.ranks, max_rank_rows=max_rank_rows)


def _make_openai_facts(section: OpenAIEngineSpec, _: str) -> EngineFacts:
    return EngineFacts(is_resumable=section.send_token_ids and section.extra_body.get("return_token_ids") is True)


def _make_trtllm_facts(section: TensorRTLLMEngineSpec, version: str) -> EngineFacts:
    from batchgen.engines.trtllm.args import make_facts

    return make_facts(section, version)


ENGINES: dict[str, EngineKind[Any]] = {
    # It draws length and text from the prompt before the answer began, so any row goes on as it would have.
    "simulated": EngineKind(
        SimulatedEngineSpec,
        Capabilities(
            is_seeded=True,
            has_logprobs=False,
            has_sampling=True,
            is_resumable=True,
            resumable_fields=frozenset({"seed", "repetition_penalty", "presence_penalty", "frequency_penalty"}),
            has_ranks=True,
            is_streaming=True,
            has_urgency=True,
        ),
        _create_simulated,
        _create_byte_tokenizer,
        _make_simulated_facts,
    ),
    # Its repetition penalty counts prompt and answer alike, the other two the answer only. A seed's state stays behind.
    "transformers": EngineKind(
        TransformersEngineSpec,
        Capabilities(
            is_seeded=True,
            has_logprobs=True,
            has_sampling=True,
            is_resumable=True,
            resumable_fields=frozenset({"repetition_penalty"}),
            is_streaming=True,
            has_urgency=True,
        ),
        _create_transformers,
        _create_hf_tokenizer,
    ),
    # All of it is sent, and is as good as the server: top_k, min_p and repetition_penalty are no fields of OpenAI's own
    # API (vLLM, SGLang and trtllm-serve take them), and its logprobs name tokens by text: token_id is null unless the
    # server is told to give ids (vLLM: extra_body {return_tokens_as_token_ids: true}). Resumable where ids go in and come
    # out (send_token_ids, extra_body {return_token_ids: true}); what its penalties count is the server's affair.
    "openai": EngineKind(
        OpenAIEngineSpec,
        Capabilities(
            is_seeded=True, has_logprobs=True, has_sampling=True, is_guided=True, is_resumable=True, quotes_prompts=True
        ),
        _create_openai,
        _create_hf_tokenizer,
        _make_openai_facts,
    ),
    # Seeds are passed on; the vendor promises no repetition. Sums differ with what shares a batch, and the top-k kernel of
    # DeepSeek-V3.2's sparse attention is not deterministic by its makers' choice. Of penalties, samplers differ in whether
    # they are heeded at all (`unheeded_fields`) and count the prompt: such rows are not continued.
    "tensorrt_llm": EngineKind(
        TensorRTLLMEngineSpec,
        Capabilities(
            is_seeded=True, has_logprobs=True, has_sampling=True, is_guided=True, is_resumable=True, has_ranks=True
        ),
        _create_tensorrt_llm,
        _create_trtllm_tokenizer,
        _make_trtllm_facts,
    ),
}


def get_engine_kind(kind: str) -> EngineKind[Any]:
    """The kind's line of the table. Raises SpecError when the package that had it is not installed here."""
    if kind in ENGINES:
        return ENGINES[kind]
    entry = list_entry_points().get(kind)
    if entry is None:
        raise SpecError(f"engine.kind: '{kind}' is not installed here; install the package that has it on every node")
    found = load_entry_point(entry)
    if not isinstance(found, EngineKind):
        raise SpecError(f"engine.kind: the entry point '{kind}' ({entry.value}) is no EngineKind; mend that package")
    return found


def list_refused(section: EngineSection) -> frozenset[str]:
    """Names of all sampling fields that an engine with this section can't honour."""
    capabilities = get_engine_kind(section.kind).capabilities
    return section.unheeded_fields | {name for name, need in NEEDS.items() if not getattr(capabilities, need)}


def name_able(field: str, kind: str) -> str:
    """The mend for a sampling field that an engine of this kind can't honour."""
    need = NEEDS.get(field)  # the section of somebody's own engine may leave any field unheeded
    able = [name for name, known in ENGINES.items() if name != kind and need and getattr(known.capabilities, need)]
    return "leave it out or choose another engine" + (f" ({', '.join(able)})" if able else "")


def check_supported(spec: JobSpec) -> None:
    """Raises SpecError when sampling or prompt section ask what the chosen engine can't do."""
    kind = spec.engine.kind
    for name in sorted(list_refused(spec.engine)):
        if getattr(spec.sampling, name) is not None:
            is_dropped = name in spec.engine.unheeded_fields
            mend = (is_dropped and UNHEEDED_MENDS.get(kind)) or name_able(name, kind)
            raise SpecError(f"sampling.{name}: the engine '{kind}' can't honour it; {mend}")
    guided = spec.sampling.guided
    if guided is not None and guided.form not in spec.engine.guided_forms:
        takes = ", ".join(sorted(spec.engine.guided_forms)) or "none of them beside its own response_format"
        mend = GUIDED_MENDS.get(kind, "choose another form")
        raise SpecError(f"sampling.guided.{guided.form}: the engine '{kind}' takes {takes}; {mend}")
    if spec.prompt.tools is not None and spec.engine.has_tool_calls:
        raise SpecError("prompt.tools: the engine's section gives tools to every row already; leave one of them out")
    if spec.prompt.form not in spec.engine.prompt_forms:
        raise SpecError(f"prompt: the engine '{kind}' can't be sent it; {FORM_MENDS[spec.prompt.form]}")
    check_patience(spec)
    if 0 < spec.cluster.gpus_per_worker < spec.engine.num_gpus:
        told = f"an engine takes {spec.engine.num_gpus} (engine.tensor_parallel_size)"
        raise SpecError(
            f"cluster.gpus_per_worker: {spec.cluster.gpus_per_worker:g} are too few, {told}; make them equal"
        )
    if spec.prompt.on_overflow == "truncate_left" and not spec.engine.has_tokenizer:
        raise SpecError(f"prompt.on_overflow: the engine '{kind}' counts no tokens here; use error")


def make_facts(section: Any, version: str) -> EngineFacts:
    """What of its capabilities an engine with this section and of this version has."""
    kind = get_engine_kind(section.kind)
    if kind.make_facts is not None:
        return kind.make_facts(section, version)
    return EngineFacts(is_resumable=kind.capabilities.is_resumable)


def check_patience(spec: JobSpec) -> None:
    """Raises SpecError where the driver would give up a worker whose engine is still starting, or mending itself."""
    cluster, section = spec.cluster, spec.engine
    pairs = [("start_timeout_s", section.max_start_s, "start"), ("stall_timeout_s", section.max_silence_s, "be silent")]
    for name, allowed_s, what in pairs:
        if getattr(cluster, name) <= allowed_s:
            told = f"the engine's own fields let it {what} for {allowed_s:g} s"
            raise SpecError(
                f"cluster.{name}: {getattr(cluster, name):g} is too short, {told}; raise it, or lower those"
            )


def create_engine(spec: JobSpec) -> Engine:
    """The engine of the spec, not opened yet."""
    engine = get_engine_kind(spec.engine.kind).create(spec.model, spec.engine)
    return _wrappers[-1](engine) if _wrappers else engine


@contextmanager
def wrapping_engines(wrap: Callable[[Engine], Engine]) -> Iterator[None]:
    """Every engine that this process makes meanwhile goes through `wrap`: where `faults` come between it and a worker. One
    at a time, set up before any work begins."""
    _wrappers.append(wrap)
    try:
        yield
    finally:
        _wrappers.remove(wrap)


def create_tokenizer(spec: JobSpec) -> Tokenizer | None:
    """The tokenizer alone: enough to show a rendered prompt or count its tokens, without weights or a GPU. None where
    prompts go to a server unrendered."""
    create = get_engine_kind(spec.engine.kind).create_tokenizer
    return create(spec.model, spec.engine) if create is not None and spec.engine.has_tokenizer else None
