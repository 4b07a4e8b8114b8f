"""What holds for an FP8 cache on any device: the twins, the interpreted and the compiled kernels all pass these."""

from __future__ import annotations

import torch
from kernel_cases import Heads, PagedCase, cos_sin_table, naive_rms_norm, naive_rope, paged_case
from kernel_checks import random

from workstation.kernels import launch_decode, launch_prefill, ops
from workstation.kernels.launch_decode import DecodeConfig
from workstation.kernels.launch_prefill import PrefillConfig
from workstation.kernels.paging import FP8, KVScales

# Of ‖out − exact‖ / ‖exact‖, exact being attention over what the codes mean: the rounding of the queries' type.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SCALES = KVScales(0.37, 2.5)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN where anything was not written."""
    return float((out.float().cpu() - expected).norm() / expected.norm())


def check_attention(
    heads: Heads, shapes: list[tuple[int, int]], window: int, dtype: torch.dtype, device: str, scales: KVScales = SCALES
) -> None:
    """Called as two layers of a step; slots that no query may see hold NaN."""
    case = paged_case(heads, shapes, window=window, dtype=dtype, device=device, scales=scales)
    assert case.kv_layer.dtype == FP8
    for _ in range(2):
        out = ops.attention(case.q, case.kv_layer, case.plan, case.scale, case.scales)
        assert out.dtype == dtype
        assert relative_error(out, case.expected()) < TOLERANCE[dtype]


def check_decode(case: PagedCase, config: DecodeConfig) -> None:
    """A configuration that need not be the chosen one, on a poisoned output."""
    out = torch.full_like(case.q, torch.nan)
    launch_decode.attend_decodes(case.q, case.kv_layer, case.plan, case.scale, out, config, case.scales)
    assert relative_error(out, case.expected()) < TOLERANCE[out.dtype]


def check_prefill(case: PagedCase, config: PrefillConfig) -> None:
    out = torch.full_like(case.q, torch.nan)
    launch_prefill.attend_prefills(case.q, case.kv_layer, case.plan, case.scale, out, config, case.scales)
    assert relative_error(out, case.expected()) < TOLERANCE[out.dtype]


def quantised(values: torch.Tensor, scale: float) -> torch.Tensor:
    return (values / scale).clamp(-448, 448).to(FP8)


def check_rope_and_cache(tokens: int, heads: Heads, rotary_dim: int, normed: bool, dtype: torch.dtype, device: str) -> None:
    """Codes of rotated keys and of values in this step's slots, up to the next code where RoPE's last bit decides; every
    other byte keeps its value."""
    total = heads.query + 2 * heads.kv
    qkv = random(tokens, total * heads.dim, dtype=dtype, device=device) * 3
    gen = torch.Generator().manual_seed(3)
    positions = torch.randint(0, 500, (tokens,), generator=gen)
    slots = torch.randperm(7 * 16, generator=gen)[:tokens]
    slots[2::3] = -1
    table = cos_sin_table(500, rotary_dim)
    weights = [random(heads.dim, dtype=dtype, device=device, seed=seed) for seed in (4, 5)] if normed else [None, None]
    before = torch.randint(0, 256, (7, 3, 2, heads.kv, 16, heads.dim), generator=gen, dtype=torch.uint8)
    pool = before.to(device).view(FP8)
    ops.rope_and_cache(qkv, positions.to(device), table.to(device), *weights, 1e-6, pool[:, 1], slots.to(device),
                       heads.query, heads.kv, SCALES)

    split = qkv.float().cpu().view(tokens, total, heads.dim)
    _, key, value = split.split([heads.query, heads.kv, heads.kv], 1)
    if weights[1] is not None:
        key = naive_rms_norm(key, weights[1], 1e-6)
    key = quantised(naive_rope(key, positions, table), SCALES.key)
    value = quantised(value, SCALES.value)
    found, kept = pool.view(torch.uint8).cpu(), before.clone()
    exact, differing = 0, 0
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        for side, codes in ((0, key[token]), (1, value[token])):
            written = found[slot // 16, 1, side, :, slot % 16]
            kept[slot // 16, 1, side, :, slot % 16] = written
            near = codes.view(torch.uint8)
            apart = (written.int() - near.int()).abs()
            assert (apart <= (0 if side else 1)).logical_or(_cancelled(written, codes, dtype)).all()
            differing += int((written != near).sum())
            exact += near.numel()
    assert torch.equal(found, kept)
    assert differing <= (0.002 if dtype == torch.float32 else 0.05) * exact


def _cancelled(written: torch.Tensor, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where RoPE's difference left so little of a head's components that their own rounding decides the code."""
    values = codes.float()
    return (written.view(FP8).float() - values).abs() <= 2 * torch.finfo(dtype).eps * values.abs().amax(-1, keepdim=True)


def check_saturation(device: str, dtype: torch.dtype = torch.float32) -> None:
    """Values (one head of 16) beyond ±448 scales saturate, infinity too; NaN stays NaN, and zero keeps its sign."""
    values = torch.tensor([1e4, -1e4, torch.inf, -torch.inf, torch.nan, 448.0, 465.0, -448.0, 0.0, -0.0, 2.0**-10, 2.0**-9,
                           3 * 2.0**-10, 1.0, 1.0625, 1.1875])
    expected = torch.tensor([448.0, -448.0, 448.0, -448.0, torch.nan, 448.0, 448.0, -448.0, 0.0, -0.0, 0.0, 2.0**-9,
                             2.0**-8, 1.0, 1.0, 1.25])
    for scale in (1.0, 4.0, 0.25):
        pool = torch.zeros(2, 1, 2, 1, 16, 16, dtype=FP8, device=device)
        qkv = torch.cat((torch.zeros(32), values * scale)).to(dtype)[None].to(device)
        at = torch.zeros(1, dtype=torch.int64, device=device)
        ops.rope_and_cache(qkv, at, cos_sin_table(4, 16).to(device), None, None, 0.0, pool[:, 0], at + 17, 1, 1,
                           KVScales(3.0, scale))
        found = pool[1, 0, 1, 0, 1].float().cpu()
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=0.0, atol=0.0)
        assert torch.equal(found.signbit()[:4], expected.signbit()[:4]) and found.signbit()[9]
        assert not pool[0].float().any()


def check_copy_blocks(device: str) -> None:
    """Bit for bit, NaN included."""
    codes = torch.randint(0, 256, (9, 2, 2, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    pool = codes.to(device).view(FP8)
    ops.copy_blocks(pool, torch.tensor([1, 5], device=device), torch.tensor([7, 2], device=device))
    codes[[7, 2]] = codes[[1, 5]]
    assert torch.equal(pool.view(torch.uint8).cpu(), codes)


def check_broken_keys_stay_with_their_sequence(device: str, dtype: torch.dtype) -> None:
    """A sequence whose stored keys are NaN gives NaN, so that it is seen at its logits; its neighbours are as they were."""
    shapes = [(1, 40), (1, 41), (1, 90), (9, 20), (12, 70)]
    case = paged_case(Heads(4, 2, 64), shapes, dtype=dtype, device=device, scales=SCALES)
    clean = ops.attention(case.q, case.kv_layer, case.plan, case.scale, case.scales)
    for sequence in (1, 3):
        block = int(case.plan.tables[case.plan.rows[sequence].long(), 0])
        case.kv_layer[block, 0, :, 3] = torch.nan
    out = ops.attention(case.q, case.kv_layer, case.plan, case.scale, case.scales)
    healthy = [0, 2, *range(12, 24)]
    assert torch.equal(out[healthy], clean[healthy])
    assert out[1].isnan().all() and out[[6, 11]].isnan().all()
