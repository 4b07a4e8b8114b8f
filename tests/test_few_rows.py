"""What products of few rows with 4-bit codes rest on, where no GPU is needed. Their results: `test_few_rows_gpu.py`."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from ptx_words import run
from test_tuning import H200

from workstation.kernels import tuning
from workstation.kernels.code_tables import E2M1
from workstation.kernels.gemm_compile import compile_for, int_types
from workstation.kernels.gemm_few_hopper import E2M1_FIRST, E2M1_SECOND
from workstation.kernels.launch_int import fitted
from workstation.kernels.offline import resources
from workstation.kernels.tuning import FEW_ROWS, GemmConfig, Output, Problem, Scheme

PARKED = 16  # bytes outside the loop, by Triton 3.9's assembler; 3.6's parks none
FEW = GemmConfig("hopper", 64, FEW_ROWS, 256, 1, 4, 4, True)


@pytest.fixture(autouse=True)
def settled_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 warns until multiply-add fusion, which we want, is asked for by name."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def test_a_code_in_a_byte_is_the_e4m3_number_of_its_512th() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(codes.view(torch.float8_e4m3fn).float() * 512, codes.float())


def test_an_e2m1_code_is_put_where_an_e4m3_number_has_it_but_for_a_power_of_two() -> None:
    words = np.arange(1 << 16, dtype=np.uint32) * np.uint32(0x9E3779B1)
    codes = torch.from_numpy(words.view(np.uint8).copy())
    for assembly, found in ((E2M1_FIRST, codes & 15), (E2M1_SECOND, codes >> 4)):
        (placed,) = run(assembly.value, 1, _1=words)
        numbers = torch.from_numpy(placed.view(np.uint8).copy()).view(torch.float8_e4m3fn).double() * 64
        assert torch.equal(numbers, torch.tensor(E2M1, dtype=torch.float64)[found.long()])


def test_a_bfloat16_number_is_the_sum_of_two_e4m3_ones() -> None:
    exponents = torch.arange(-2, 8).repeat_interleave(256)
    mantissas = torch.arange(256).repeat(10)
    x = ((1 + (mantissas & 127) / 128) * 2.0**exponents * torch.where(mantissas < 128, 1, -1)).float()  # up to 2^10 apart
    high = (x.view(torch.int32) & -(1 << 20)).view(torch.float32)
    assert torch.equal(high.to(torch.float8_e4m3fn).float() + (x - high).to(torch.float8_e4m3fn).float(), x)


@pytest.mark.parametrize(("output", "m"), [("linear", 1), ("silu_mul", 1), ("linear", 4), ("silu_mul", 4)])
def test_codes_go_into_fp8_products_from_registers(output: Output, m: int) -> None:
    n = 28672 if output == "silu_mul" else 6144
    problem = Problem("int4", output, m, n, 4096)
    compiled = compile_for(problem, FEW, H200.capability)
    assembly, needed = compiled.asm["ptx"], resources(compiled)
    assert "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3" in assembly and "mma.sync" not in assembly
    loop = assembly[assembly.index("wgmma.mma_async"):assembly.rindex("wgmma.mma_async")]
    assert "ldmatrix" in loop and "cvt.rn" not in loop and "fma.rn.bf16" not in loop
    assert needed.stack == 0 and needed.shared <= tuning.shared_bytes(problem, FEW, H200.capability) <= H200.shared_bytes


@pytest.mark.parametrize(("scheme", "m"), [("int4", 1), ("int4", 4), ("mxfp4", 1), ("nvfp4", 2)])
def test_products_of_a_step_are_in_flight_together(scheme: Scheme, m: int) -> None:
    kernel = compile_for(Problem(scheme, "silu_mul", m, 28672, 4096), FEW, H200.capability)
    assert kernel.asm["ptx"].count("wgmma.mma_async") == 16 and kernel.asm["sass"].count("WARPGROUP.DEPBAR") == 1


SINGLE = ("LOP3", "SHF", "IMAD.SHL")  # instructions that write one register


def overwritten(sass: str) -> list[str]:
    """Instructions that write a register from which a product in flight still reads codes."""
    lines = sass.splitlines()
    products = [number for number, line in enumerate(lines) if "QGMMA" in line]
    waiting = next(number for number in range(products[-1], len(lines)) if "WARPGROUP.DEPBAR" in lines[number])
    found = []
    for number in products:
        first = int(re.findall(r" R(\d+),", lines[number])[1])
        for line in lines[number + 1 : waiting]:
            written = re.match(r"\S+\s+(?:@!?U?P\d+ )?(?!QGMMA|ST|WARP)(\S+) R(\d+)\b", line)
            width = 0 if not written else 4 if "LDSM" in written[1] else 1 if written[1].startswith(SINGLE) else 2
            if written and int(written[2]) < first + 4 and int(written[2]) + width > first:
                found.append(line)
    return found


@pytest.mark.parametrize(("scheme", "output", "m"), [
    ("int4", "linear", 1), ("int4", "silu_mul", 1), ("int4", "silu_mul", 4), ("mxfp4", "linear", 1), ("mxfp4", "silu_mul", 2),
    ("nvfp4", "linear", 1), ("nvfp4", "silu_mul", 1)])
def test_no_product_in_flight_loses_its_codes(scheme: Scheme, output: Output, m: int) -> None:
    """The wait cannot name operands of 8 bits, so that it is the assembler alone that keeps their registers."""
    n = 28672 if output == "silu_mul" else 6144
    assert overwritten(compile_for(Problem(scheme, output, m, n, 4096), FEW, H200.capability).asm["sass"]) == []


OTHERS = {"narrow groups": int_types(4, 64, 4096), "zero points": int_types(4, 128, 4096, zeros=True),
          "half a chunk": int_types(4, 4160, 4160)}


@pytest.mark.parametrize("weight", OTHERS.values(), ids=OTHERS.keys())
def test_weights_that_the_kernel_cannot_read_get_another_ring(weight: object) -> None:
    config = fitted(FEW, weight, torch.bfloat16)  # type: ignore[arg-type]
    assert (config.kind, config.block_m) == ("hopper", 8)
    assert tuning.shared_bytes(Problem("int4", "linear", 4, 6144, 4096), config, 90) <= H200.shared_bytes


def test_activations_of_more_bits_than_two_e4m3_numbers_have_get_another_ring() -> None:
    assert fitted(FEW, int_types(4, 128, 4096), torch.float16).block_m == 8
    assert fitted(FEW, int_types(4, 128, 4096), torch.bfloat16) == FEW


@pytest.mark.parametrize(("scheme", "m"), [("int8_weight", 1), ("mxfp4", 3), ("nf4", 1), ("int4", 5)])
def test_a_row_that_asks_for_it_elsewhere_is_refused(scheme: str, m: int) -> None:
    with pytest.raises(ValueError, match=f"{scheme} with m={m}"):
        tuning.parse_row([scheme, "linear", 6144, 4096, m, "hopper", 64, FEW_ROWS, 256, 1, 4, 4, True])


def test_a_long_row_of_a_tall_weight_is_not_taken_apart_by_every_program() -> None:
    config = tuning.choose(Problem("int4", "linear", 1, 16384, 53248), H200)
    assert config.kind == "hopper" and not tuning.is_few(config)


UNMEASURED = [("int4_halves", "linear", 7168, 5120), ("int4_halves", "silu_mul", 34816, 5120),
              ("int4_halves", "silu_mul", 4096, 1024), ("int4", "linear", 5120, 5120), ("int4", "linear", 5120, 17408),
              ("mxfp4", "linear", 7168, 5120), ("nvfp4", "silu_mul", 34816, 4096), ("nvfp4", "linear", 5120, 17408)]


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize(("scheme", "output", "n", "k"), UNMEASURED)
def test_shapes_that_nobody_measured_get_a_configuration_that_fits(
    scheme: Scheme, output: Output, n: int, k: int, m: int
) -> None:
    problem = Problem(scheme, output, m, n, k)
    config = tuning.choose(problem, H200)
    needed = resources(compile_for(problem, config, H200.capability))
    assert tuning.is_few(config) and needed.stack <= PARKED
    assert needed.shared <= tuning.shared_bytes(problem, config, H200.capability) <= H200.shared_bytes
    assert -(-k // (config.block_k * config.splits)) * config.block_k >= min(k, 2048)
