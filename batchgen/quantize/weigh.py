"""What a checkpoint weighs as it is and as NVFP4: on disk and on each GPU, before anything is quantized. Pure.

Two ways to lay the weights out are told apart: tensor parallel cuts everything, and attention data parallel (what
DeepSeek runs with) cuts the routed experts only and keeps the rest on every GPU. KV cache, activations and CUDA graphs
are not in it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from batchgen.preflight.checkpoint import Tensor
from batchgen.quantize.architecture import list_tensors, read_shape
from batchgen.quantize.recipe import FP8_SCALE, quantize_names

_ROUTED = re.compile(r"\.mlp\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class Weight:
    """Bytes of one form of a checkpoint. `num_parameters` counts weights, not scales; packed ones are two in a byte."""

    form: str
    num_bytes: int
    num_routed_bytes: int
    num_parameters: int

    def per_gpu(self, num_gpus: int, *, is_attention_dp: bool) -> float:
        """Bytes on each of `num_gpus`."""
        if not is_attention_dp:
            return self.num_bytes / num_gpus
        return self.num_bytes - self.num_routed_bytes * (1 - 1 / num_gpus)


def weigh(form: str, tensors: Sequence[Tensor]) -> Weight:
    routed = sum(tensor.num_bytes for tensor in tensors if _ROUTED.search(tensor.name))
    return Weight(form, sum(tensor.num_bytes for tensor in tensors), routed, sum(map(count_parameters, tensors)))


def count_parameters(tensor: Tensor) -> int:
    if tensor.name.endswith((FP8_SCALE, ".weight_scale", ".weight_scale_2", ".input_scale")):
        return 0
    num = 2 if tensor.dtype == "U8" else 1
    for size in tensor.shape:
        num *= size
    return num


def weigh_checkpoint(config: Mapping[str, Any], tensors: Sequence[Tensor]) -> tuple[Weight, Weight]:
    """(as it is, as NVFP4). Without tensors: as DeepSeek would publish a model of this config, in FP8 where the config
    says so. Raises ValueError, a clause, where that can't be told."""
    num_layers = config.get("num_hidden_layers")
    if not isinstance(num_layers, int):
        raise ValueError("lacks num_hidden_layers")
    if not tensors:
        quantization = config.get("quantization_config")
        is_fp8 = isinstance(quantization, Mapping) and quantization.get("quant_method") == "fp8"
        tensors = list(list_tensors(read_shape(config), is_fp8=is_fp8))
    form = "FP8" if any(tensor.dtype == "F8_E4M3" for tensor in tensors) else "BF16"
    return weigh(form, tensors), weigh("NVFP4", list(quantize_names(tensors, num_layers)))


def make_value(before: Weight, after: Weight, num_gpus: int) -> dict[str, Any]:
    """For `--json`."""
    forms = {
        weight.form: asdict(weight)
        | {
            f"num_bytes_per_gpu_{name}": round(weight.per_gpu(num_gpus, is_attention_dp=is_dp))
            for name, is_dp in LAYOUTS
        }
        for weight in (before, after)
    }
    return {"num_gpus": num_gpus, "forms": forms, "ratio": before.num_bytes / after.num_bytes}


LAYOUTS = (("tensor_parallel", False), ("attention_dp", True))
