"""NVFP4 in torch: weights packed as nvidia-modelopt packs them, activations rounded as the hardware rounds them.

A value is E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign); each 16 along the last axis share a scale in E4M3, and a tensor a
scale in float32: 4.5 bits a weight. The layout, and every rounding, is that of `NVFP4QTensor` in nvidia-modelopt 0.47,
bit for bit (tests/test_nvfp4.py). A reference, for a CPU or any GPU: it is right, not fast.
"""

from dataclasses import dataclass

import torch

BLOCK = 16
MAX_E2M1, MAX_E4M3 = 6.0, 448.0
# The smallest block scale that E4M3 can hold: a block of tiny weights must not lose its scale, and with it everything.
MIN_SCALE = 2.0**-9
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SIGN = 8


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight of shape [..., K]: `codes` uint8 [..., K / 2], the even index in the low half; `scales` float8_e4m3fn
    [..., K / 16]; `global_scale` a float32 scalar. A weight is its value x its block's scale x the global scale."""

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor


def make_global_scale(amax: torch.Tensor) -> torch.Tensor:
    """Of a tensor whose largest magnitude is `amax`: `weight_scale_2`, or of activations `input_scale`. float32."""
    return amax.float() / (MAX_E2M1 * MAX_E4M3)


def pack(weight: torch.Tensor, global_scale: torch.Tensor | None = None) -> Packed:
    """`global_scale`: one that several weights share; of this weight alone when None. Raises ValueError where the last
    axis is no multiple of 16 long, or a value is not finite: it would become a wrong number without a word."""
    if weight.shape[-1] % BLOCK:
        raise ValueError(f"its last axis is {weight.shape[-1]} long, no multiple of {BLOCK}")
    amax = weight.abs().amax()
    if not bool(torch.isfinite(amax)):
        raise ValueError("it has values that are not finite")
    if global_scale is None:
        global_scale = make_global_scale(amax)
    blocks = weight.unflatten(-1, (-1, BLOCK))
    scales = (blocks.abs().amax(-1).float() / (MAX_E2M1 * global_scale)).nan_to_num(0.0)
    scales = torch.where(scales == 0, 1.0, scales).clamp(MIN_SCALE, MAX_E4M3).to(torch.float8_e4m3fn)
    factors = (scales.float() * global_scale).unsqueeze(-1)
    values = torch.where(factors > 0, blocks / factors, 0.0).flatten(-2)
    codes = (_round(values) + SIGN * (values < 0)).to(torch.uint8)
    return Packed(codes[..., 1::2] << 4 | codes[..., ::2], scales, global_scale)


def unpack(packed: Packed, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The weight [..., K] that the packed one stands for."""
    codes = torch.stack([packed.codes & 15, packed.codes >> 4], -1).flatten(-2).long()
    values = _magnitudes(codes & (SIGN - 1)) * torch.where(codes >= SIGN, -1.0, 1.0)
    factors = (packed.scales.float() * packed.global_scale).unsqueeze(-1)
    return (values.unflatten(-1, (-1, BLOCK)) * factors).flatten(-2).to(dtype)


def fake_quantize(values: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Activations [..., K] as NVFP4 would carry them, in their own dtype: the global scale from calibration, each
    block's from its values. K is a multiple of 16. NaN stays NaN."""
    blocks = values.float().unflatten(-1, (-1, BLOCK))
    scales = (blocks.abs().amax(-1) / (MAX_E2M1 * global_scale)).clamp(max=MAX_E4M3).to(torch.float8_e4m3fn)
    factors = (scales.float() * global_scale).unsqueeze(-1)
    scaled = torch.where(factors == 0, 0.0, blocks / factors)
    rounded = _magnitudes(_round(scaled)) * scaled.sign() * factors
    return rounded.flatten(-2).to(values.dtype)


def _round(values: torch.Tensor) -> torch.Tensor:
    """The index in MAGNITUDES nearest to |value|, at most 7. A tie goes to the even mantissa: up where `>=` stands."""
    a = values.abs()
    up = (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0)
    return sum((each.to(torch.uint8) for each in up), torch.zeros_like(a, dtype=torch.uint8))


def _magnitudes(indexes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(MAGNITUDES, device=indexes.device)[indexes.long()]
