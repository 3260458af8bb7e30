"""`DeepseekV32Tokenizer`, over the `tokenizers` library alone: transformers takes seconds to import."""

from tensorrt_llm.tokenizer.deepseek_v32.tokenizer import DeepseekV32Tokenizer

__all__ = ["DeepseekV32Tokenizer"]
