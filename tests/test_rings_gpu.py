"""Rings of every kind of weight over several rounds of programs: a race shows as bits that differ from run to run.

One that did: a step's slot was given back while another warp's loads of its scales were under way, and the next copy overtook
them when a neighbouring program, adding parts of K, had emptied the first-level cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from workstation.kernels.code_tables import E2M1, NF4, ScaleKind
from workstation.kernels.code_weights import CodeWeight
from workstation.kernels.gemm_launch import FP8, Operands, run_linear
from workstation.kernels.int_weights import IntWeight
from workstation.kernels.launch_hopper import is_hopper
from workstation.kernels.tuning import FEW_ROWS, GemmConfig

ON_HOPPER = pytest.mark.skipif(not (torch.cuda.is_available() and is_hopper(torch.device("cuda", 0))),
                               reason="needs a Hopper GPU")
N, K, ROWS = 6144, 8192, 128
RUNS = 300


def words(columns: int) -> torch.Tensor:
    return torch.randint(-(1 << 15), 1 << 15, (N, columns), dtype=torch.int16, device="cuda")


def numbers(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, device="cuda") + 0.5


def small_floats(low: int, high: int, groups: int) -> torch.Tensor:
    return torch.randint(low, high, (groups // 4, N, 4), dtype=torch.uint8, device="cuda").view(torch.int32)[..., 0]


def operands(scheme: str) -> Operands:
    x = (torch.randn(ROWS, K, device="cuda") * K**-0.5).to(torch.bfloat16)
    table = {"nf4": NF4}.get(scheme, E2M1)
    values = torch.tensor(table, device="cuda")
    weight: Any
    if scheme == "16bit":
        return Operands(x, torch.randn(N, K, device="cuda").to(torch.bfloat16))
    if scheme == "fp8":
        return Operands(torch.randn(ROWS, K, device="cuda").to(FP8), torch.randn(N, K, device="cuda").to(FP8), numbers(N),
                        numbers(ROWS))
    if scheme == "int4":
        weight = IntWeight(words(K // 4), numbers(K // 128, N).to(torch.bfloat16), None, 4, 128, K)
    elif scheme == "nf4":
        weight = CodeWeight(words(K // 4), numbers(K // 64, N), None, values, table, ScaleKind.F32, 64, K)
    elif scheme == "mxfp4":
        weight = CodeWeight(words(K // 4), small_floats(124, 128, K // 32), None, values, table, ScaleKind.E8M0, 32, K)
    else:
        weight = CodeWeight(words(K // 4), small_floats(0x30, 0x40, K // 16), numbers(N), values, table, ScaleKind.E4M3, 16, K)
    return Operands(x, weight)


@pytest.mark.gpu
@ON_HOPPER
@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("scheme", ["16bit", "fp8", "int4", "nf4", "mxfp4", "nvfp4"])
def test_a_product_has_the_same_bits_every_time(scheme: str, splits: int) -> None:
    given = operands(scheme)
    torch.cuda.synchronize()  # a ring reads its weights before the kernel in front has ended
    step = {"16bit": 128}.get(scheme, 256)
    config = GemmConfig("hopper", 64, 32, step, splits, 4, 2 if scheme not in ("16bit", "fp8") else 3, True)
    first = run_linear(given, config, torch.bfloat16)
    different = [run for run in range(RUNS) if not torch.equal(run_linear(given, config, torch.bfloat16), first)]
    assert torch.isfinite(first).all()
    assert different == []


@pytest.mark.gpu
@ON_HOPPER
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_a_product_of_few_rows_has_the_same_bits_every_time(splits: int) -> None:
    given = operands("int4")
    given = replace(given, x=given.x[:2])
    torch.cuda.synchronize()
    config = GemmConfig("hopper", 64, FEW_ROWS, 256, splits, 4, 2, True)
    first = run_linear(given, config, torch.bfloat16)
    different = [run for run in range(RUNS) if not torch.equal(run_linear(given, config, torch.bfloat16), first)]
    assert torch.isfinite(first).all()
    assert different == []
