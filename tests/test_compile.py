"""Every shipped configuration compiles for the GPUs it may meet, fits their shared memory and does not spill.

Triton compiles for a GPU that is not here; nothing is run. Without `-m long` only a few of the configurations are tried.
"""

from __future__ import annotations

import itertools
import json

import pytest
from products import some_of
from test_tuning import A100, B200, DEVICES, EVERY_SCHEME, H200, L40S, OUTPUTS, PRO_6000, ROWS, SCHEMES, WEIGHTS

from workstation.kernels import tuning
from workstation.kernels.gemm_compile import compile_for, fingerprint
from workstation.kernels.offline import resources
from workstation.kernels.tuning import Device, GemmConfig, Problem, default_config


@pytest.fixture(autouse=True)
def settled_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 warns until multiply-add fusion, which we want, is asked for by name."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


# Triton 3.6's assembler for sm_120 parks one value outside the loop in a few kernels, at 72 registers of 255; 3.9's for sm_90a
# up to eight in rings of codes, whose registers are meted out for two programs.
PARKED = 32
BYTES_PARKED = 80  # in the ring of bytes for 64 rows, the fastest that was measured all the same

Product = tuple[Problem, GemmConfig, Device]


def computed(device: Device) -> list[Product]:
    """One product for each kernel that the computed configurations need on a device."""
    found = {}
    for scheme, output, m, (n, k) in itertools.product(EVERY_SCHEME, OUTPUTS, ROWS, WEIGHTS):
        if scheme == "fp8" and device.capability < tuning.FP8_CAPABILITY:
            continue  # goes to the library: no FP8 products there
        problem = Problem(scheme, output, m, n, k)
        config = default_config(problem, device)
        found.setdefault(fingerprint(problem, config, device.capability), (problem, config, device))
    return list(found.values())


def measured() -> list[Product]:
    """One product for each kernel that the tuned files need."""
    found = {}
    for path in sorted(tuning.TUNED.glob("*.json")):
        content = json.loads(path.read_text())
        device = Device(**content["device"])
        for problem, config in map(tuning.parse_row, content["rows"]):
            if config.kind != "library":
                found.setdefault(fingerprint(problem, config, device.capability), (problem, config, device))
    return list(found.values())


def name(product: Product) -> str:
    problem, config, device = product
    tile = f"{config.kind}{config.block_n}x{config.block_m}x{config.block_k}"
    return f"sm{device.capability}-{problem.scheme}-{problem.output}-{problem.n}x{problem.k}-m{problem.m}-{tile}"


def check(product: Product) -> None:
    problem, config, device = product
    needed = resources(compile_for(problem, config, device.capability))
    assert needed.shared <= device.shared_bytes
    assert needed.shared <= tuning.shared_bytes(problem, config, device.capability)
    crowded = problem.scheme == "int8_weight" and (config.kind, config.block_n, config.block_m) == ("hopper", 128, 64)
    assert needed.stack <= (BYTES_PARKED if crowded else PARKED)
    assert needed.registers <= 255


ARCHITECTURES = {device.name: device for device in (A100, L40S, H200, B200, PRO_6000)}
BASIC = {
    problem.scheme: problem
    for problem in (Problem("fp8_weight", "linear", 16, 6144, 4096), Problem("16bit", "silu_mul", 64, 6144, 4096))
}


@some_of(1, device=ARCHITECTURES, problem=BASIC)
def test_a_computed_configuration_compiles_and_fits(problem: Problem, device: Device) -> None:
    check((problem, default_config(problem, device), device))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_hopper_runs_the_weights_through_wgmma(scheme: tuning.Scheme) -> None:
    problem = Problem(scheme, "linear", 8, 6144, 4096)
    assembly = compile_for(problem, default_config(problem, H200), H200.capability).asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n16" in assembly or "wgmma.mma_async.sync.aligned.m64n8" in assembly
    assert "mma.sync" not in assembly


@pytest.mark.parametrize("scheme", ["int4", "int8_weight", "nf4", "mxfp4", "nvfp4"])
def test_a_ring_slot_is_given_back_when_its_scales_have_been_read(scheme: tuning.Scheme) -> None:
    """A barrier alone waits for no load under way: `test_rings_gpu.py` tells what came of it."""
    config = GemmConfig("hopper", 64, 32, 256, 2, 4, 2, pdl=True)
    assembly = compile_for(Problem(scheme, "linear", 128, 6144, 4096), config, H200.capability).asm["ptx"]
    release = assembly.index("mbarrier.arrive.shared::cta.b64")
    last_load = max(assembly.rfind(word, 0, release) for word in ("ld.shared", "ldmatrix"))
    assert "fence.proxy.async" in assembly[last_load:release]


@pytest.mark.parametrize("kind", ["dot", "gemv"])
def test_programmatic_launch_prefetches_before_it_waits(kind: tuning.Kind) -> None:
    problem = Problem("fp8", "linear", 1, 6144, 4096)
    compiled = compile_for(problem, GemmConfig(kind, 64, 16, 256, 1, 4, 3, pdl=True), H200.capability)
    assembly = compiled.asm["ptx"]
    order = [assembly.index(word) for word in ("prefetch.global.L2", "griddepcontrol.wait", "cp.async")]
    assert order == sorted(order)
    assert compiled.metadata.launch_pdl
    plain = compile_for(problem, GemmConfig(kind, 64, 16, 256, 1, 4, 3), H200.capability)
    assert "griddepcontrol" not in plain.asm["ptx"]


def test_sums_over_n_and_k_share_one_kernel() -> None:
    config = GemmConfig("dot", 64, 16, 256, 1, 4, 3)
    kernels = {
        fingerprint(Problem("fp8", "linear", m, n, k), config, H200.capability)
        for m in (1, 7, 16)
        for n, k in ((6144, 4096), (4096, 14336), (48, 512))
    }
    assert len(kernels) == 1


@pytest.mark.parametrize(("kind", "block_m", "different"), [("dot", 16, 1), ("hopper", 8, 3), ("hopper", 4, 3)])
def test_a_ring_s_kernel_knows_its_splits(kind: tuning.Kind, block_m: int, different: int) -> None:
    problem = Problem("int4", "linear", 1, 4096, 14336)
    configs = [GemmConfig(kind, 64, block_m, 256, splits, 4, 3) for splits in (2, 4, 7)]
    assert len({fingerprint(problem, config, H200.capability) for config in configs}) == different


@pytest.mark.long
@pytest.mark.parametrize("product", [p for device in DEVICES for p in computed(device)], ids=name)
def test_every_computed_configuration_compiles_and_fits(product: Product) -> None:
    check(product)


@pytest.mark.long
@pytest.mark.parametrize("product", measured(), ids=name)
def test_every_measured_configuration_compiles_and_fits(product: Product) -> None:
    check(product)
