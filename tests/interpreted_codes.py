"""Products with 4-bit codes, interpreted on the CPU; `test_code_kernels.py` runs this file in a process apart.

float32 and float16 only: the interpreter's bfloat16 dot is wrong.
"""

from __future__ import annotations

import os

import pytest
import torch
from code_checks import FORMS, check_door, check_product, check_widening, make_case, make_weight

from workstation.kernels import launch_int, ops
from workstation.kernels.tuning import GemmConfig

assert os.environ["TRITON_INTERPRET"] == "1" and ops.FORCE_TRITON

F16, F32 = torch.float16, torch.float32
EVERY = pytest.mark.parametrize("form", FORMS)
# Tails everywhere: channels off the tile, rows of the last chunk that are not there, a step of which half is not there.
SHAPES = [(1, 64, 256), (5, 96, 384), (3, 80, 192), (20, 64, 320)]
CONFIGS = [GemmConfig("dot", 64, 16, 128, 1), GemmConfig("dot", 32, 32, 128, 3), GemmConfig("dot", 64, 16, 256, 2)]


@EVERY
@pytest.mark.parametrize("config", CONFIGS, ids=["whole", "split", "long steps"])
def test_the_product_of_any_shape(form: str, config: GemmConfig) -> None:
    for m, n, k in SHAPES:
        if k % FORMS[form][1] == 0:
            check_product(make_case(m, n, k, form, F32), config, F32)
    check_product(make_case(7, 64, 256, form, F16), config, F32)


@EVERY
def test_widened_weights_are_bit_for_bit_the_twins(form: str) -> None:
    for n, k in ((40, 256), (33, 192), (32, 320)):
        if k % FORMS[form][1] == 0:
            check_widening(make_weight(n, k, form), F32)
            check_widening(make_weight(n, k, form), F16)


def test_the_smallest_exponent_is_a_subnormal_number() -> None:
    weight = make_weight(32, 128, "mxfp4")
    weight.scale.zero_()
    check_widening(weight, F32)


@pytest.mark.parametrize("m", [0, 2, 40, 257])
def test_both_sides_of_the_door_agree(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_int, "SCRATCH_BYTES", 1 << 14)  # widened in parts
    for form in ("nf4", "mxfp4", "nvfp4_divided"):
        case = make_case(m, 96, 256, form, F16)
        if m:
            check_door(case)
        else:
            assert ops.linear_codes(case[0], case[1]).shape == (0, 96)


def test_groups_and_widths_that_no_kernel_reads_are_widened() -> None:
    check_door(make_case(3, 40, 192, "nf4", F16))
    x, weight, bias = make_case(3, 64, 256, "fp4_128", F16)
    narrow = weight._replace(scale=torch.rand(32, 64), size=8)
    check_door((x, narrow, bias))
