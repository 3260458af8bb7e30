"""Engines: what generates. One file each, its vendor imported there and nowhere else.

`ENGINES` is the capability table: what a spec may ask of each kind. It is read before any engine is imported, so a spec
that asks for too much is refused on a laptop without torch. `create_engine` and `create_tokenizer` import lazily.
"""

from batchgen.engines.base import Capabilities, Engine, Tokenizer
from batchgen.errors import SpecError
from batchgen.spec import JobSpec

ENGINES: dict[str, Capabilities] = {
    "simulated": Capabilities(is_seeded=True, has_logprobs=False, has_sampling=True),
    "transformers": Capabilities(is_seeded=True, has_logprobs=True, has_sampling=True),
}

# Sampling fields that not every engine can honour -> the capability each needs.
NEEDS = {
    "seed": "is_seeded",
    "logprobs": "has_logprobs",
    "top_k": "has_sampling",
    "min_p": "has_sampling",
    "presence_penalty": "has_sampling",
    "frequency_penalty": "has_sampling",
    "repetition_penalty": "has_sampling",
}


def list_refused(kind: str) -> frozenset[str]:
    """Names of all sampling fields that this kind of engine can't honour."""
    return frozenset(name for name, need in NEEDS.items() if not getattr(ENGINES[kind], need))


def check_supported(spec: JobSpec) -> None:
    """Raises SpecError when the sampling section asks what the chosen engine can't do."""
    for name in sorted(list_refused(spec.engine.kind)):
        if getattr(spec.sampling, name) is not None:
            raise SpecError(
                f"sampling.{name}: the engine '{spec.engine.kind}' can't honour it; leave it out or choose another engine"
            )


def create_engine(spec: JobSpec) -> Engine:
    """The engine of the spec, not opened yet."""
    if spec.engine.kind == "simulated":
        from batchgen.engines.simulated import SimulatedEngine

        return SimulatedEngine(spec.engine, max_model_len=spec.model.max_model_len)
    from batchgen.engines.transformers import TransformersEngine

    return TransformersEngine(spec.model, spec.engine)


def create_tokenizer(spec: JobSpec) -> Tokenizer:
    """The tokenizer alone: enough to show a rendered prompt or count its tokens, without weights or a GPU."""
    if spec.engine.kind == "simulated":
        from batchgen.engines.simulated import ByteTokenizer

        return ByteTokenizer()
    from batchgen.engines.hf_tokenizer import HFTokenizer

    return HFTokenizer(spec.model)
