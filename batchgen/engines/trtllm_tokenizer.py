"""Which tokenizer renders and counts for a TensorRT-LLM engine. Prompts are tokenised here and sent as ids: the vendor
would add a second beginning-of-text token to a rendered chat, and would do it on its own event loop."""

from batchgen.engines.base import Tokenizer
from batchgen.engines.hf_tokenizer import HFTokenizer
from batchgen.errors import SpecError
from batchgen.spec import ModelSpec
from batchgen.tensorrt_llm_spec import TensorRTLLMEngineSpec


def create_trtllm_tokenizer(model: ModelSpec, section: TensorRTLLMEngineSpec) -> Tokenizer:
    """Raises SpecError where there is none. MERGE POINT: `DeepseekV32Tokenizer` goes in here for 'deepseek_v32'."""
    if section.custom_tokenizer is not None:
        raise SpecError(f"engine.custom_tokenizer: '{section.custom_tokenizer}' is not known here; use null")
    return HFTokenizer(model)
