"""Which weights of a DeepSeek checkpoint become NVFP4, and what each tensor then is. Pure.

The recipe is NVIDIA's for DeepSeek-V3.2 (Model-Optimizer 0.41.0, examples/deepseek: `*attn*` off, `*wo*` on again, heads
off): routed and shared experts, dense MLPs and the attention's output projection. The q and kv projections, the
indexer, router, norms, embeddings and head stay in BF16, and so does the whole multi-token-prediction layer, which
calibration never runs. Models of other architectures have the same names for the same parts, where they have them.
"""

import re
from collections.abc import Iterable, Iterator
from math import prod

from batchgen.preflight.checkpoint import Tensor

BLOCK = 16
FP8_SCALE = ".weight_scale_inv"
BYTES = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4}
CAST = ("F8_E4M3", "F16", "F32")

_MODULE = re.compile(r"model\.layers\.(\d+)\.(mlp\.(.*\.)?(gate|up|down)_proj|self_attn\.o_proj)")


def is_quantized(module: str, num_layers: int) -> bool:
    """Is this linear module's weight to be packed? `num_layers`: the main model's; a layer beyond them predicts ahead."""
    found = _MODULE.fullmatch(module)
    return found is not None and int(found[1]) < num_layers


def make_tensor(name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(name, dtype, prod(shape) * BYTES[dtype], shape)


def quantize_names(tensors: Iterable[Tensor], num_layers: int) -> Iterator[Tensor]:
    """The tensors of the NVFP4 checkpoint of one in FP8 or BF16. Raises ValueError, a clause, for a weight that can't be
    packed or is packed already."""
    for tensor in tensors:
        if tensor.name.endswith(FP8_SCALE):
            continue  # what is not packed becomes BF16, which needs none
        module = tensor.name.removesuffix(".weight")
        if module == tensor.name or not is_quantized(module, num_layers):
            # The model is loaded in BF16, all but the routers' biases.
            is_cast = tensor.dtype in CAST and not tensor.name.endswith("e_score_correction_bias")
            yield make_tensor(tensor.name, "BF16", tensor.shape) if is_cast else tensor
            continue
        if tensor.dtype == "U8":
            raise ValueError(f"holds {tensor.name} packed already; give the checkpoint it was made from")
        if len(tensor.shape) != 2:
            raise ValueError(f"holds {tensor.name} of shape {list(tensor.shape)}, which is no matrix")
        rows, columns = tensor.shape
        if columns % BLOCK:
            raise ValueError(f"holds {tensor.name} of {columns} columns, no multiple of {BLOCK}")
        yield from make_packed(module, rows, columns)


def make_packed(module: str, rows: int, columns: int) -> tuple[Tensor, ...]:
    """What TensorRT-LLM reads for one packed weight of shape [rows, columns]."""
    return (
        make_tensor(f"{module}.weight", "U8", (rows, columns // 2)),
        make_tensor(f"{module}.weight_scale", "F8_E4M3", (rows, columns // BLOCK)),
        make_tensor(f"{module}.weight_scale_2", "F32", ()),
        make_tensor(f"{module}.input_scale", "F32", ()),
    )
