"""The attention kernels that each GPU would be given compile for it, fit its shared memory and do not spill.

Triton compiles for a GPU that is not here; nothing is run. Without `-m long` only a few of the kernels are tried.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import Heads, PagedCase, paged_case
from test_tuning import A100, B200, H200, L40S, PRO_6000

from workstation.kernels import launch_decode, launch_fp8, launch_hopper, launch_prefill
from workstation.kernels.gemm_launch import Call
from workstation.kernels.offline import Resources, resources, targeting
from workstation.kernels.paging import KVScales
from workstation.kernels.tuning import FP8_CAPABILITY, KIB, Device

# What the system keeps of a multiprocessor's shared memory for each program.
RESERVED = KIB
REGISTERS = 65536
# Triton 3.6 spills nothing of these; 3.9 parks a few values of the kernels whose registers are bounded.
PARKED = 48  # at most: decoding an FP8 cache on compute capability 10.0
EXACT_SPILLS = 400  # float32 without tensor cores: exact, not fast
BYTES_SPILLS = 48  # of codes on GPUs without FP8, where NaN is looked for by hand
SCALES = KVScales(0.5, 2.0)
DEVICES = {device.capability: device for device in (A100, L40S, H200, B200, PRO_6000)}
CHUNK = [(200, 2000)]
SHORT_CHUNKS = [(200, 300), (90, 90)]
FEW_ROWS = [(3, 40), (5, 5)]
GROUPED = Heads(8, 2, 128)


@pytest.fixture(autouse=True)
def settled_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 warns until multiply-add fusion, which we want, is asked for by name."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def pretend(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """The launch code sees CPU tensors as on this device."""
    launch_hopper.is_hopper.cache_clear()
    for module in (launch_hopper, launch_prefill):
        monkeypatch.setattr(module, "capability", lambda _: divmod(device.capability, 10))
    monkeypatch.setattr(launch_fp8, "has_fp8", lambda _: device.capability >= FP8_CAPABILITY)
    monkeypatch.setattr(launch_decode, "_shared_memory", lambda _: device.shared_bytes + RESERVED)
    monkeypatch.setattr(launch_decode, "_multiprocessors", lambda _: device.processors)


@pytest.fixture(autouse=True)
def forgotten_devices() -> Any:
    yield
    launch_hopper.is_hopper.cache_clear()


def compile_for(call: Call, device: Device) -> Any:
    with targeting(device.capability):
        return call.kernel.warmup(*call.arguments, grid=call.grid, **call.options)


def prefill(case: PagedCase, device: Device) -> tuple[launch_prefill.PrefillConfig, Any]:
    """→ (what is chosen for this step, its compiled kernel)."""
    config = launch_prefill.choose(case.q, case.kv_layer, case.plan)
    call = launch_prefill.prefill_call(case.q, case.kv_layer, case.plan, 1.0, torch.empty_like(case.q), config)
    return config, compile_for(call, device)


def decode(case: PagedCase, device: Device) -> tuple[launch_decode.DecodeConfig, Any, Any]:
    """→ (what is chosen, the compiled kernel that plans, the one that attends)."""
    config = launch_decode.choose(case.q, case.kv_layer, case.plan)
    shares = launch_decode.make_room(case.q, case.kv_layer, case.plan, config)
    plan = launch_decode.plan_call(case.kv_layer, case.plan, config, shares)
    attend = launch_decode.decode_call(
        case.q, case.kv_layer, case.plan, 1.0, torch.empty_like(case.q), config, shares
    )
    return config, compile_for(plan, device), compile_for(attend, device)


def check(compiled: Any, device: Device, parked: int = PARKED) -> Resources:
    needed = resources(compiled)
    assert needed.shared <= device.shared_bytes
    assert needed.stack <= parked
    return needed


def parked(case: PagedCase, device: Device) -> int:
    return BYTES_SPILLS if case.kv_layer.dtype != case.q.dtype and device.capability < FP8_CAPABILITY else PARKED


def check_decode(case: PagedCase, device: Device) -> None:
    """As many programs are resident at once as the grid counts on."""
    config, plan, attend = decode(case, device)
    check(plan, device)
    needed = check(attend, device, EXACT_SPILLS if case.q.dtype == torch.float32 else parked(case, device))
    assert config.per_sm * (needed.shared + RESERVED) <= device.shared_bytes + RESERVED
    warps = config.warps * (2 if config.kind == "hopper" else 1)  # a warpgroup beside the multiplying one
    assert config.per_sm * warps * 32 * -(-needed.registers // 8) * 8 <= REGISTERS


@pytest.mark.parametrize(("shapes", "tile"), [(CHUNK, (128, 2)), (SHORT_CHUNKS, (64, 4))], ids=["long", "short"])
def test_hopper_prefill_is_specialised_by_warps_and_fed_by_tma(
    monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, int]], tile: tuple[int, int]
) -> None:
    pretend(monkeypatch, H200)
    config, compiled = prefill(paged_case(GROUPED, shapes, dtype=torch.bfloat16), H200)
    assert (config.kind, config.keys, config.stages) == ("hopper", *tile)
    needed = check(compiled, H200)
    assert needed.registers <= 168  # three warpgroups' worth of threads share 65,536
    assembly = compiled.asm["ptx"]
    assert "wgmma.mma_async" in assembly
    assert "cp.async.bulk.tensor.2d" in assembly
    assert "setmaxnreg" in assembly


def test_a_window_on_hopper_goes_to_the_tiled_kernel_and_wgmma(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, H200)
    config, compiled = prefill(paged_case(GROUPED, CHUNK, window=1500, dtype=torch.bfloat16), H200)
    assert config == launch_prefill.PrefillConfig("tiled", 128, 64, 8, 3)
    check(compiled, H200)
    assert "wgmma.mma_async" in compiled.asm["ptx"]


def test_decode_fits_hopper_as_often_as_its_grid_counts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, H200)
    case = paged_case(GROUPED, [(1, 300), (1, 40)], dtype=torch.bfloat16)
    assert launch_decode.choose(case.q, case.kv_layer, case.plan).kind == "hopper"
    check_decode(case, H200)
    windowed = paged_case(GROUPED, [(1, 300), (1, 40)], window=1500, dtype=torch.bfloat16)
    config = launch_decode.choose(windowed.q, windowed.kv_layer, windowed.plan)
    assert config == launch_decode.DecodeConfig("shares", 64, 4, 3, 3, 4, 8)
    check_decode(windowed, H200)


def test_hopper_decode_is_fed_by_tma_and_chained(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, H200)
    _, _, compiled = decode(paged_case(GROUPED, [(1, 300)], dtype=torch.float16), H200)
    assert "cp.async.bulk.tensor.2d" in compiled.asm["ptx"] and "wgmma.mma_async" in compiled.asm["ptx"]


@pytest.mark.parametrize("capability", [89, 120])
def test_small_shared_memories_suffice_for_a_chunk(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    pretend(monkeypatch, DEVICES[capability])
    config, compiled = prefill(paged_case(GROUPED, CHUNK, dtype=torch.bfloat16), DEVICES[capability])
    assert config.kind == "tiled"
    check(compiled, DEVICES[capability])


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_decode_over_an_fp8_cache_fits_and_loads_keys_for_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, capability: int
) -> None:
    """Twice the keys a turn; pairs of codes pass through ldmatrix, values transposed, and not byte by byte."""
    device = DEVICES[capability]
    pretend(monkeypatch, device)
    case = paged_case(GROUPED, [(1, 300), (1, 40)], dtype=torch.bfloat16, scales=SCALES)
    config, _, attend = decode(case, device)
    assert config.keys == 128
    check_decode(case, device)
    assembly = attend.asm["ptx"]
    assert "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" in assembly
    assert "ld.shared.b8" not in assembly and "ld.shared.u8" not in assembly


def test_prefill_over_an_fp8_cache_on_hopper_goes_to_the_tiled_kernel_and_wgmma(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, H200)
    config, compiled = prefill(paged_case(GROUPED, CHUNK, dtype=torch.bfloat16, scales=SCALES), H200)
    assert config == launch_prefill.PrefillConfig("tiled", 128, 64, 8, 3)
    check(compiled, H200)
    assert "wgmma.mma_async" in compiled.asm["ptx"]


HEADS = [Heads(8, 2, 128), Heads(16, 2, 64), Heads(2, 2, 128), Heads(4, 2, 256), Heads(7, 1, 80)]
STEPS = {"long": CHUNK, "short": SHORT_CHUNKS, "few": FEW_ROWS}


CACHES = pytest.mark.parametrize("scales", [None, SCALES], ids=["cache", "fp8"])


@pytest.mark.long
@CACHES
@pytest.mark.parametrize("window", [0, 1500])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("capability", DEVICES)
def test_every_prefill_compiles_and_fits(
    monkeypatch: pytest.MonkeyPatch, capability: int, heads: Heads, step: str, window: int, scales: KVScales | None
) -> None:
    device = DEVICES[capability]
    pretend(monkeypatch, device)
    case = paged_case(heads, STEPS[step], window=window, dtype=torch.bfloat16, scales=scales)
    check(prefill(case, device)[1], device, parked(case, device))


@pytest.mark.long
@CACHES
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", DEVICES)
def test_every_decode_compiles_and_fits(
    monkeypatch: pytest.MonkeyPatch, capability: int, dtype: torch.dtype, heads: Heads, scales: KVScales | None
) -> None:
    pretend(monkeypatch, DEVICES[capability])
    check_decode(paged_case(heads, [(1, 300), (1, 40)], dtype=dtype, scales=scales), DEVICES[capability])


@pytest.mark.long
@pytest.mark.parametrize("capability", DEVICES)
def test_full_precision_prefill_compiles_and_fits(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    pretend(monkeypatch, DEVICES[capability])
    check(prefill(paged_case(GROUPED, CHUNK), DEVICES[capability])[1], DEVICES[capability], EXACT_SPILLS)
