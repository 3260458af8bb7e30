"""NVFP4's numbers, beside nvidia-modelopt's own on a million values and beside the format's own table."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchgen.quantize.nvfp4 import MAGNITUDES, fake_quantize, make_global_scale, pack, unpack


def make_edges() -> torch.Tensor:
    """Every tie and its neighbours, both signs, under a scale of exactly 1."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    near = torch.cat([ties, torch.nextafter(ties, torch.tensor(9.0)), torch.nextafter(ties, torch.tensor(0.0))])
    values = torch.cat([near, -near, torch.tensor([0.0, -0.0, 6.0, -6.0, 448.0 * 6.0])])
    blocks = torch.zeros(len(values), 16)
    blocks[:, 0], blocks[:, 1] = values, 6.0
    return blocks


def make_tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    big = torch.randn(512, 640, generator=generator)
    odd = torch.randn(3, 32, 64, generator=generator) * torch.logspace(-9, 3, 32).unsqueeze(-1)
    odd[0, 3] = 0.0
    odd[1, :, :16] = 0.0
    return [big.to(dtype), odd.to(dtype), make_edges().to(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_weights_are_those_of_modelopt_bit_for_bit(dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    for weight in make_tensors(dtype):
        theirs, scales, global_scale = NVFP4QTensor.quantize(weight, 16, try_tensorrt=False)
        ours = pack(weight)
        assert torch.equal(ours.codes, theirs._quantized_data)
        assert torch.equal(ours.scales.view(torch.uint8), scales.view(torch.uint8))
        assert torch.equal(ours.global_scale, global_scale)
        whole = theirs.dequantize(dtype=dtype, scale=scales, double_scale=global_scale, block_sizes={-1: 16})
        assert torch.equal(unpack(ours, dtype), whole)


def test_a_million_values_were_compared() -> None:
    assert sum(tensor.numel() for dtype in range(3) for tensor in make_tensors(torch.float32)) >= 1_000_000


def test_ties_go_to_the_even_mantissa() -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    block = torch.tensor([*ties, *(-tie for tie in ties), 6.0, 0.0])
    rounded = fake_quantize(block, torch.tensor(1.0)).tolist()
    assert rounded == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0, 6.0, 0.0]


def test_every_code_stands_for_its_value() -> None:
    values = torch.tensor([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)])
    packed = pack(values, torch.tensor(1.0))
    assert packed.codes.tolist() == [0x10, 0x32, 0x54, 0x76, 0x90, 0xBA, 0xDC, 0xFE]
    assert unpack(packed, torch.float32).tolist() == values.tolist()


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=16, max_size=16), st.floats(0.015625, 1.0, width=32))
def test_no_value_is_further_off_than_half_a_step(values: list[float], global_scale: float) -> None:
    weight = torch.tensor(values)
    packed = pack(weight, torch.tensor(global_scale))
    factor = packed.scales.float() * packed.global_scale
    error = (unpack(packed, torch.float32) - weight).abs()
    assert bool((error <= torch.maximum(factor * 1.0, weight.abs() - 6 * factor) * (1 + 1e-5)).all())
    assert torch.equal(pack(unpack(packed, torch.float32), torch.tensor(global_scale)).codes & 7, packed.codes & 7) or (
        weight.abs().max() < 6 * 2**-9 * global_scale
    )


def test_a_weight_of_zeros_stays_one() -> None:
    assert not unpack(pack(torch.zeros(4, 32)), torch.float32).any()
    assert not fake_quantize(torch.zeros(4, 32), torch.tensor(0.5)).any()


def test_activations_are_rounded_row_by_row() -> None:
    """What stands beside a row in the batch, its padding say, changes nothing in it."""
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    scale = make_global_scale(rows.abs().amax())
    alone = torch.cat([fake_quantize(row.unsqueeze(0), scale) for row in rows])
    assert torch.equal(fake_quantize(rows, scale), alone)


@pytest.mark.parametrize(
    ("weight", "what"),
    [
        (torch.zeros(4, 24), "24 long, no multiple of 16"),
        (torch.full((1, 16), float("nan")), "not finite"),
        (torch.full((1, 16), float("-inf")), "not finite"),
    ],
)
def test_what_can_not_be_packed_is_refused(weight: torch.Tensor, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        pack(weight)
