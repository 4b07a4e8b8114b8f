"""Inputs and naive float32 oracles for the kernel tests: no blocks, no batching, nothing clever."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workstation.kernels.paging import FP8, UNSCALED, AttentionPlan, KVScales

BLOCK = 16


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    dim: int


@dataclass
class PagedCase:
    """A step: each sequence's (new tokens, context length), its keys and values dense, and the same in shuffled blocks."""

    heads: Heads
    shapes: list[tuple[int, int]]
    window: int
    q: torch.Tensor
    kv_layer: torch.Tensor
    plan: AttentionPlan
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    scales: KVScales = UNSCALED

    @property
    def scale(self) -> float:
        return self.heads.dim**-0.5

    def expected(self) -> torch.Tensor:
        """[T, Hq, D] float32 on the CPU."""
        outs = []
        start = 0
        for (new, length), key, value in zip(self.shapes, self.keys, self.values, strict=True):
            q = self.q[start : start + new].float().cpu()
            outs.append(naive_attention(q, key, value, length, self.scale, self.window))
            start += new
        return torch.cat(outs)


def naive_attention(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, scale: float, window: int
) -> torch.Tensor:
    """q [n, Hq, D], key and value [length, Hkv, D], float32: the last n of `length` tokens look back."""
    if length == 0:
        return torch.zeros_like(q)
    group = q.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, key) * scale
    at = torch.arange(length - q.shape[0], length)[:, None]
    past = torch.arange(length)[None, :]
    hidden = past > at
    if window:
        hidden = hidden | (past <= at - window)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)


def paged_case(
    heads: Heads,
    shapes: list[tuple[int, int]],
    *,
    window: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layers: int = 3,
    layer: int = 1,
    seed: int = 0,
    scales: KVScales | None = None,
) -> PagedCase:
    """`shapes` has (new tokens, context length) a sequence, decodes first. Every slot that no query may see holds NaN.

    scales: the cache is FP8, and keys and values are what its codes mean.
    """
    gen = torch.Generator().manual_seed(seed)
    blocks = [-(-length // BLOCK) for _, length in shapes]
    total = sum(blocks) + 3
    pool = torch.full((total, layers, 2, heads.kv, BLOCK, heads.dim), torch.nan)
    pool[0] = 0
    order = (torch.randperm(total - 1, generator=gen) + 1).tolist()
    width = max([*blocks, 1]) + 2
    tables = torch.full((len(shapes) + 2, width), order[-1], dtype=torch.int32)  # stale entries point to NaN
    rows = torch.randperm(len(shapes) + 2, generator=gen)[: len(shapes)].to(torch.int32)
    keys, values = [], []
    for row, (new, length), count in zip(rows.tolist(), shapes, blocks, strict=True):
        own, order = order[:count], order[count:]
        key, value = (torch.randn(length, heads.kv, heads.dim, generator=gen).to(dtype).float() for _ in range(2))
        if scales is not None:  # codes now, multiplied by their scales where the oracle gets them
            key, value = ((x / scale).clamp(-448, 448).to(FP8).float() for x, scale in zip((key, value), scales, strict=True))
        oldest = max(0, length - new + 1 - window) if window else 0
        for at in range(oldest, length):
            pool[own[at // BLOCK], layer, 0, :, at % BLOCK] = key[at]
            pool[own[at // BLOCK], layer, 1, :, at % BLOCK] = value[at]
        for j, block in enumerate(own):
            tables[row, j] = 0 if (j + 1) * BLOCK <= oldest else block  # blocks out of the window were given back
        keys.append(key if scales is None else key * scales.key)
        values.append(value if scales is None else value * scales.value)
    counts = torch.tensor([0, *(new for new, _ in shapes)])
    decodes = next((i for i, (new, _) in enumerate(shapes) if new != 1), len(shapes))
    plan = AttentionPlan(
        query_start=counts.cumsum(0).to(torch.int32).to(device),
        context_lens=torch.tensor([length for _, length in shapes], dtype=torch.int32, device=device),
        tables=tables.to(device),
        rows=rows.to(device),
        num_decodes=decodes,
        max_query_len=max(new for new, _ in shapes),
        max_context_len=max(length for _, length in shapes),
        window=window,
        block_size=BLOCK,
    )
    q = torch.randn(int(counts.sum()), heads.query, heads.dim, generator=gen).to(dtype)
    kv_layer = pool.to(dtype if scales is None else FP8).to(device)[:, layer]
    return PagedCase(heads, shapes, window, q.to(device), kv_layer, plan, keys, values, scales or UNSCALED)


def naive_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.float().cpu(), weight.float().cpu()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def naive_rope(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] float32; one token, one head, one pair of components at a time."""
    out = x.clone()
    half = cos_sin.shape[1] // 2
    for token, position in enumerate(positions.tolist()):
        cos, sin = cos_sin[position, :half], cos_sin[position, half:]
        for head in range(x.shape[1]):
            first, second = x[token, head, :half], x[token, head, half : 2 * half]
            out[token, head, :half] = first * cos - second * sin
            out[token, head, half : 2 * half] = second * cos + first * sin
    return out


def cos_sin_table(rows: int, rotary_dim: int, scale: float = 1.0) -> torch.Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(rows)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1) * scale
