"""The FP8 kernels, interpreted on the CPU in float32 and float16; `test_interpreted.py` runs this file in a process apart."""

from __future__ import annotations

import os

import pytest
import torch
from fp8_checks import (
    SHAPES,
    check_bound,
    check_linear,
    check_nan_reaches_the_result,
    check_norm_that_rounds,
    check_quantize,
    check_silu_mul_that_rounds,
    check_strided_rows,
)

from workstation.kernels import ops

assert os.environ["TRITON_INTERPRET"] == "1" and ops.FORCE_TRITON

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize("blocked", [False, True], ids=["rows", "blocks"])
@pytest.mark.parametrize(("tokens", "rows", "columns"), SHAPES)
def test_weight_only(tokens: int, rows: int, columns: int, blocked: bool, dtype: torch.dtype) -> None:
    check_linear(tokens, rows, columns, blocked=blocked, bias=tokens % 2 == 1, dtype=dtype, device="cpu")


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(2, 16), (3, 96), (17, 1000)])
def test_quantize_per_token(tokens: int, width: int, dtype: torch.dtype) -> None:
    check_quantize(tokens, width, dtype, "cpu", share=0.8)


def test_bounds_nan_and_strides() -> None:
    check_bound("cpu")
    check_nan_reaches_the_result("cpu")
    check_strided_rows("cpu")


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (3, 96), (17, 1000)])
def test_the_norm_that_rounds_equals_the_norm_and_then_the_rounding(tokens: int, width: int, dtype: torch.dtype) -> None:
    check_norm_that_rounds(tokens, width, dtype, "cpu")


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (17, 1000)])
def test_the_product_that_rounds_equals_the_product_and_then_the_rounding(tokens: int, width: int, dtype: torch.dtype) -> None:
    check_silu_mul_that_rounds(tokens, width, dtype, "cpu")
