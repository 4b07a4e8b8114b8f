"""Products with 4-bit codes, interpreted on the CPU; `test_interpreted.py` runs this file in a process apart.

float32 and float16 only: the interpreter's bfloat16 dot is wrong.
"""

from __future__ import annotations

import os

import pytest
import torch
from code_checks import FORMS, check_door, check_product, check_widening, expected, make_case, make_weight
from gemm_checks import TOLERANCE, relative_error

from workstation.kernels import launch_int, ops
from workstation.kernels.tuning import GemmConfig

assert os.environ["TRITON_INTERPRET"] == "1" and ops.FORCE_TRITON

F16, F32 = torch.float16, torch.float32
# Tails everywhere: channels off the tile, rows of the last chunk that are not there, a step of which half is not there.
SPLIT, LONG = GemmConfig("dot", 32, 16, 128, 2), GemmConfig("dot", 32, 16, 256, 1)


@pytest.mark.parametrize(("form", "config", "shape", "dtype"), [
    ("nf4_32", SPLIT, (3, 48, 192), F16), ("mxfp4", SPLIT, (3, 32, 192), F32), ("nf4", LONG, (2, 32, 320), F32),
    ("nvfp4_divided", LONG, (17, 32, 320), F16)])  # fmt: skip
def test_the_product_of_any_shape(form: str, config: GemmConfig, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_product(make_case(*shape, form, dtype), config, F32)


@pytest.mark.parametrize("form", FORMS)
def test_widened_weights_are_bit_for_bit_the_twins(form: str) -> None:
    check_widening(make_weight(33, 256 if form == "fp4_128" else 192, form), F16)


def test_the_smallest_exponent_is_a_subnormal_number() -> None:
    weight = make_weight(32, 128, "mxfp4")
    weight.scale.zero_()
    check_widening(weight, F32)


@pytest.mark.parametrize("form", ["fp4_128", "nvfp4"])
def test_both_sides_of_the_door_agree(form: str) -> None:
    check_door(make_case(2, 32, 128, form, F16))
    x, weight, _ = make_case(0, 32, 128, form, F16)
    assert ops.linear_codes(x, weight).shape == (0, 32)


def test_many_rows_meet_widened_weights_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_int, "SCRATCH_BYTES", 1 << 12)
    x, weight, bias = case = make_case(257, 32, 128, "mxfp4", F16)
    assert relative_error(ops.linear_codes(x, weight, bias), expected(case)) < 2 * TOLERANCE[F16]


def test_groups_and_widths_that_no_kernel_reads_are_widened() -> None:
    check_door(make_case(3, 40, 128, "nf4", F16))
    x, weight, bias = make_case(3, 64, 256, "fp4_128", F16)
    narrow = weight._replace(scale=torch.rand(32, 64), size=8)
    check_door((x, narrow, bias))
