"""The only importer of tensorrt_llm, when it is told to, in the engine's process alone: importing it takes many seconds,
prints, starts MPI, and keeps what it read of the environment.

Names and signatures are those of 1.2.1. What another version lacks shows here, as an ImportError that says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from batchgen.engines.trtllm.sampling import make_guided_kwargs, make_sampling_kwargs
from batchgen.engines.trtllm.wire import Submit


@dataclass(frozen=True, slots=True)
class Vendor:
    """The vendor's classes that we use."""

    version: str
    llm: Any
    sampling_params: Any
    guided_decoding_params: Any
    scheduling_params: Any
    request_error: type[Exception]
    has_hang_detector: bool


def load_vendor() -> Vendor:
    """Raises ImportError where it isn't installed, or lacks a name."""
    import tensorrt_llm
    from tensorrt_llm.executor.utils import RequestError
    from tensorrt_llm.llmapi import GuidedDecodingParams
    from tensorrt_llm.scheduling_params import SchedulingParams

    return Vendor(
        version=tensorrt_llm.__version__,
        llm=tensorrt_llm.LLM,
        sampling_params=tensorrt_llm.SamplingParams,
        guided_decoding_params=GuidedDecodingParams,
        scheduling_params=SchedulingParams,
        request_error=RequestError,
        has_hang_detector=has_hang_detector(),
    )


def has_hang_detector() -> bool:
    """Came with 1.2 or a candidate of 1.3, and no release note says which: so it is tried."""
    try:
        import tensorrt_llm._torch.pyexecutor.hang_detector  # noqa: F401
    except ImportError:
        return False
    return True


def submit(vendor: Vendor, llm: Any, message: Submit, *, has_perf_metrics: bool) -> Any:
    """The vendor's result object of one request. Needs the event loop that will await it to be running. Raises what the
    vendor raises: see `errors`."""
    kwargs = make_sampling_kwargs(message.sampling, has_perf_metrics=has_perf_metrics)
    guided = make_guided_kwargs(message.sampling)
    if guided is not None:
        kwargs["guided_decoding"] = vendor.guided_decoding_params(**guided)
    # One object for each request: the vendor changes it.
    params = vendor.sampling_params(**kwargs)
    scheduling = None
    if message.rank is not None:
        # Strict, or a full rank's request goes to another. Holds only while every request names its rank.
        scheduling = vendor.scheduling_params(attention_dp_rank=message.rank, attention_dp_relax=False)
    return llm.generate_async(list(message.token_ids), params, streaming=True, scheduling_params=scheduling)


def decode(llm: Any, token_ids: Sequence[int]) -> str:
    """By the vendor's tokenizer, special tokens visible: what the child looks for stop strings in."""
    text: str = llm.tokenizer.decode(list(token_ids), skip_special_tokens=False)
    return text
