"""Every op's plain-torch twin against a naive float32 oracle."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    BLOCK,
    Heads,
    cos_sin_table,
    naive_rms_norm,
    naive_rope,
    paged_case,
)

from workstation.kernels import ops

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_rms_norm_divides_by_the_root_mean_square(tokens: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(tokens, 96).to(dtype) * 3, torch.randn(96).to(dtype)
    close(ops.rms_norm(x, weight, 1e-5), naive_rms_norm(x, weight, 1e-5), dtype)


DECODES = [(1, 1), (1, 16), (1, 17), (1, 300), (1, 45), (1, 46), (1, 700)]
PREFILLS = [(3, 3), (17, 40), (64, 64), (5, 333), (300, 700)]

@pytest.mark.parametrize("window", [0, 5, 40])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("shapes", [DECODES, PREFILLS, DECODES+PREFILLS, DECODES[:1], DECODES[3:4], PREFILLS[:1]])
def test_attention(shapes, dim,group,window):
    case = paged_case(Heads(2 * group, 2, dim), shapes, window=window)
    out = ops.attention(case.q, case.kv_layer, case.plan, case.scale)
    close(out, case.expected(), torch.float32)
