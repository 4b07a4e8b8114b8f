"""Plain-torch twins of the products with integer weights, which are widened a few rows at a time and rounded once."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from workstation.kernels.int_weights import IntWeight, unpack, unpack_zeros

CHUNK_ELEMENTS = 1 << 22


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
