"""Plain-torch twins of the products with integer weights, which are widened a few rows at a time and rounded once."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from workstation.kernels.int_weights import UNIT, IntWeight, unpack, unpack_zeros
from workstation.kernels.quantized import Halves
from workstation.kernels.tuning import FEW_SPAN

CHUNK_ELEMENTS = 1 << 22
EXPONENT = 0x7F800000  # of a float32
ONE = 127 << 23
TOP = 7 << 23  # a group's largest becomes 2^7 to 2^8, which e4m3 holds
LEAST = 8 << 23


def widen(weight: IntWeight, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] in `dtype`: the product of integer and scale in float32, rounded to nearest even."""
    codes = unpack(weight.words, weight.bits, weight.columns)
    groups = weight.scale.shape[0]
    values = codes.reshape(weight.rows, groups, weight.size).float()
    if weight.zero is None:
        values -= 1 << weight.bits - 1
    else:
        values -= unpack_zeros(weight.zero, weight.bits).t()[:, :, None]
    values *= weight.scale.t()[:, :, None].float()
    return values.view(weight.rows, weight.columns).to(dtype)


def linear_int(x: torch.Tensor, weight: IntWeight, bias: torch.Tensor | None) -> torch.Tensor:
    out = torch.empty(x.shape[0], weight.rows, dtype=x.dtype, device=x.device)
    step = max(2, CHUNK_ELEMENTS // weight.columns // 2 * 2)
    for start in range(0, weight.rows, step):
        stop = min(start + step, weight.rows)
        wide = widen(weight.part(start, stop), x.dtype)
        out[:, start:stop] = F.linear(x, wide, None if bias is None else bias[start:stop])
    return out


def take_apart(x: torch.Tensor) -> Halves:
    """x [T, K] bfloat16, T ≤ 4, K a multiple of 128."""
    tokens, width = x.shape
    values = x.float().view(tokens, -1, FEW_SPAN).transpose(0, 1)
    largest = values.abs().amax(-1).view(torch.int32) & EXPONENT
    exponent = largest.clamp(min=LEAST) - TOP
    power = torch.where(largest == EXPONENT, torch.nan, exponent.view(torch.float32))
    values = values * (2 * ONE - exponent).view(torch.float32)[..., None]
    high = (values.view(torch.int32) & -(1 << 20)).view(torch.float32)
    order = halves_order(x.device)
    made = Halves.empty(tokens, width, x.device)
    rows = made.values.view(len(values), -1, FEW_SPAN)
    rows[:, 0 : 2 * tokens : 2] = high[..., order].to(rows.dtype)
    rows[:, 1 : 2 * tokens : 2] = (values - high)[..., order].to(rows.dtype)
    powers, less = made.factors.view(len(values), 2, -1).unbind(1)
    powers[:, : 2 * tokens] = power.repeat_interleave(2, 1)
    less[:, 0 : 2 * tokens : 2] = values.sum(-1) * power * (-8 / 512)
    less[:, 1 : 2 * tokens : 2] = 0
    return made


def halves_order(device: torch.device) -> torch.Tensor:
    """[128]: the column of a group that each of the group's values belongs to. In words of 4-bit codes, byte by byte, the
    lower half and the upper half of 32 bytes are a product's operands."""
    place = torch.arange(FEW_SPAN, device=device)
    byte, upper, half = place % UNIT, place // UNIT % 2, place // (2 * UNIT)
    return byte % 2 * 2 * UNIT + upper * UNIT + half * UNIT // 2 + byte // 2
