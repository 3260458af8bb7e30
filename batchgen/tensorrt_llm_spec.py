"""The `engine` section for TensorRT-LLM: every field that we set, with the reason for its default. Pure; imports nothing
of the vendor. What is not here goes through `extra`, which the vendor checks and we don't.

Sources: TensorRT-LLM 1.2.1's argument classes, its DeepSeek-V3.2 and DeepSeek-R1 recipes, and the model card of
nvidia/DeepSeek-V3.2-NVFP4.
"""

from typing import Literal

from pydantic import Field

from batchgen.sections import EngineSection


class TensorRTLLMEngineSpec(EngineSection):
    """One TensorRT-LLM engine in processes of its own beside each worker. The defaults are for DeepSeek-V3.2 in NVFP4 on
    8 x B200."""

    kind: Literal["tensorrt_llm"]
    max_inflight: int = Field(
        default=1024,
        ge=1,
        description="Requests sent and not answered (requests). 8 ranks x 128: fills every rank, queues nothing there.",
    )
    tensor_parallel_size: int = Field(default=8, ge=1, description="GPUs of the engine (GPUs).")
