"""One weight of a checkpoint as plain numbers, however it lies there: BF16, FP8 with a scale a block, or packed NVFP4."""

from collections.abc import Iterator

import torch

from batchgen.errors import InputError
from batchgen.quantize.architecture import FP8_BLOCK
from batchgen.quantize.folder import TensorFolder
from batchgen.quantize.nvfp4 import Packed, unpack
from batchgen.quantize.recipe import FP8_SCALE

SCALES = (".weight_scale", ".weight_scale_2", ".input_scale", FP8_SCALE)


def read_weight(folder: TensorFolder, module: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The module's weight [out, in]. Raises InputError for a type or a scale that doesn't fit it."""
    weight = folder.read(f"{module}.weight")
    if weight.dtype == torch.uint8:
        return unpack(read_packed(folder, module), dtype)
    if weight.dtype == torch.float8_e4m3fn:
        scales = folder.read(module + FP8_SCALE)
        wide = scales.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
        return (weight.float() * wide[: weight.shape[0], : weight.shape[1]]).to(dtype)
    if weight.is_floating_point():
        return weight.to(dtype)
    raise InputError(f"{module}.weight: is of type {weight.dtype}, which is no weight; quantize the checkpoint again")


def read_packed(folder: TensorFolder, module: str) -> Packed:
    codes, scales = folder.read(f"{module}.weight"), folder.read(f"{module}.weight_scale")
    if scales.dtype != torch.float8_e4m3fn or scales.shape[:-1] != codes.shape[:-1]:
        raise InputError(f"{module}.weight_scale: doesn't fit its weight; quantize the checkpoint again")
    if scales.shape[-1] * 8 != codes.shape[-1]:
        raise InputError(f"{module}.weight_scale: is no scale for each 16 weights; quantize the checkpoint again")
    return Packed(codes, scales, folder.read(f"{module}.weight_scale_2"))


def iter_plain(folder: TensorFolder, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the whole checkpoint without quantization: what transformers loads."""
    for name in folder.names:
        if name.endswith(".weight"):
            yield name, read_weight(folder, name.removesuffix(".weight"), dtype)
        elif not name.endswith(SCALES):
            yield name, folder.read(name)


def read_input_scales(folder: TensorFolder) -> dict[str, torch.Tensor]:
    """Each packed module's global scale of activations, float32, from calibration."""
    suffix = ".input_scale"
    return {name.removesuffix(suffix): folder.read(name) for name in folder.names if name.endswith(suffix)}
