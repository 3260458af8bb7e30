"""An NVFP4 checkpoint as a model that transformers runs anywhere: weights dequantized, activations rounded if asked.

transformers 5.23 can't read what nvidia-modelopt writes: it ignores the quantization and fails on the shapes. W4A16 gives
the layers the weights that the packed ones stand for; W4A4 also rounds what goes into each packed layer, as a B200's
tensor cores get it, so that it shows what the quantization costs in accuracy. Neither is fast. Experts lie in one
tensor a layer, with no module of their own to hook: their loop is written here, with the rounding in it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from batchgen.errors import InputError, SpecError
from batchgen.quantize.folder import open_folder
from batchgen.quantize.nvfp4 import fake_quantize
from batchgen.quantize.weights import iter_plain, read_input_scales

Nvfp4Mode = Literal["w4a16", "w4a4"]
PACKED = ".weight_scale_2"


def load_nvfp4_model(folder: Path, mode: Nvfp4Mode, options: Mapping[str, Any]) -> Any:
    """The model, in memory, as `from_pretrained(**options)` would load a plain one. Raises SpecError, InputError, and
    what transformers raises."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it names a method that transformers doesn't know
    names = config.architectures or ["none"]
    vendor = getattr(transformers, names[0], None)
    if vendor is None:
        raise SpecError(f"model.path: transformers {transformers.__version__} has no {names[0]}; install a newer one")
    with open_folder(folder) as tensors:
        plain, input_scales = dict(iter_plain(tensors)), read_input_scales(tensors)
        packed = [name.removesuffix(PACKED) for name in tensors.names if name.endswith(PACKED)]
    if mode == "w4a4":
        check_input_scales(input_scales, packed)
    model, told = vendor.from_pretrained(None, config=config, state_dict=plain, output_loading_info=True, **options)
    if missing := sorted(told["missing_keys"]):  # transformers would draw them at random
        raise InputError(
            f"{folder}: lacks {len(missing)} of the model's tensors, first {missing[0]}; copy it there again"
        )
    model.generation_config = read_generation_config(folder, model.generation_config)
    if mode == "w4a4":
        round_activations(model, input_scales)
    return model


def check_input_scales(scales: Mapping[str, torch.Tensor], packed: Iterable[str]) -> None:
    """Each packed module has one, and a gate's is its up projection's: their input is one tensor. Raises InputError."""
    for module in packed:
        if module not in scales:
            raise InputError(f"{module} has no input_scale; use engine.nvfp4: w4a16, or quantize the checkpoint again")
        other = scales.get(module.removesuffix("gate_proj") + "up_proj") if module.endswith("gate_proj") else None
        if other is not None and not torch.equal(scales[module].flatten(), other.flatten()):
            raise InputError(
                f"{module} and its up_proj have different input_scale; use engine.nvfp4: w4a16, or quantize the "
                "checkpoint again"
            )


def read_generation_config(folder: Path, default: Any) -> Any:
    """The folder's own, which may name more end-of-text tokens than the config."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else default


def round_activations(model: torch.nn.Module, input_scales: Mapping[str, torch.Tensor]) -> None:
    """Round what each module named in `input_scales` gets. Raises SpecError for a name that the model has not, or experts
    that are laid out in another way than transformers 5 does."""
    modules, of_experts = dict(model.named_modules()), dict[str, dict[int, dict[str, torch.Tensor]]]()
    for name, scale in input_scales.items():
        parent, _, last = name.rpartition(".")
        owner, _, number = parent.rpartition(".")
        if name in modules:
            _hook(modules[name], scale)
        elif number.isdigit() and owner in modules:
            of_experts.setdefault(owner, {}).setdefault(int(number), {})[last] = scale
        else:
            raise SpecError(
                f"model.path: the checkpoint has an input_scale for {name}, which the model has not; quantize it anew"
            )
    for owner, scales in of_experts.items():
        _replace_experts(owner, modules[owner], scales)


def _hook(module: torch.nn.Module, scale: torch.Tensor) -> None:
    def round_input(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (fake_quantize(inputs[0], scale.to(inputs[0].device)), *inputs[1:])

    module.register_forward_pre_hook(round_input)


def _replace_experts(name: str, experts: Any, scales: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
    names = ("gate_up_proj", "down_proj", "act_fn")
    if any(getattr(experts, each, None) is None for each in names) or len(scales) != len(experts.gate_up_proj):
        raise SpecError(f"engine.nvfp4: {name} is no layer of experts as transformers 5 lays them out; use w4a16")
    # The gate's and the up projection's input is one tensor; modelopt writes its scale to both.
    inputs = [scales[number]["gate_proj"] for number in range(len(scales))]
    inner = [scales[number]["down_proj"] for number in range(len(scales))]

    def forward(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for number in top_k_index.unique().tolist():
            if number >= len(scales):
                continue  # transformers' mark for 'no expert'
            token, place = torch.where(top_k_index == number)
            rounded = fake_quantize(hidden[token], inputs[number].to(hidden.device))
            gate, up = torch.nn.functional.linear(rounded, experts.gate_up_proj[number]).chunk(2, dim=-1)
            rounded = fake_quantize(experts.act_fn(gate) * up, inner[number].to(hidden.device))
            answer = torch.nn.functional.linear(rounded, experts.down_proj[number]) * top_k_weights[token, place, None]
            out.index_add_(0, token, answer.to(out.dtype))
        return out

    experts.forward = forward
