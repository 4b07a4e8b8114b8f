"""Products with integer weights: the kernels in the interpreter, compiled for GPUs that are not here, and on one that is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from int_checks import check_door, check_product, check_widening, make_case
from test_tuning import A100, B200, H200, L40S, PRO_6000

from workstation.kernels import ops
from workstation.kernels.gemm_compile import compile_call, compile_for, int_types
from workstation.kernels.gemm_launch import Operands
from workstation.kernels.launch_hopper import is_hopper
from workstation.kernels.launch_int import fitted, int_call, scheme_of, widen_call
from workstation.kernels.offline import Resources, resources
from workstation.kernels.tuning import Device, GemmConfig, Output, Problem, default_config

ARCHITECTURES = pytest.mark.parametrize("device", [A100, L40S, H200, B200, PRO_6000], ids=lambda device: device.name)
# (bits, columns of a group, zero points): GPTQ and packed, AWQ, whole rows, narrow groups, 8 bits.
FORMS = [(4, 128, False), (4, 128, True), (4, 4096, False), (4, 32, True), (8, 4096, False), (8, 128, True)]

# Triton 3.6's assembler parks up to 16 bytes on sm_80, at 168 registers of 255; more than that would be spills.
PARKED = 16


@pytest.fixture(autouse=True)
def settled_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 warns until multiply-add fusion, which we want, is asked for by name."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def test_integer_products_hold_in_the_interpreter() -> None:
    """In a process of its own: whether Triton interprets or compiles is settled when it is first imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "WS_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_int.py"]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def compiled(device: Device, form: tuple[int, int, bool], output: Output, m: int) -> tuple[Any, Resources]:
    bits, size, zeros = form
    weight = int_types(bits, size, 4096, zeros=zeros)
    n = 28672 if output == "silu_mul" else 6144
    config = fitted(default_config(Problem(scheme_of(weight), output, m, n, 4096), device), weight)
    silu = output == "silu_mul"
    x: Any = torch.bfloat16
    call = int_call(Operands(x, weight), config, torch.bfloat16, m, n // 2 if silu else n, 4096, silu=silu)
    kernel = compile_call(call, device.capability)
    return kernel, resources(kernel)


def check_fits(device: Device, form: tuple[int, int, bool], output: Output, m: int) -> None:
    _, needed = compiled(device, form, output, m)
    assert needed.shared <= device.shared_bytes
    assert needed.stack <= PARKED


@ARCHITECTURES
@pytest.mark.parametrize(("form", "output", "m"), [(FORMS[0], "silu_mul", 1), (FORMS[1], "linear", 64)])
def test_a_computed_configuration_compiles_and_fits(
    device: Device, form: tuple[int, int, bool], output: Output, m: int,
) -> None:
    check_fits(device, form, output, m)


# Gate and up share a program but with narrow groups, or with zero points and many rows (`launch_int`).
@pytest.mark.long
@ARCHITECTURES
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("output", "m"), [("linear", 1), ("linear", 64), ("linear", 256), ("silu_mul", 16), ("silu_mul", 256)])
def test_every_kind_of_integers_compiles_and_fits(device: Device, form: tuple[int, int, bool], output: Output, m: int) -> None:
    if output == "silu_mul" and (form[1] < 64 or (form[2] and m > 16)):
        pytest.skip("not fused")
    check_fits(device, form, output, m)


@pytest.mark.parametrize("bits", [4, 8])
def test_widening_compiles_and_stores_sixteen_bytes_at_a_time(bits: int) -> None:
    for device in (A100, H200):
        kernel = compile_call(widen_call(int_types(bits, 128, 4096), torch.bfloat16), device.capability)
        assert resources(kernel).stack == 0 and "st.global.v4" in kernel.asm["ptx"]


def test_hopper_multiplies_integers_in_wgmma_from_registers() -> None:
    """Codes reach registers as words, by ldmatrix; widened weights never pass through shared memory."""
    problem = Problem("int4", "linear", 8, 6144, 4096)
    assembly = compile_for(problem, default_config(problem, H200), H200.capability).asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n16k16" in assembly and "mma.sync" not in assembly
    loop = assembly[assembly.index("cp.async.wait_group"):assembly.rindex("wgmma.mma_async")]
    assert "ldmatrix" in loop and "st.shared" not in loop


def test_programmatic_launch_prefetches_before_it_waits() -> None:
    problem = Problem("int4", "linear", 1, 6144, 4096)
    assembly = compile_for(problem, GemmConfig("dot", 64, 16, 128, 1, 4, 3, pdl=True), H200.capability).asm["ptx"]
    order = [assembly.index(word) for word in ("prefetch.global.L2", "griddepcontrol.wait", "cp.async")]
    assert order == sorted(order)


def test_a_misshapen_operand_is_refused_by_name() -> None:
    x, weight, bias = make_case(3, 32, 128, bits=4, size=128, zeros=False, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x .*\[T, K\]"):
        ops.linear_int(x[:, :64], weight)
    with pytest.raises(ValueError, match=r"scale .*\[G, N\]"):
        ops.linear_int(x, weight._replace(scale=weight.scale.t()))
    with pytest.raises(ValueError, match=r"bias .*\[N\]"):
        ops.linear_int(x, weight, bias[:5])
    with pytest.raises(ValueError, match=r"out .*\[T, N\]"):
        ops.linear_int(x, weight, None, torch.empty(3, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [(4, 128, False), (4, 128, True), (4, 32, True), (8, 4096, False), (8, 128, True)], ids=str)
def test_compiled_products_of_any_shape(form: tuple[int, int, bool], dtype: torch.dtype) -> None:
    bits, size, zeros = form
    for m in (1, 33, 256):
        case = make_case(m, 1056, 4096, bits=bits, size=size, zeros=zeros, dtype=dtype, device="cuda")
        block_m = min(64, max(16, 1 << (m - 1).bit_length()))
        for splits in (1, 3):
            check_product(case, GemmConfig("dot", 64, block_m, 128, splits, 4, 3, pdl=m == 33), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 100, 300])
def test_the_door_agrees_with_the_oracle_on_a_gpu(m: int) -> None:
    for bits, size, zeros in FORMS:
        case = make_case(m, 1056, 4096, bits=bits, size=size, zeros=zeros, dtype=torch.bfloat16, device="cuda")
        check_door(case)
        check_widening(case, torch.bfloat16)


RINGS = [(4, 128, False), (4, 128, True), (4, 4096, False), (4, 32, True), (4, 64, False), (8, 4096, False), (8, 128, True)]


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and is_hopper(torch.device("cuda", 0))), reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", RINGS, ids=str)
def test_rings_multiply_integers_of_any_shape(form: tuple[int, int, bool], dtype: torch.dtype) -> None:
    bits, size, zeros = form
    step = 1024 // bits
    for m, block_m in ((1, 8), (5, 16), (33, 32), (100, 64)):
        case = make_case(m, 1152, 4096, bits=bits, size=size, zeros=zeros, dtype=dtype, device="cuda")
        for tiles, panels, splits in ((1, 1, 1), (2, 1, 3), (1, 2, 1)):
            check_product(case, GemmConfig("hopper", 64 * tiles, block_m, step * panels, splits, 4, 2, True), dtype)
