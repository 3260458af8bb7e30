"""Is an NVFP4 checkpoint what its source asks for, and how far is each weight from its source? Reads both, changes none.

Names, shapes and types are those that the recipe makes of the source's. Each packed weight is what rounding the source
under its own global scale gives, bit for bit, and how large the errors of that are is told; every other tensor is the
source's own, bit for bit in BF16.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from batchgen.errors import InputError
from batchgen.preflight.checkpoint import Tensor
from batchgen.quantize.folder import TensorFolder
from batchgen.quantize.nvfp4 import pack, unpack
from batchgen.quantize.recipe import is_quantized, quantize_names
from batchgen.quantize.weights import SCALES, read_packed, read_weight


@dataclass(frozen=True, slots=True)
class LayerError:
    """Of one packed weight. `max_error` and `mean_error`: |packed - source|, in the weight's own units; `relative_error`:
    root mean square of the differences over that of the weights. `num_wrong`: weights that rounding doesn't explain."""

    module: str
    num_weights: int
    max_error: float
    mean_error: float
    relative_error: float
    num_wrong: int
    input_scale: float


@dataclass(frozen=True, slots=True)
class Comparison:
    faults: tuple[str, ...]
    layers: tuple[LayerError, ...]
    num_source_bytes: int
    num_packed_bytes: int

    @property
    def ratio(self) -> float:
        return self.num_source_bytes / self.num_packed_bytes

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values, "faults": list(self.faults), "ratio": self.ratio, "is_ok": not self.faults}


def compare_tensors(source: Sequence[Tensor], packed: Sequence[Tensor], num_layers: int) -> list[str]:
    """Sentences on names, shapes and types that differ from what the recipe makes of the source. Of layers that predict
    ahead, which neither transformers nor calibration loads, both may be without. Raises InputError for a source that
    can't be packed."""
    try:
        wanted = {tensor.name: tensor for tensor in quantize_names(source, num_layers)}
    except ValueError as error:
        raise InputError(f"model.path: {error}") from error
    found = {tensor.name: tensor for tensor in packed}
    faults = [f"{name} is missing" for name in wanted.keys() - found.keys() if not _is_ahead(name, num_layers)]
    faults += [f"{name} is not of the recipe" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        one, other = wanted[name], found[name]
        if one.shape != other.shape:
            faults.append(f"{name} has shape {list(other.shape)}, {list(one.shape)} was expected")
        elif one.dtype != other.dtype and not name.endswith("e_score_correction_bias"):
            faults.append(f"{name} is {other.dtype}, {one.dtype} was expected")
    return sorted(faults)


def _is_ahead(name: str, num_layers: int) -> bool:
    parts = name.split(".")
    return parts[:2] == ["model", "layers"] and int(parts[2]) >= num_layers


def measure(
    source: TensorFolder, packed: TensorFolder, num_layers: int, on_layer: Callable[[LayerError], None] = lambda _: None
) -> tuple[list[LayerError], list[str]]:
    """(each packed weight's errors, sentences on what is wrong). One weight is in memory at a time."""
    layers, faults = [], []
    for module in _list_modules(packed):
        if is_quantized(module, num_layers):
            layer = measure_layer(source, packed, module)
            faults += list(_judge(layer))
            layers.append(layer)
            on_layer(layer)
        elif not torch.equal(read_weight(source, module), read_weight(packed, module)):
            faults.append(f"{module}.weight is not the source's")
    faults += [
        f"{name} is not the source's"
        for name in packed.names
        if not name.endswith((".weight", *SCALES)) and not _is_same(source.read(name), packed.read(name))
    ]
    faults += [
        f"{module} and its up_proj have different weight_scale_2, and are one matrix for TensorRT-LLM"
        for module in _list_modules(packed)
        if module.endswith(".gate_proj") and is_quantized(module, num_layers) and not _share_scale(packed, module)
    ]
    return layers, faults


def measure_layer(source: TensorFolder, packed: TensorFolder, module: str) -> LayerError:
    weight, found = read_weight(source, module), read_packed(packed, module)
    expected = pack(weight, found.global_scale)
    wrong = (unpack(found, torch.float32) != unpack(expected, torch.float32)).sum()
    difference = (unpack(found, torch.float32) - weight.float()).abs()
    return LayerError(
        module=module,
        num_weights=weight.numel(),
        max_error=float(difference.max()),
        mean_error=float(difference.mean()),
        relative_error=float(
            difference.square().mean().sqrt() / weight.float().square().mean().sqrt().clamp(min=1e-30)
        ),
        num_wrong=int(wrong),
        input_scale=float(packed.read(f"{module}.input_scale")),
    )


def _judge(layer: LayerError) -> Iterator[str]:
    if not 0.0 < layer.input_scale < float("inf"):
        yield f"{layer.module}.input_scale is {layer.input_scale}"
    if layer.num_wrong:
        yield f"{layer.module}.weight has {layer.num_wrong:,} weights that are not the source's, rounded"


def _list_modules(folder: TensorFolder) -> list[str]:
    return [name.removesuffix(".weight") for name in folder.names if name.endswith(".weight")]


def _share_scale(packed: TensorFolder, gate: str) -> bool:
    one, other = read_packed(packed, gate), read_packed(packed, gate.removesuffix("gate_proj") + "up_proj")
    return bool(torch.equal(one.global_scale, other.global_scale))


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Biases: one may be in BF16 and the other not."""
    return bool(torch.equal(one.to(torch.bfloat16), other.to(torch.bfloat16)))
