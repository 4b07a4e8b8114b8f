"""Products with integer weights: the kernels compiled for GPUs that are not here, and on one that is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gemm_checks import TOLERANCE, relative_error
from int_checks import Case, check_door, check_product, check_widening, expected, make_case
from products import some_of
from test_tuning import A100, B200, H200, L40S, PRO_6000

from workstation.kernels import launch_int, ops
from workstation.kernels.gemm_compile import compile_call, compile_for, int_types
from workstation.kernels.gemm_launch import Operands, run_linear
from workstation.kernels.launch_hopper import is_hopper
from workstation.kernels.launch_int import _serves_wide, fitted, int_call, rings_serve, scheme_of, widen_call
from workstation.kernels.offline import Resources, resources
from workstation.kernels.tuning import Device, GemmConfig, Output, Problem, choose, default_config, is_wide, shared_bytes

DEVICES = [A100, L40S, H200, B200, PRO_6000]
ARCHITECTURES = pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
# (bits, columns of a group, zero points): GPTQ and packed, AWQ, whole rows, narrow groups, 8 bits.
FORMS = [(4, 128, False), (4, 128, True), (4, 4096, False), (4, 32, True), (8, 4096, False), (8, 128, True)]

# Triton 3.6's assembler parks up to 16 bytes on sm_80, at 168 registers of 255; more than that would be spills.
PARKED = 16


@pytest.fixture(autouse=True)
def settled_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 warns until multiply-add fusion, which we want, is asked for by name."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def compiled(device: Device, form: tuple[int, int, bool], output: Output, m: int) -> tuple[Any, Resources]:
    bits, size, zeros = form
    weight = int_types(bits, size, 4096, zeros=zeros)
    n = 28672 if output == "silu_mul" else 6144
    problem = Problem(scheme_of(weight), output, m, n, 4096)
    config = fitted(default_config(problem, device, rings=rings_serve(weight, output)), weight, torch.bfloat16)
    silu = output == "silu_mul"
    x: Any = torch.bfloat16
    call = int_call(Operands(x, weight), config, torch.bfloat16, m, n // 2 if silu else n, 4096, silu=silu)
    kernel = compile_call(call, device.capability)
    return kernel, resources(kernel)


def check_fits(device: Device, form: tuple[int, int, bool], output: Output, m: int) -> None:
    _, needed = compiled(device, form, output, m)
    assert needed.shared <= device.shared_bytes
    assert needed.stack <= PARKED


@some_of(1, device={device.name: device for device in DEVICES}, product=[(FORMS[0], "silu_mul", 1), (FORMS[1], "linear", 64)])
def test_a_computed_configuration_compiles_and_fits(device: Device, product: tuple[tuple[int, int, bool], Output, int]) -> None:
    check_fits(device, *product)


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
    assembly = compile_for(problem, default_config(problem, H200, rings=False), H200.capability).asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n16k16" in assembly and "mma.sync" not in assembly
    loop = assembly[assembly.index("cp.async.wait_group"):assembly.rindex("wgmma.mma_async")]
    assert "ldmatrix" in loop and "st.shared" not in loop


@pytest.mark.parametrize("m", [1, 32])
def test_a_ring_s_products_of_a_group_are_in_flight_together(m: int) -> None:
    """The compiler waits for each product by itself where registers are too few: half the speed."""
    problem = Problem("int4", "silu_mul", m, 28672, 4096)
    config = default_config(problem, H200)
    assert config.kind == "hopper"
    kernel = compile_for(problem, config, H200.capability)
    products = kernel.asm["ptx"].count("wgmma.mma_async")
    assert products == 32 and kernel.asm["sass"].count("WARPGROUP.DEPBAR") == 2  # one a group of 128 columns


def test_programmatic_launch_prefetches_before_it_waits() -> None:
    problem = Problem("int4", "linear", 1, 6144, 4096)
    assembly = compile_for(problem, GemmConfig("dot", 64, 16, 128, 1, 4, 3, pdl=True), H200.capability).asm["ptx"]
    order = [assembly.index(word) for word in ("prefetch.global.L2", "griddepcontrol.wait", "cp.async")]
    assert order == sorted(order)


@pytest.mark.parametrize(("size", "dtype", "served"), [(128, torch.bfloat16, True), (4096, torch.bfloat16, False),
                                                       (256, torch.bfloat16, False), (128, torch.float16, False)])
def test_measured_programs_of_256_channels_are_for_weights_that_meet_their_scales_only(
        size: int, dtype: torch.dtype, served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = make_case(100, 64, 4096, bits=4, size=size, zeros=False, dtype=dtype)
    weight = weight._replace(scale=weight.scale.bfloat16())
    measured = choose(Problem("int4", "silu_mul", 100, 28672, 4096), H200)
    assert is_wide("silu_mul", measured)
    monkeypatch.setattr(launch_int, "_cached_choice", lambda *_: measured)
    assert (launch_int._choose(x, weight, "silu_mul") is not None) == served


@pytest.mark.parametrize(("bits", "step", "size"), [(8, 128, 128), (8, 128, 32), (4, 256, 128), (4, 512, 64), (8, 256, 128)])
@pytest.mark.parametrize("block_n", [128, 256])
def test_a_step_is_whole_runs_of_what_is_in_flight_together(bits: int, step: int, size: int, block_n: int) -> None:
    config = GemmConfig("hopper", block_n, 128, step, 1, 8, 2, True)
    weight = int_types(bits, size, 4096)
    options = int_call(Operands(torch.bfloat16, weight), config, torch.bfloat16, 128, 1024, 4096, silu=False).options
    assert options["SCALED"] and step % (options["GROUPS"] * options["SPAN"]) == 0


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


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and is_hopper(torch.device("cuda", 0))), reason="needs a Hopper GPU")
@pytest.mark.parametrize("size", [32, 64])
def test_rings_serve_up_to_1024_rows_of_narrow_groups(size: int) -> None:
    for m, served in ((700, True), (1100, False)):
        case = make_case(m, 4096, 1024, bits=4, size=size, zeros=False, dtype=torch.bfloat16, device="cuda")
        config = launch_int._choose(case[0], case[1], "linear")
        assert (config is not None and config.kind == "hopper") == served
        check_door(case)


RINGS = [(4, 128, False), (4, 128, True), (4, 4096, False), (4, 32, False), (4, 64, False), (8, 4096, False), (8, 128, True)]


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and is_hopper(torch.device("cuda", 0))), reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", RINGS, ids=str)
def test_rings_multiply_integers_of_any_shape(form: tuple[int, int, bool], dtype: torch.dtype) -> None:
    bits, size, zeros = form
    step = 1024 // bits
    # (rows, of a tile, tiles and warpgroups, panels a step, splits)
    for m, block_m, tiles, teams, panels, splits in ((1, 8, 1, 1, 1, 3), (5, 16, 2, 1, 2, 1), (33, 32, 1, 2, 1, 1)):
        case = make_case(m, 1152, 4096, bits=bits, size=size, zeros=zeros, dtype=dtype, device="cuda")
        check_product(case, GemmConfig("hopper", 64 * tiles * teams, block_m, step * panels, splits, 4 * teams, 2, True), dtype)


MANY = GemmConfig("hopper", 128, 128, 256, 1, 8, 2, True)


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and is_hopper(torch.device("cuda", 0))), reason="needs a Hopper GPU")
@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("bits", "size"), [(4, 32), (4, 64), (4, 128), (4, 512), (8, 32), (8, 128)])
def test_many_rows_are_multiplied_by_weights_that_were_scaled(bits: int, size: int, scale: torch.dtype) -> None:
    """Where scales have x's type; else groups' sums are. Warpgroups with one tile or two, one alone, a gate and its up."""
    case = make_case(130, 1536, 4096, bits=bits, size=size, zeros=False, dtype=torch.bfloat16, device="cuda", scale=scale)
    check_many(case, bits)


def check_many(case: Case, bits: int) -> None:
    x, weight, bias = case
    two = replace(MANY, block_k=1024 // bits)
    operands, y = Operands(x, weight, bias=bias), expected(case)
    gate, up = y.chunk(2, -1)
    torch.cuda.synchronize()  # a ring reads its weights before the kernel in front has ended
    wide = _serves_wide(weight, x.dtype)
    for config in (two, replace(two, block_n=64, warps=4, splits=2), *[replace(two, block_n=256)] * wide):
        assert relative_error(run_linear(operands, config, x.dtype), y) < TOLERANCE[x.dtype]
    for channels in (64, 128) if wide else (64,):
        out = run_linear(operands, replace(two, block_n=channels), x.dtype, silu=True)
        assert relative_error(out, gate * gate.sigmoid() * up) < TOLERANCE[x.dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and is_hopper(torch.device("cuda", 0))), reason="needs a Hopper GPU")
@pytest.mark.parametrize("size", [128, 256])
def test_many_rows_beside_zero_points(size: int) -> None:
    check_many(make_case(300, 1536, 4096, bits=4, size=size, zeros=True, dtype=torch.bfloat16, device="cuda"), 4)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [600, 1000])
def test_the_door_agrees_with_the_oracle_on_more_rows_than_were_measured(m: int) -> None:
    for size, zeros in ((128, False), (64, False), (128, True), (4096, False)):
        check_door(make_case(m, 4096, 4096, bits=4, size=size, zeros=zeros, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.parametrize(("output", "block_n", "tiles"), [
    ("linear", 128, 1), ("silu_mul", 64, 1), ("linear", 256, 2), ("silu_mul", 128, 2)])
def test_many_rows_need_a_wait_for_256_columns_and_no_sums_of_groups(output: Output, block_n: int, tiles: int) -> None:
    """For 128 where a warpgroup has two tiles."""
    config = replace(MANY, block_n=block_n)
    kernel = compile_for(Problem("int4", output, 128, 28672, 4096), config, H200.capability)
    assembly, needed = kernel.asm["ptx"], resources(kernel)
    assert assembly.count("wgmma.mma_async") == 32 * tiles  # of two warpgroups
    assert kernel.asm["sass"].count("WARPGROUP.DEPBAR") == 2 * tiles
    assert "mul.rn.bf16x2" in assembly and needed.stack == 0
    assert needed.shared <= shared_bytes(Problem("int4", output, 128, 28672, 4096), config, 90) <= H200.shared_bytes
