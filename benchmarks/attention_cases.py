"""Steps to measure attention on: a pool of random keys and values, shuffled block tables, and a float32 oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from workstation.kernels.paging import FP8, AttentionPlan, codes

BLOCK = 16


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    dim: int

    def token_bytes(self, stored: torch.Tensor) -> int:
        """Bytes of keys and values a token holds in one layer of a pool like `stored`."""
        return 2 * self.kv * self.dim * stored.element_size()


@dataclass
class Step:
    """Sequences of (new tokens, context length); `pool` is [blocks, layers, 2, Hkv, 16, D]."""

    heads: Heads
    shapes: list[tuple[int, int]]
    pool: torch.Tensor
    plan: AttentionPlan
    q: torch.Tensor
    out: torch.Tensor

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.heads.dim)

    def layer(self, index: int) -> torch.Tensor:
        return self.pool[:, index]

    def flops(self) -> float:
        return 4.0 * self.heads.query * self.heads.dim * sum(n * (c - n) + n * (n + 1) / 2 for n, c in self.shapes)

    def bytes_read(self) -> int:
        return self.heads.token_bytes(self.pool) * sum(length for _, length in self.shapes)


def make_step(
    heads: Heads,
    shapes: list[tuple[int, int]],
    memory: torch.Tensor,
    *,
    layers: int = 1,
    poison: bool = False,
    bound: int | None = None,
    seed: int = 0,
) -> Step:
    """`memory`: flat bf16, fp16 or FP8 tensor that the pool is cut from. poison: NaN in slots behind each sequence's end.

    bound: the plan's max_context_len, as a captured graph has it.
    """
    device, dtype = memory.device, torch.bfloat16 if memory.dtype == FP8 else memory.dtype
    counts = [-(-length // BLOCK) for _, length in shapes]
    shape = (sum(counts) + 1, layers, 2, heads.kv, BLOCK, heads.dim)
    size = torch.Size(shape).numel()
    if size > memory.numel():
        raise ValueError(f"a pool of {size} elements does not fit into memory of {memory.numel()}")
    pool = memory[:size].view(shape)
    pool[0] = 0
    generator = torch.Generator().manual_seed(seed)
    order = (torch.randperm(sum(counts), generator=generator) + 1).to(torch.int32)
    width = -(-max(counts) // 16) * 16
    tables = torch.zeros((len(shapes), width), dtype=torch.int32)
    taken = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[taken : taken + count]
        taken += count
    if poison:
        for row, (_, length) in enumerate(shapes):
            if length % BLOCK:
                pool[int(tables[row, length // BLOCK]), :, :, :, length % BLOCK :] = torch.nan
    new = torch.tensor([0, *(n for n, _ in shapes)])
    plan = AttentionPlan(
        query_start=new.cumsum(0).to(torch.int32).to(device),
        context_lens=torch.tensor([c for _, c in shapes], dtype=torch.int32, device=device),
        tables=tables.to(device),
        rows=torch.arange(len(shapes), dtype=torch.int32, device=device),
        num_decodes=sum(n == 1 for n, _ in shapes),
        max_query_len=max(n for n, _ in shapes),
        max_context_len=bound or max(c for _, c in shapes),
    )
    q = torch.randn((int(new.sum()), heads.query, heads.dim), device=device).to(dtype)
    return Step(heads, shapes, pool, plan, q, torch.full_like(q, torch.nan))


def oracle(step: Step, layer: int = 0) -> torch.Tensor:
    """[T, Hq, D] float32."""
    group = step.heads.query // step.heads.kv
    outs = []
    start = 0
    for row, (new, length) in enumerate(step.shapes):
        blocks = step.plan.tables[row, : -(-length // BLOCK)].long()
        stored = codes(step.layer(layer))[blocks].view(step.pool.dtype).float()
        both = stored.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]  # [2, Hkv, length, D]
        key, value = (side.repeat_interleave(group, 0) for side in both)
        q = step.q[start : start + new].float().transpose(0, 1)
        score = q @ key.transpose(1, 2) * step.scale
        at = torch.arange(length - new, length, device=q.device)[:, None]
        score = score.masked_fill(torch.arange(length, device=q.device)[None, :] > at, -torch.inf)
        outs.append((score.softmax(-1) @ value).transpose(0, 1))
        start += new
    return torch.cat(outs)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """‖out − expected‖ / ‖expected‖; NaN where anything was not written."""
    return float((out.float() - expected).norm() / expected.norm())
