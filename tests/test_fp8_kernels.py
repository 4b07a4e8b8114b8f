"""The FP8 operations' plain-torch twins, and the compiled kernels on a GPU; the interpreter runs the same checks."""

from __future__ import annotations

import pytest
import torch
from fp8_checks import (
    SHAPES,
    check_bound,
    check_linear,
    check_nan_reaches_the_result,
    check_nan_stays,
    check_norm_that_rounds,
    check_quantize,
    check_silu_mul_that_rounds,
    check_strided_rows,
    check_writing_into_a_buffer,
    exact,
    random_layer,
    relative_error,
)

from workstation.kernels import ops, reference_fp8
from workstation.kernels.quantized import Rounding

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)  # float32 is never rounded to FP8
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@DTYPES
@pytest.mark.parametrize("blocked", [False, True], ids=["rows", "blocks"])
@pytest.mark.parametrize(("tokens", "rows", "columns"), SHAPES)
def test_a_linear_layer_with_fp8_weights(tokens: int, rows: int, columns: int, blocked: bool, dtype: torch.dtype) -> None:
    check_linear(tokens, rows, columns, blocked=blocked, bias=tokens % 2 == 1, dtype=dtype, device="cpu")


@pytest.mark.parametrize("blocked", [False, True], ids=["rows", "blocks"])
def test_weights_are_widened_a_few_rows_at_a_time(blocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_fp8, "CHUNK_ELEMENTS", 1)
    check_linear(7, 300, 200, blocked=blocked, bias=True, dtype=torch.float32, device="cpu")


def test_float16_does_not_overflow_before_the_scale() -> None:
    """448 · 300 · 64 is beyond float16; times the scale it is not."""
    weight = torch.full((16, 64), 448.0).to(torch.float8_e4m3fn)
    out = ops.linear_fp8(torch.full((1, 64), 300.0, dtype=torch.float16), weight, torch.full((16,), 1e-4))
    torch.testing.assert_close(out.float(), torch.full((1, 16), 448 * 300 * 64 * 1e-4), rtol=2e-3, atol=0.0)


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(2, 16), (3, 96), (17, 1000)])
def test_activations_are_quantised_per_token(tokens: int, width: int, dtype: torch.dtype) -> None:
    check_quantize(tokens, width, dtype, "cpu")


def test_a_bound_limits_the_scale_and_values_saturate() -> None:
    check_bound("cpu")


def test_nan_is_not_hidden_by_rounding() -> None:
    check_nan_stays("cpu")
    check_nan_reaches_the_result("cpu")


def test_rows_may_lie_apart() -> None:
    check_strided_rows("cpu")


def test_no_tokens_give_no_rows() -> None:
    weight, scale = random_layer(32, 16, False, "cpu")
    assert ops.linear_fp8(torch.empty(0, 16), weight, scale).shape == (0, 32)
    assert ops.quantize_fp8(torch.empty(0, 16), Rounding()).scale.shape == (0,)


def test_a_misshapen_argument_is_refused_by_name() -> None:
    weight, scale = random_layer(32, 16, False, "cpu")
    x = torch.zeros(2, 16)
    with pytest.raises(ValueError, match=r"x .*must be"):
        ops.linear_fp8(torch.zeros(2, 15), weight, scale)
    with pytest.raises(ValueError, match=r"weight .*e4m3"):
        ops.linear_fp8(x, weight.float(), scale)
    with pytest.raises(ValueError, match="scale "):
        ops.linear_fp8(x, weight, scale[:5])
    with pytest.raises(ValueError, match="scale "):
        ops.linear_fp8(x, weight, scale.double())
    with pytest.raises(ValueError, match="bias "):
        ops.linear_fp8(x, weight, scale, torch.zeros(3))


@pytest.mark.gpu
@GPU
@DTYPES
@pytest.mark.parametrize("blocked", [False, True], ids=["rows", "blocks"])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [*SHAPES, (200, 1024, 4096), (1000, 512, 1024)])
def test_weight_only_on_a_gpu(tokens: int, rows: int, columns: int, blocked: bool, dtype: torch.dtype) -> None:
    check_linear(tokens, rows, columns, blocked=blocked, bias=tokens % 2 == 1, dtype=dtype, device="cuda")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [*SHAPES, (1, 6144, 4096), (16, 4096, 14336), (300, 512, 1024)])
def test_quantised_activations_on_a_gpu(tokens: int, rows: int, columns: int, bias: bool, dtype: torch.dtype) -> None:
    check_linear(tokens, rows, columns, blocked=False, bias=bias, dtype=dtype, device="cuda", quantized=True)


@pytest.mark.gpu
@GPU
def test_float32_on_a_gpu_does_not_round_its_activations() -> None:
    check_linear(9, 256, 512, blocked=False, bias=True, dtype=torch.float32, device="cuda")
    weight, scale = random_layer(256, 512, False, "cuda")
    x = torch.randn(9, 512, device="cuda")
    assert relative_error(ops.linear_fp8(x, weight, scale), exact(x, weight, scale, None)) < 2e-6


@pytest.mark.gpu
@GPU
@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(2, 16), (3, 96), (17, 1000), (5, 28672)])
def test_activations_are_quantised_per_token_on_a_gpu(tokens: int, width: int, dtype: torch.dtype) -> None:
    check_quantize(tokens, width, dtype, "cuda")


@pytest.mark.gpu
@GPU
def test_bounds_nan_and_strides_on_a_gpu() -> None:
    check_bound("cuda")
    check_nan_stays("cuda")
    check_nan_reaches_the_result("cuda")
    check_strided_rows("cuda")


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (17, 1000)])
def test_the_norm_that_rounds_equals_the_norm_and_then_the_rounding(tokens: int, width: int, dtype: torch.dtype) -> None:
    check_norm_that_rounds(tokens, width, dtype, "cpu")


@GPU
@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (17, 1000), (128, 8192)])
def test_the_norm_that_rounds_on_a_gpu(tokens: int, width: int, dtype: torch.dtype) -> None:
    check_norm_that_rounds(tokens, width, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (17, 1000)])
def test_the_product_that_rounds_equals_the_product_and_then_the_rounding(tokens: int, width: int, dtype: torch.dtype) -> None:
    check_silu_mul_that_rounds(tokens, width, dtype, "cpu")


@pytest.mark.parametrize("quantized", [False, True])
def test_a_result_can_be_written_into_a_given_buffer(quantized: bool) -> None:
    check_writing_into_a_buffer(5, "cpu", torch.bfloat16, quantized=quantized)


@GPU
@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (17, 1000), (300, 14336), (5, 28672)])
def test_the_product_that_rounds_on_a_gpu(tokens: int, width: int, dtype: torch.dtype) -> None:
    check_silu_mul_that_rounds(tokens, width, dtype, "cuda")


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [5, 300])
def test_a_result_can_be_written_into_a_given_buffer_on_a_gpu(tokens: int, dtype: torch.dtype, quantized: bool) -> None:
    check_writing_into_a_buffer(tokens, "cuda", dtype, quantized=quantized)
