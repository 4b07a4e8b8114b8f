"""Plain-torch twins of the products with 4-bit codes, which are widened a few rows at a time and rounded once."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from workstation.kernels.code_weights import CodeWeight, unpack, unpack_scales

CHUNK_ELEMENTS = 1 << 22


def widen(weight: CodeWeight, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] in `dtype`: a group's scale and the row's factor meet first, then the table's value, all in float32."""
    scales = unpack_scales(weight)
    if weight.factor is not None:
        scales = scales / weight.factor[:, None] if weight.divides else scales * weight.factor[:, None]
    codes = unpack(weight.words, weight.columns, weight.kind).to(torch.int32)
    values = weight.table.index_select(0, codes.flatten()).view(weight.rows, -1, weight.size)
    return (values * scales[:, :, None]).view(weight.shape).to(dtype)


def linear_codes(x: torch.Tensor, weight: CodeWeight, bias: torch.Tensor | None) -> torch.Tensor:
    out = torch.empty(x.shape[0], weight.rows, dtype=x.dtype, device=x.device)
    step = max(1, CHUNK_ELEMENTS // weight.columns)
    for start in range(0, weight.rows, step):
        stop = min(start + step, weight.rows)
        wide = widen(weight.part(start, stop), x.dtype)
        out[:, start:stop] = F.linear(x, wide, None if bias is None else bias[start:stop])
    return out
