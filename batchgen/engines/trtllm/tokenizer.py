"""Which tokenizer renders and counts for a TensorRT-LLM engine. Prompts are tokenised here and sent as ids: the vendor
would add a second beginning-of-text token to a rendered chat, and would do it on its own event loop."""

from batchgen.engines.base import Tokenizer
from batchgen.engines.deepseek_tokenizer import create_deepseek_tokenizer, make_probes
from batchgen.engines.hf_tokenizer import HFTokenizer
from batchgen.errors import SpecError
from batchgen.spec import ModelSpec
from batchgen.specs.tensorrt_llm import TensorRTLLMEngineSpec

DEEPSEEK = "deepseek_v32"


def create_trtllm_tokenizer(model: ModelSpec, section: TensorRTLLMEngineSpec) -> Tokenizer:
    """Raises SpecError for a vendor's tokenizer whose chat encoding we don't have."""
    if section.custom_tokenizer is None:
        return HFTokenizer(model)
    if section.custom_tokenizer == DEEPSEEK:
        return create_deepseek_tokenizer(model)
    raise SpecError(
        f"engine.custom_tokenizer: '{section.custom_tokenizer}' is not known here; {DEEPSEEK}, or null for the "
        "checkpoint's own chat template"
    )


def make_start_probes(section: TensorRTLLMEngineSpec) -> tuple[tuple[tuple[dict[str, object], ...], bool, str], ...]:
    """Conversations as we render them, for the engine to compare with its own tokenizer when it starts."""
    return make_probes() if section.custom_tokenizer == DEEPSEEK else ()
