"""Measures activations with nvidia-modelopt and writes the packed checkpoint: the only module that imports it.

What calibration finds is one number a quantizer, the largest magnitude that it saw, and maxima merge: written down every
few rows, they let a later run go on where this one died. modelopt's own `max` algorithm is used, NVIDIA's choice for
DeepSeek-V3.2. Proved on a CPU with modelopt 0.47 and the embedded model; its GPU kernels were never run here.
"""

import copy
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from batchgen.errors import InputError, SpecError

TokenIds = tuple[int, ...]


@dataclass(slots=True)
class Measured:
    """The largest input of each quantizer over the first `num_rows` calibration rows."""

    num_rows: int = 0
    amax: dict[str, float] = field(default_factory=dict)

    def add(self, num_rows: int, amax: dict[str, float]) -> None:
        self.num_rows += num_rows
        for name, value in amax.items():
            self.amax[name] = max(value, self.amax.get(name, 0.0))


def read_measured(path: Path) -> Measured:
    """What an earlier run wrote down; nothing where there is none."""
    try:
        return Measured(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Measured()


def write_measured(path: Path, measured: Measured) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(measured)), encoding="utf-8")
    os.replace(temporary, path)  # noqa: PTH105 - the name of the atomic call


def batch_rows(rows: Sequence[TokenIds], max_rows: int) -> list[list[TokenIds]]:
    """Rows of one length together, in an order that their number decides: a padding token would be measured too."""
    by_length: dict[int, list[TokenIds]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    groups = (by_length[length] for length in sorted(by_length))
    return [group[start : start + max_rows] for group in groups for start in range(0, len(group), max_rows)]


def list_unmeasured(batches: Sequence[Sequence[TokenIds]], num_rows: int) -> list[Sequence[TokenIds]]:
    """All but the first `num_rows` rows, which a run with batches of another size may have left within one."""
    left = []
    for batch in batches:
        if num_rows < len(batch):
            left.append(batch[num_rows:])
        num_rows = max(0, num_rows - len(batch))
    return left


def make_quantization(mtq: Any) -> dict[str, Any]:
    """modelopt's words for the recipe of `recipe.is_quantized`: attention and heads off, its output projection on."""
    made: dict[str, Any] = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    entries, find = made["quant_cfg"], mtq.find_quant_cfg_entry_by_path
    kinds = {kind: find(entries, f"*{kind}_quantizer")["cfg"] for kind in ("weight", "input")}
    entries += [{"quantizer_name": name, "enable": False} for name in ("*head*", "*self_attn*")]
    entries += [
        {"quantizer_name": f"*o_proj*{kind}_quantizer", "cfg": numbers, "enable": True}
        for kind, numbers in kinds.items()
    ]
    return made


def calibrate(
    model: Any, batches: Sequence[Sequence[TokenIds]], measured: Measured, save: Callable[[Measured], None]
) -> Any:
    """The model with its quantizers set. `measured`: rows that were run before are left out. `save` is called after every
    batch. Raises SpecError when nothing was quantized, InputError for rows that leave a quantizer without a value."""
    with quiet():
        import modelopt.torch.quantization as mtq

        def run(vendor: Any) -> None:
            for batch in list_unmeasured(batches, measured.num_rows):
                with torch.no_grad():
                    vendor(input_ids=torch.tensor(batch, device=vendor.device))
                measured.add(len(batch), {name: _read_amax(each) for name, each in _list_inputs(vendor)})
                save(measured)

        model = mtq.quantize(model, make_quantization(mtq), run)
    quantizers = dict(_list_inputs(model))
    if not quantizers:
        raise SpecError("model.path: it has no layer of the kinds that are quantized; see batchgen weigh")
    for name, quantizer in quantizers.items():
        amax = measured.amax.get(name, 0.0)
        if not 0.0 < amax < float("inf"):
            raise InputError(f"input: no calibration row gave {name} a finite value; give other or more rows")
        quantizer.amax = torch.tensor(amax, device=model.device)
    return model


def _list_inputs(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, quantizer) of the activations that are quantized."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled and name.endswith("input_quantizer"):
            yield name, module


def _read_amax(quantizer: Any) -> float:
    amax = quantizer._calibrator.compute_amax()  # modelopt has no public way to look while it calibrates
    return 0.0 if amax is None else float(amax)


def export(model: Any, folder: Path) -> None:
    """Write the packed weights and their configs, as TensorRT-LLM reads them."""
    with quiet(), torch.inference_mode():
        from modelopt.torch.export import export_hf_checkpoint

        export_hf_checkpoint(model, export_dir=str(folder))


@contextmanager
def quiet() -> Iterator[None]:
    """modelopt warns of every version of transformers that it was not tested with (ours was, see the tests), and prints
    where a program's output belongs."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
