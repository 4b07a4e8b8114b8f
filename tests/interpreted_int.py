"""Products with integer weights, interpreted on the CPU; `test_interpreted.py` runs this file in a process apart.

float32 and float16 only: the interpreter's bfloat16 dot is wrong.
"""

from __future__ import annotations

import os

import pytest
import torch
from int_checks import check_door, check_product, check_widening, make_case
from products import some_of

from workstation.kernels import launch_int, ops
from workstation.kernels.tuning import GemmConfig

assert os.environ["TRITON_INTERPRET"] == "1" and ops.FORCE_TRITON

F16, F32 = torch.float16, torch.float32
# Tails everywhere: channels off the tile, rows of the last chunk that are not there, groups of every kind.
Shape = tuple[int, int, int, int]
SHAPES = [(1, 64, 256, 128), (5, 96, 384, 32), (3, 80, 192, 64), (20, 64, 320, 320), (4, 64, 512, 256)]  # M, N, K, of a group
CONFIGS = {
    "whole": GemmConfig("dot", 64, 16, 128, 1), "split": GemmConfig("dot", 32, 32, 128, 3),
    "long steps": GemmConfig("dot", 64, 16, 256, 1),
}  # fmt: skip


@some_of(shape=SHAPES, config=CONFIGS, zeros=[False, True], bits=[4, 8])
def test_the_product_of_any_shape(shape: Shape, config: GemmConfig, zeros: bool, bits: int) -> None:
    m, n, k, size = shape
    dtype = F16 if zeros else F32
    check_product(make_case(m, n, k, bits=bits, size=size, zeros=zeros, dtype=dtype), config, F32)


@some_of(shape=SHAPES, scale=[torch.bfloat16, F16, F32], zeros=[False, True], bits=[4, 8])
def test_widened_weights_are_bit_for_bit_the_twins(shape: Shape, scale: torch.dtype, zeros: bool, bits: int) -> None:
    m, n, k, size = shape
    check_widening(make_case(m, n, k, bits=bits, size=size, zeros=zeros, dtype=F16, scale=scale), F16)


@some_of(1, m=[257, 2, 40], form=[(4, 128), (8, 256), (4, 32)])
def test_both_sides_of_the_door_agree(m: int, form: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_int, "SCRATCH_BYTES", 1 << 14)  # widened in parts
    bits, size = form
    check_door(make_case(m, 96, 256, bits=bits, size=size, zeros=size == 128, dtype=F16))


def test_a_step_without_rows_gives_no_rows() -> None:
    x, weight, _ = make_case(0, 96, 256, bits=4, size=128, zeros=True, dtype=F16)
    assert ops.linear_int(x, weight).shape == (0, 96)


def test_groups_and_widths_that_no_kernel_reads_are_widened() -> None:
    check_door(make_case(3, 40, 72, bits=4, size=24, zeros=True, dtype=F16))
    check_door(make_case(3, 64, 240, bits=8, size=48, zeros=False, dtype=F16))
