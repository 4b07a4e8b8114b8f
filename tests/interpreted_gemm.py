"""The small matrix products, interpreted on the CPU; `test_interpreted.py` runs this file in a process apart.

float32, float16 and FP8 only: the interpreter's bfloat16 dot is wrong.
"""

from __future__ import annotations

import os

import pytest
import torch
from gemm_checks import FP8, check_linear, check_partials, check_silu_mul, make_case, relative_error
from products import some_of

from workstation.kernels import gemm, gemm_launch
from workstation.kernels.tuning import GemmConfig

assert os.environ["TRITON_INTERPRET"] == "1" and gemm.FORCE_TRITON

F16, F32 = torch.float16, torch.float32
Dtypes = tuple[torch.dtype, torch.dtype]
DTYPES = [(F32, F32), (F16, F16), (FP8, FP8), (F16, FP8), (F32, FP8)]  # of x and of the weight
# Tails everywhere: rows beyond a tile, channels off the tile, K off the step and off the chunk.
SHAPES = [(1, 64, 64), (3, 80, 208), (33, 80, 144)]
CONFIGS = {
    "whole": GemmConfig("dot", 64, 16, 64, 1), "split": GemmConfig("dot", 32, 32, 32, 3),
    "more splits than steps": GemmConfig("dot", 64, 16, 128, 7),
}  # fmt: skip
GEMVS = {"whole": GemmConfig("gemv", 16, 1, 64), "split": GemmConfig("gemv", 8, 1, 128, 3)}


@some_of(dtypes=DTYPES, shape=SHAPES, config=CONFIGS)
def test_the_product_of_any_shape(shape: tuple[int, int, int], dtypes: Dtypes, config: GemmConfig) -> None:
    (m, n, k), (x, weight) = shape, dtypes
    check_linear(make_case(m, n, k, x=x, weight=weight, bias=m == 3), config, F16 if x == F16 else F32)


@some_of(dtypes=DTYPES, config=GEMVS, shape=[(32, 256), (48, 208)])
def test_a_single_row_on_the_cuda_cores(shape: tuple[int, int], dtypes: Dtypes, config: GemmConfig) -> None:
    (n, k), (x, weight) = shape, dtypes
    check_linear(make_case(1, n, k, x=x, weight=weight, bias=True), config, F32)
    check_silu_mul(make_case(1, n, k, x=x, weight=weight, bias=True), config, F32)


@some_of(1, dtypes=DTYPES, config=CONFIGS)
def test_gate_and_up_meet_in_one_kernel_or_in_the_sum(dtypes: Dtypes, config: GemmConfig) -> None:
    x, weight = dtypes
    check_silu_mul(make_case(5, 160, 208, x=x, weight=weight, bias=True), config, F32)


@some_of(1, dtypes=DTYPES, config=CONFIGS)
def test_the_parts_sum_to_the_product(dtypes: Dtypes, config: GemmConfig) -> None:
    x, weight = dtypes
    check_partials(make_case(5, 96, 400, x=x, weight=weight, bias=True), config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_residual_is_added_once(config: GemmConfig) -> None:
    case = make_case(19, 96, 208, x=F16, weight=F16)
    case.residual = torch.randn(19, 96, dtype=F16) * 20
    check_linear(case, config, F16)


def test_every_output_element_is_written_and_nothing_else() -> None:
    case, config = make_case(19, 80, 208, x=F16, weight=F16), GemmConfig("dot", 64, 16, 64, 1)
    buffer = torch.full((21, 80), torch.nan)
    gemm_launch.gemm_call(case.operands, config, buffer[1:20], 19, 80, 208, silu=False).launch()
    assert relative_error(buffer[1:20], case.expected()) < 1e-3
    assert buffer[[0, 20]].isnan().all()


def test_what_lies_behind_the_rows_and_the_channels_is_not_read() -> None:
    """Neighbours of x and of the weight in memory are NaN."""
    case, config = make_case(5, 48, 144, x=F16, weight=F16), GemmConfig("dot", 64, 16, 64, 2)
    x, weight = torch.full((16, 208), torch.nan, dtype=F16), torch.full((64, 208), torch.nan, dtype=F16)
    x[:5, :144], weight[:48, :144] = case.x, case.weight
    expected = case.expected()
    case.x, case.weight = x[:5, :144], weight[:48, :144]
    assert relative_error(gemm_launch.run_linear(case.operands, config, F32), expected) < 1e-3


def test_a_split_sum_repeats_bit_for_bit() -> None:
    case, config = make_case(4, 64, 256, x=F16, weight=F16), GemmConfig("dot", 64, 16, 32, 4)
    first = gemm_launch.run_linear(case.operands, config, F32)
    assert all(torch.equal(first, gemm_launch.run_linear(case.operands, config, F32)) for _ in range(2))


@some_of(1, config={"dot": GemmConfig("dot", 32, 16, 32), "gemv": GemmConfig("gemv", 8, 1, 64)}, x=[F16, F32])
def test_every_fp8_code_read_as_a_byte_is_its_value(x: torch.dtype, config: GemmConfig) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # NaN
    case = make_case(1, 256, 256, x=x, weight=FP8)
    case.weight = torch.zeros(256, 256, dtype=torch.uint8).fill_diagonal_(1) * codes  # each code meets one x
    case.x = torch.ones(1, 256, dtype=x)
    case.weight_scale = torch.ones(256)
    out = gemm_launch.run_linear(case.operands, config, F32)
    assert torch.equal(out[0], codes.view(FP8).float())


@pytest.mark.parametrize("m", [1, 9, 40])
def test_both_sides_of_the_door_agree(m: int) -> None:
    for x, weight in ((F16, F16), (FP8, FP8), (F16, FP8)):
        case = make_case(m, 96, 272, x=x, weight=weight, bias=True)
        inputs = (case.x, case.weight, case.weight_scale, case.x_scale, case.bias)
        assert relative_error(gemm.linear(*inputs, out_dtype=F32), case.expected()) < 1e-3
        gate, up = case.expected().chunk(2, -1)
        assert relative_error(gemm.linear_silu_mul(*inputs, out_dtype=F32), gate * gate.sigmoid() * up) < 1e-3


def test_the_door_falls_back_where_no_kernel_reads_the_layout() -> None:
    """K and N off 16, rows that start between 16-byte lines, more rows than the kernels serve."""
    for m, n, k in ((3, 40, 64), (3, 48, 72), (257, 32, 32)):
        case = make_case(m, n, k, x=F16, weight=F16)
        assert relative_error(gemm.linear(case.x, case.weight), case.expected()) < 1e-3
    wide = torch.randn(4, 65, dtype=F16)
    weight = torch.randn(32, 64, dtype=F16)
    assert relative_error(gemm.linear(wide[:, 1:], weight), wide[:, 1:].double() @ weight.double().t()) < 1e-3


def test_a_step_without_rows_gives_no_rows() -> None:
    case = make_case(0, 64, 64, x=F16, weight=F16)
    config = GemmConfig("dot", 64, 16, 32, 2)
    assert gemm_launch.run_linear(case.operands, config, F16).shape == (0, 64)
    assert gemm_launch.run_partials(case.operands, config).shape == (2, 0, 64)
    assert gemm.linear(case.x, case.weight).shape == (0, 64)
    assert gemm.linear_silu_mul(case.x, case.weight).shape == (0, 32)
