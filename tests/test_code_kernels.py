"""Products with 4-bit codes: decoders word by word, kernels compiled for other GPUs, and on one that is here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from code_checks import FORMS, check_door, check_product, check_widening, make_case, make_weight
from ptx_words import run
from test_tuning import A100, B200, H200, L40S, PRO_6000

from workstation.kernels import launch_codes, ops
from workstation.kernels.code_decode import (
    E2M1_BFLOAT16,
    E2M1_FLOAT16,
    E4M3_BFLOAT16,
    E4M3_FLOAT16,
    E8M0_BFLOAT16,
    LOOKUPS,
    PLACED_BFLOAT16,
    PLACED_FLOAT16,
    decoder,
    filler,
)
from workstation.kernels.code_tables import E2M1, FP4, NF4, ScaleKind, Table
from workstation.kernels.code_weights import pack, unpack
from workstation.kernels.gemm_compile import code_types, compile_call, compile_for
from workstation.kernels.gemm_launch import Operands, gemm_call
from workstation.kernels.launch_codes import fitted, widen_call
from workstation.kernels.launch_hopper import is_hopper
from workstation.kernels.offline import resources
from workstation.kernels.reference_codes import widen
from workstation.kernels.tuning import (
    CODE_SCHEMES,
    CODED_ROWS,
    FEW_ROWS,
    KIB,
    OPTING,
    Device,
    GemmConfig,
    Output,
    Problem,
    Scheme,
    choose,
    default_config,
    shared_bytes,
    stage_bytes,
)

ARCHITECTURES = pytest.mark.parametrize("device", [A100, L40S, H200, B200, PRO_6000], ids=lambda device: device.name)
HAS_HOPPER = torch.cuda.is_available() and is_hopper(torch.device("cuda", 0))
ON_HOPPER = pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU")
# Triton's assembler for sm_120 parks up to 16 bytes outside the loop, at 96 registers of 255; 3.9's for sm_90a twice as much in
# rings, whose registers are meted out for two programs.
PARKED = 16
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def settled_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 warns until multiply-add fusion, which we want, is asked for by name."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("table", [NF4, FP4, E2M1], ids=["nf4", "fp4", "e2m1"])
def test_a_decoders_assembly_makes_every_words_values(table: Table, target: str) -> None:
    """All words beside words in another order. e2m1 comes out a power of two smaller, each word a column's; a table's codes
    are two columns' to a byte."""
    left = np.arange(1 << 16, dtype=np.uint32)
    right = left * np.uint32(40503) & np.uint32(0xFFFF)
    both = left | right << np.uint32(16)
    shift = 0 if table != E2M1 else {"bf16": 126, "fp16": 14}[target]
    values = torch.tensor(table, dtype=torch.float64).mul(2.0**-shift).to(TYPES[target])
    for index, plane in enumerate(run(decoder(None if table == E2M1 else table, target), 4, _4=both)):
        for column, half in enumerate((plane & np.uint32(0xFFFF), plane >> np.uint32(16))):
            shift = 16 * column + 4 * index if table == E2M1 else 8 * index + 4 * column
            expected = values[torch.from_numpy((both >> np.uint32(shift) & np.uint32(15)).astype(np.int64))]
            assert np.array_equal(half.astype(np.uint16), expected.view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize(("planes", "dtype"), [(E2M1_BFLOAT16, torch.bfloat16), (E2M1_FLOAT16, torch.float16)], ids=TYPES)
def test_a_ring_s_planes_of_e2m1_are_its_values(planes: Any, dtype: torch.dtype) -> None:
    words = np.arange(1 << 16, dtype=np.uint32) * np.uint32(0x9E3779B1)
    for index, assembly in enumerate(planes):
        (plane,) = run(assembly, 1, _1=words)
        found = torch.from_numpy(plane.view(np.int16).copy()).view(dtype).view(-1, 2)
        codes = np.stack([words >> np.uint32(16 * column + 4 * index) & np.uint32(15) for column in (0, 1)], -1)
        assert torch.equal(found.double(), torch.tensor(E2M1, dtype=torch.float64)[torch.from_numpy(codes.astype(np.int64))])


@pytest.mark.parametrize(("kind", "planes", "factors", "dtype"), [
    (torch.float8_e8m0fnu, PLACED_BFLOAT16, E8M0_BFLOAT16, torch.bfloat16),
    (torch.float8_e4m3fn, PLACED_BFLOAT16, E4M3_BFLOAT16, torch.bfloat16),
    (torch.float8_e4m3fn, PLACED_FLOAT16, E4M3_FLOAT16, torch.float16)], ids=["e8m0", "e4m3", "e4m3-fp16"])  # fmt: skip
def test_placed_codes_times_their_scales_are_weights_but_for_the_rest(kind: Any, planes: Any, factors: Any, dtype: Any) -> None:
    """Exactly, for every code and every scale up to 2^9, but where the least numbers of the type are not enough."""
    least, most = {torch.float8_e8m0fnu: (8, 136), torch.float8_e4m3fn: (1 if dtype == torch.bfloat16 else 0x18, 0x7E)}[kind]
    codes, scales = (np.arange(16, dtype=np.uint32), np.arange(least, most + 1, dtype=np.uint32))
    words = np.repeat(codes * np.uint32(0x11111111), scales.size)
    for place, factor in enumerate(factors):
        (pair,) = run(factor, 1, _1=np.tile(scales << np.uint32(8 * place), 16))
        numbers = torch.tensor(np.tile(scales, 16).astype(np.uint8)).view(kind).double()
        wanted = torch.tensor(E2M1, dtype=torch.float64).repeat_interleave(scales.size) * numbers
        for plane in planes:
            (placed,) = run(plane, 1, _1=words)
            (weights,) = run(f"mul.rn.{'bf16' if dtype == torch.bfloat16 else 'f16'}x2 $0, $1, $2;", 1, _1=placed, _2=pair)
            found = torch.from_numpy(weights.view(np.int16).copy()).view(dtype).view(-1, 2).double() * 256.0
            assert torch.equal(found, wanted[:, None].expand(-1, 2))


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("table", [NF4, FP4], ids=["nf4", "fp4"])
def test_a_table_in_shared_memory_gives_every_thread_its_values_from_a_bank_of_its_own(table: Table, target: str) -> None:
    """128 threads fill it, no eight neighbours of which store to a bank at once; then each looks up any two codes of a word."""
    threads, base, untouched = np.arange(128, dtype=np.uint32), 1280, np.uint32(0xDEADBEEF)
    memory = np.full(base // 4 + (1 << 13) + 32, untouched)
    run(filler(table, target), 1, memory, _1=threads, _2=np.uint32(base))
    assert (memory[: base // 4] == untouched).all() and (memory[base // 4 + (1 << 13) :] == untouched).all()
    rounded = torch.tensor(table, dtype=torch.float64).to(TYPES[target])
    values = rounded.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    words = np.arange(1 << 16, dtype=np.uint32) * np.uint32(0x9E3779B1)
    places = np.uint32(base) + np.arange(words.size, dtype=np.uint32) % np.uint32(32) * np.uint32(4)
    for index, lookup in enumerate(LOOKUPS):
        (found,) = run(lookup, 1, memory, _1=words, _2=places)
        first, second = (words >> np.uint32(8 * index + shift) & np.uint32(15) for shift in (0, 4))
        assert np.array_equal(found, values[first] | values[second] << np.uint32(16))


@pytest.mark.parametrize("kind", [ScaleKind.F32, ScaleKind.E4M3])
@pytest.mark.parametrize("columns", [128, 320, 48])
def test_codes_lie_in_words_of_columns_thirty_two_apart(columns: int, kind: ScaleKind) -> None:
    """Beside float32 scales two columns' words are four bytes of two neighbours' codes."""
    codes = torch.randint(0, 16, (6, columns), dtype=torch.uint8)
    words = pack(codes, kind)
    assert words.is_contiguous() and torch.equal(unpack(words, columns, kind), codes)
    padded = torch.nn.functional.pad(codes, (0, -columns % 128)).long()
    last = padded.shape[1] - 128  # the last chunk's first two words
    left, right = ([padded[:, last + 32 * i + j] for i in range(4)] for j in (0, 1))
    order = [left[0], right[0], left[1], right[1], left[2], right[2], left[3], right[3]]
    order = order if kind is ScaleKind.F32 else left + right
    found = words[:, last // 4].long() & 0xFFFF | (words[:, last // 4 + 1].long() & 0xFFFF) << 16
    assert torch.equal(found, sum(code << 4 * i for i, code in enumerate(order)))


@pytest.mark.parametrize("form", FORMS)
def test_a_part_of_the_rows_is_a_weight_of_its_own(form: str) -> None:
    weight = make_weight(8, 256, form)
    assert torch.equal(widen(weight.part(2, 7), torch.float32), widen(weight, torch.float32)[2:7])


def check_fits(device: Device, scheme: Scheme, output: Output, m: int) -> None:
    problem = Problem(scheme, output, m, 28672 if output == "silu_mul" else 6144, 4096)
    config = fitted(default_config(problem, device), code_types(scheme, 4096), torch.bfloat16)
    needed = resources(compile_for(problem, config, device.capability))
    assert needed.shared <= shared_bytes(problem, config, device.capability) <= device.shared_bytes
    assert needed.stack <= PARKED


def test_a_computed_configuration_compiles_and_fits() -> None:
    check_fits(PRO_6000, "mxfp4", "linear", 1)


@pytest.mark.long
@ARCHITECTURES
@pytest.mark.parametrize("scheme", CODE_SCHEMES)
@pytest.mark.parametrize(("output", "m"), [("linear", 1), ("linear", 64), ("linear", 256), ("silu_mul", 16), ("silu_mul", 256)])
def test_every_kind_of_codes_compiles_and_fits(device: Device, scheme: Scheme, output: Output, m: int) -> None:
    check_fits(device, scheme, output, m)


@pytest.mark.long
@pytest.mark.parametrize("scheme", CODE_SCHEMES)
def test_widening_compiles_and_stores_sixteen_bytes_at_a_time(scheme: Scheme) -> None:
    for device in (A100, H200):
        kernel = compile_call(widen_call(code_types(scheme, 4096), torch.bfloat16), device.capability)
        assert resources(kernel).stack == 0 and "st.global.v4" in kernel.asm["ptx"]


def test_hopper_multiplies_table_values_in_wgmma_from_registers() -> None:
    """Codes reach registers as words, by ldmatrix; values never pass through shared memory."""
    problem = Problem("nf4", "linear", 8, 6144, 4096)
    assembly = compile_for(problem, default_config(problem, H200, rings=False), H200.capability).asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n16k16" in assembly and "mma.sync" not in assembly
    loop = assembly[assembly.index("cp.async.wait_group"):assembly.rindex("wgmma.mma_async")]
    assert "ldmatrix" in loop and "st.shared" not in loop


def test_a_misshapen_operand_is_refused_by_name() -> None:
    x, weight, bias = make_case(3, 32, 128, "nf4", torch.float32)
    with pytest.raises(ValueError, match=r"x .*\[T, K\]"):
        ops.linear_codes(x[:, :64], weight)
    with pytest.raises(ValueError, match=r"scale .*\[G, N\]"):
        ops.linear_codes(x, weight._replace(scale=weight.scale.t()))
    with pytest.raises(ValueError, match=r"bias .*\[N\]"):
        ops.linear_codes(x, weight, bias[:5])
    with pytest.raises(ValueError, match=r"out .*\[T, N\]"):
        ops.linear_codes(x, weight, None, torch.empty(3, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_compiled_products_of_any_shape(form: str, dtype: torch.dtype) -> None:
    for m in (1, 33, 256):
        case: Any = make_case(m, 1056, 4096, form, dtype, "cuda")
        block_m = min(64, max(16, 1 << (m - 1).bit_length()))
        for splits, step in ((1, 128), (3, 256)):
            check_product(case, GemmConfig("dot", 64, block_m, step, splits, 4, 3, pdl=m == 33), dtype)


def ring(scheme: Scheme, output: Output, block_m: int) -> tuple[Problem, GemmConfig]:
    n = 28672 if output == "silu_mul" else 6144
    return Problem(scheme, output, block_m, n, 4096), GemmConfig("hopper", 64, block_m, 256, 1, 4, 3, True)


def paired(problem: Problem) -> GemmConfig:
    """A ring of two warpgroups, a gate's and its up's or neighbours', with room for two programs a multiprocessor."""
    silu = problem.output == "silu_mul"
    block_m = min(CODED_ROWS[problem.scheme], max(8, 1 << (problem.m - 1).bit_length()))
    config = GemmConfig("hopper", 64 if silu else 128, block_m, 256, 1 if silu else 4, 8, 1, True)
    room = (76 if problem.scheme == "nf4" else 100) * KIB
    return replace(config, stages=max(2, min(6, room // stage_bytes(problem, config))))


def check_together(scheme: Scheme, output: Output, m: int, waits: int) -> None:
    """The compiler waits for each product by itself where registers are too few: half the speed."""
    problem = Problem(scheme, output, m, 28672 if output == "silu_mul" else 6144, 4096)
    config = paired(problem)
    kernel = compile_for(problem, config, H200.capability)
    needed = resources(kernel)
    assert needed.stack <= 2 * PARKED and kernel.asm["sass"].count("WARPGROUP.DEPBAR") == waits
    assert needed.shared <= shared_bytes(problem, config, H200.capability) <= H200.shared_bytes
    assert scheme != "nf4" or kernel.metadata.shared > OPTING  # or Triton would not ask the driver for more than that


def test_a_ring_s_products_of_two_groups_are_in_flight_together() -> None:
    check_together("nf4", "silu_mul", 1, 4)


@pytest.mark.long
@pytest.mark.parametrize(("output", "m", "waits"), [
    ("linear", 1, 4), ("linear", 16, 4), ("linear", 32, 4), ("linear", 64, 8), ("silu_mul", 16, 4), ("silu_mul", 32, 4),
    ("silu_mul", 256, 8)])  # fmt: skip
def test_every_ring_s_products_are_in_flight_together(output: Output, m: int, waits: int) -> None:
    check_together("nf4", output, m, waits)


@pytest.mark.long
@pytest.mark.parametrize(("output", "m", "waits"), [
    ("linear", 1, 4), ("silu_mul", 16, 2), ("linear", 32, 2), ("linear", 256, 2)])
def test_every_ring_s_products_of_e2m1_are_in_flight_together(output: Output, m: int, waits: int) -> None:
    check_together("mxfp4", output, m, waits)


@pytest.mark.long
@pytest.mark.parametrize(("output", "m"), [("linear", 1), ("silu_mul", 16), ("linear", 64), ("silu_mul", 256)])
def test_a_step_of_weights_with_e4m3_scales_has_one_wait_a_warpgroup(output: Output, m: int) -> None:
    check_together("nvfp4", output, m, 2)


def check_ring_fits(scheme: Scheme, output: Output, block_m: int) -> None:
    problem, config = ring(scheme, output, block_m)
    needed = resources(compile_for(problem, config, H200.capability))
    assert needed.shared <= shared_bytes(problem, config, H200.capability) <= H200.shared_bytes and needed.stack == 0


def test_a_ring_of_weights_that_meet_their_scales_compiles_and_fits() -> None:
    check_ring_fits("nvfp4", "linear", 16)


@pytest.mark.long
@pytest.mark.parametrize(("output", "block_m"), [("linear", 8), ("linear", 64), ("silu_mul", 16), ("silu_mul", 64)])
def test_every_ring_of_weights_that_meet_their_scales_compiles_and_fits(output: Output, block_m: int) -> None:
    check_ring_fits("nvfp4", output, block_m)


@pytest.mark.gpu
@ON_HOPPER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["nvfp4", "nvfp4_divided"])
def test_rings_multiply_codes_with_small_floats_for_scales(form: str, dtype: torch.dtype) -> None:
    for m, block_m in ((1, 8), (5, 16), (33, 32), (100, 64)):
        case = make_case(m, 1152, 4096, form, dtype, "cuda")
        for tiles, panels, splits in ((1, 1, 1), (2, 1, 3), (1, 2, 1)):
            check_product(case, GemmConfig("hopper", 64 * tiles, block_m, 256 * panels, splits, 4, 2, True), dtype)


# (rows, of a tile, tiles and warpgroups, panels a step, splits, channels, columns): 4224 columns make the last step ragged.
GROUP_RINGS = [
    (1, 8, 1, 1, 1, 3, 1152, 4096), (2, 8, 1, 2, 1, 1, 1104, 4224), (5, 8, 2, 1, 2, 1, 1152, 4224),
    (8, 8, 2, 2, 1, 4, 1152, 4096), (13, 16, 1, 1, 2, 2, 1104, 4224), (16, 16, 2, 2, 1, 1, 1152, 4224),
    (33, 32, 1, 2, 1, 1, 1152, 4096), (100, 64, 1, 1, 1, 3, 1104, 4224), (256, 64, 1, 2, 1, 2, 1152, 4224),
]  # fmt: skip
# The same of gate and up in one warpgroup or in two.
GROUP_PAIRS = [
    (1, 8, 2, 1, 1, 2, 1152, 4096), (2, 8, 1, 2, 1, 1, 1152, 4224), (9, 16, 1, 2, 2, 1, 1152, 4224),
    (7, 8, 2, 2, 1, 3, 1280, 4224), (33, 32, 1, 2, 1, 3, 1152, 4224), (130, 64, 1, 2, 1, 1, 1152, 4096),
    (40, 32, 2, 1, 1, 1, 1152, 4224),
]  # fmt: skip
# The first meets every shape; the others take turns, three a shape, and two of those with a factor.
FIRST_KIND = ("nf4", torch.bfloat16)
OTHER_KINDS = [("nf4", torch.float16), ("nf4_32", torch.bfloat16), ("fp4_128", torch.float16), ("fp4_row", torch.bfloat16),
               ("mxfp4", torch.bfloat16), ("mxfp4", torch.float16)]  # fmt: skip
FACTORED = [("nvfp4", torch.bfloat16), ("nvfp4_divided", torch.float16), ("nvfp4_divided", torch.bfloat16),
            ("nvfp4", torch.float16)]  # fmt: skip
SHAPES = [(silu, shape) for silu, shapes in ((False, GROUP_RINGS), (True, GROUP_PAIRS)) for shape in shapes]
GROUPED = [(*case, *kind) for i, case in enumerate(SHAPES)
           for kind in (FIRST_KIND, *(OTHER_KINDS[(i + 2 * j) % len(OTHER_KINDS)] for j in range(3)),
                        *(FACTORED[(i + j) % len(FACTORED)] for j in range(2)))]  # fmt: skip
# Where weights meet scales before the products: the same of more rows a program.
GROUPED += [(silu, (m, 128, 1, 2, 1, splits, n, 4224), form, dtype)
            for silu, m, splits, n in ((False, 130, 2, 1152), (False, 256, 1, 1104), (True, 100, 1, 1152), (True, 300, 3, 1280))
            for form, dtype in (("mxfp4", torch.bfloat16), ("nvfp4", torch.bfloat16), ("nvfp4_divided", torch.float16))]
# One or two rows as FP8 products.
GROUPED += [(silu, (m, FEW_ROWS, tiles, 1, panels, splits, n, k), form, torch.bfloat16)
            for silu, tiles, panels, splits, n, k in ((False, 1, 1, 1, 1104, 4224), (False, 2, 2, 3, 1152, 4096),
                                                      (True, 2, 1, 1, 1152, 4224), (True, 2, 2, 2, 1280, 4096))
            for m in (1, 2) for form in ("mxfp4", "nvfp4", "nvfp4_divided")]


@pytest.mark.gpu
@ON_HOPPER
@pytest.mark.parametrize(("silu", "shape", "form", "dtype"), GROUPED, ids=str)
def test_rings_multiply_codes_in_groups_of_any_shape(silu: bool, shape: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    m, block_m, tiles, teams, panels, splits, n, k = shape
    case = make_case(m, n, k, form, dtype, "cuda")
    block_n = 64 * tiles * teams // (2 if silu else 1)
    config = GemmConfig("hopper", block_n, block_m, 256 * panels, splits, 4 * teams, 2, True)
    for _ in range(2):  # what one product leaves behind must not disturb the next
        check_product(case, config, dtype, silu=silu)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 100, 300])
def test_the_door_agrees_with_the_oracle_on_a_gpu(m: int) -> None:
    for form in FORMS:
        case = make_case(m, 1056, 4096, form, torch.bfloat16, "cuda")
        check_door(case)
        check_widening(case[1], torch.bfloat16)


@pytest.mark.parametrize("m", [16, 32, 64, 512])
def test_float16_activations_keep_sums_of_e8m0_groups_in_rings_with_registers_for_them(m: int) -> None:
    weight = code_types("mxfp4", 4096)
    config = fitted(choose(Problem("mxfp4", "linear", m, 28672, 4096), H200), weight, torch.float16)
    call = gemm_call(Operands(torch.float16, weight), config, torch.float16, m, 28672, 4096, silu=False)
    assert call.options["SCALED"] is None and resources(compile_call(call, H200.capability)).stack == 0


def test_float16_activations_have_gate_and_up_of_e8m0_groups_apart_above_16_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In rings; other kernels multiply weights that were scaled."""
    x, weight, _ = make_case(17, 64, 128, "mxfp4", torch.float16)
    assert launch_codes._choose(x, weight, "silu_mul") is not None
    measured = Problem("mxfp4", "silu_mul", 17, 28672, 4096)
    monkeypatch.setattr(launch_codes, "_cached_choice", lambda *_: choose(measured, H200))
    assert launch_codes._choose(x, weight, "silu_mul") is None and launch_codes._choose(x[:16], weight, "silu_mul") is not None
    assert launch_codes._choose(x.bfloat16(), weight, "silu_mul") is not None


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float16, 256), (torch.bfloat16, 1024)], ids=str)
def test_more_rows_of_mxfp4_are_widened_later_where_weights_meet_their_scales(
        dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_codes, "_cached_choice", lambda *_: choose(Problem("mxfp4", "linear", 512, 28672, 4096), H200))
    x, weight, _ = make_case(rows + 1, 64, 128, "mxfp4", dtype)
    assert launch_codes._choose(x, weight, "linear") is None and launch_codes._choose(x[:rows], weight, "linear") is not None


@pytest.mark.gpu
@ON_HOPPER
@pytest.mark.parametrize("form", ["mxfp4", "nvfp4"])
def test_rings_serve_up_to_1024_rows_of_weights_that_meet_their_scales(form: str) -> None:
    for m, served in ((700, True), (1100, False)):
        case = make_case(m, 4096, 1024, form, torch.bfloat16, "cuda")
        config = launch_codes._choose(case[0], case[1], "linear")
        assert (config is not None and config.kind == "hopper") == served
        check_door(case)
