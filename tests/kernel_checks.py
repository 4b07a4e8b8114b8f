"""What every kernel must hold, on any device and dtype: the twins, the interpreted and the compiled kernels all pass these."""

from __future__ import annotations

import torch
from kernel_cases import Heads, cos_sin_table, naive_rms_norm, naive_rope, paged_case

from workstation.kernels import ops
from workstation.kernels.quantized import Halves, Halving
from workstation.kernels.reference_int import halves_order

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DECODES = [(1, 1), (1, 16), (1, 17), (1, 300), (1, 45), (1, 0), (1, 46), (1, 700)]
PREFILLS = [(3, 3), (17, 40), (64, 64), (5, 133), (90, 150)]


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float().cpu(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def check_rms_norm(tokens: int, width: int, dtype: torch.dtype, device: str) -> None:
    x, weight = random(tokens, width, dtype=dtype, device=device) * 3, random(width, dtype=dtype, device=device, seed=1)
    close(ops.rms_norm(x, weight, 1e-5), naive_rms_norm(x, weight, 1e-5), dtype)


def check_add_rms_norm(tokens: int, width: int, dtype: torch.dtype, device: str) -> None:
    x, residual = (random(tokens, width, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weight = random(width, dtype=dtype, device=device, seed=2)
    total = (x + residual).float()
    normed, kept = ops.add_rms_norm(x, residual, weight, 1e-5)
    close(kept, total.cpu(), dtype)
    close(normed, naive_rms_norm(total, weight, 1e-5), dtype)


def together(x: Halves) -> torch.Tensor:
    """The numbers that were taken apart, [T, K] float64."""
    groups = x.factors.shape[0]
    rows = x.values.double().view(groups, -1, 128)[:, : 2 * x.tokens].unflatten(1, (-1, 2)).sum(2)
    values = torch.empty_like(rows)
    values[..., halves_order(x.device)] = rows
    return (values * x.factors[:, 0 : 2 * x.tokens : 2, None].double()).transpose(0, 1).flatten(1)


def check_norm_that_takes_apart(tokens: int, width: int, device: str) -> None:
    """What `add_rms_norm` gives, but for numbers that another order of adding rounds otherwise, and factors that fit it."""
    x, residual = (random(tokens, width, dtype=torch.bfloat16, device=device, seed=seed) for seed in (0, 1))
    weight = random(width, dtype=torch.bfloat16, device=device, seed=2)
    normed, kept = ops.add_rms_norm(x, residual.clone(), weight, 1e-5)
    apart, kept_too = ops.add_rms_norm(x, residual.clone(), weight, 1e-5, Halving())
    assert isinstance(apart, Halves) and isinstance(normed, torch.Tensor) and apart.shape == (tokens, width)
    assert torch.equal(kept, kept_too)
    found = together(apart)
    close(found.to(torch.bfloat16), normed.float().cpu(), torch.bfloat16)
    groups = normed.double().unflatten(1, (-1, 128))
    exact = (groups.abs() >= groups.abs().amax(-1, keepdim=True) / 512).flatten(1)
    assert int((found != normed.double())[exact].sum()) <= width * tokens // 100
    powers, less = apart.factors[:, : 2 * tokens], apart.factors[:, 8 : 8 + 2 * tokens]
    assert torch.equal(powers[:, 0::2], powers[:, 1::2]) and not less[:, 1::2].any()
    sums = found.unflatten(1, (-1, 128)).sum(-1).t() * (-8 / 512)
    assert torch.allclose(less[:, 0::2].double(), sums, atol=1e-5)


def check_silu_mul(tokens: int, width: int, dtype: torch.dtype, device: str) -> None:
    gate_up = random(tokens, 2 * width, dtype=dtype, device=device)
    gate, up = gate_up.float().cpu().chunk(2, -1)
    close(ops.silu_mul(gate_up), gate / (1 + (-gate).exp()) * up, dtype)


def check_step_inputs(tokens: int, device: str) -> None:
    """Every third token comes from its row, every fifth is padding, and a second KV group has a table of its own."""
    gen = torch.Generator().manual_seed(tokens)
    ids, rows = (torch.randint(0, high, (tokens,), generator=gen) for high in (500, 7))
    positions = torch.randint(0, 90, (tokens,), generator=gen)
    ids[::3], positions[4::5] = -1, -1
    last_token = torch.randint(0, 500, (7,), generator=gen)
    tables = [torch.randint(1, 40, (7, 6), generator=gen, dtype=torch.int32) for _ in range(2)]
    given = ops.step_inputs(*(item.to(device) for item in (ids, positions, rows, last_token)),
                            tuple(table.to(device) for table in tables), 16)
    for place in range(tokens):
        row, position = int(rows[place]), int(positions[place])
        padding = position < 0
        assert given.token_ids[place] == (last_token[row] if ids[place] < 0 else ids[place])
        assert given.positions[place] == max(position, 0)
        for table, slots in zip(tables, given.slots, strict=True):
            assert slots[place] == (-1 if padding else int(table[row, position // 16]) * 16 + position % 16)


def check_rope_and_cache(tokens: int, heads: Heads, rotary_dim: int, normed: bool, dtype: torch.dtype, device: str) -> None:
    """Every third token is padding (slot -1); whatever is not a slot of this step must keep its contents."""
    total = heads.query + 2 * heads.kv
    qkv = random(tokens, total * heads.dim, dtype=dtype, device=device)
    gen = torch.Generator().manual_seed(3)
    positions = torch.randint(0, 500, (tokens,), generator=gen)
    slots = torch.randperm(7 * 16, generator=gen)[:tokens]
    slots[2::3] = -1
    table = cos_sin_table(500, rotary_dim, scale=1.25)
    weights = [random(heads.dim, dtype=dtype, device=device, seed=seed) for seed in (4, 5)] if normed else [None, None]
    pool = random(7, 3, 2, heads.kv, 16, heads.dim, dtype=dtype, device=device, seed=6)
    expected = pool.float().cpu()
    q = ops.rope_and_cache(
        qkv, positions.to(device), table.to(device), *weights, 1e-6, pool[:, 1], slots.to(device), heads.query, heads.kv
    )

    split = qkv.float().cpu().view(tokens, total, heads.dim)
    query, key, value = split.split([heads.query, heads.kv, heads.kv], 1)
    if normed:
        query, key = (naive_rms_norm(x, w, 1e-6) for x, w in zip((query, key), weights, strict=True))
    query, key = naive_rope(query, positions, table), naive_rope(key, positions, table)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // 16, 1, 0, :, slot % 16] = key[token]
            expected[slot // 16, 1, 1, :, slot % 16] = value[token]
    close(q, query, dtype)
    close(pool, expected, dtype)


def check_attention(
    heads: Heads, shapes: list[tuple[int, int]], window: int, dtype: torch.dtype, device: str, seed: int = 0
) -> None:
    """Called as two layers of a step: the second reuses what the first left in the plan."""
    case = paged_case(heads, shapes, window=window, dtype=dtype, device=device, seed=seed)
    for _ in range(2):
        close(ops.attention(case.q, case.kv_layer, case.plan, case.scale), case.expected(), dtype)


def check_copy_blocks(dtype: torch.dtype, device: str) -> None:
    pool = random(9, 2, 2, 3, 16, 16, dtype=dtype, device=device)
    expected = pool.clone()
    expected[[7, 2]] = pool[[1, 5]]
    ops.copy_blocks(pool, torch.tensor([1, 5], device=device), torch.tensor([7, 2], device=device))
    assert torch.equal(pool, expected)
