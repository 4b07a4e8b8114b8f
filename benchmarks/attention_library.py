"""Prefill through torch's own attention: [past, not causal] + [chunk, causal] over a contiguous copy, merged by log-sum-exp.

To know what the libraries reach on this machine, in their favour: the copy is made once, before what is timed. They need
every length on the host, and one sequence a call.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from attention_cases import BLOCK, Step


@triton.jit
def merge_kernel(a, b, lse_a, lse_b, out, tokens, a_token, a_head, b_token, b_head, HEADS: tl.constexpr, DIM: tl.constexpr):
    """out [T, H, D] = two attentions over disjoint keys, weighted by their sums; lse [H, T], natural logarithm."""
    token = tl.program_id(0)
    head = tl.arange(0, HEADS)
    dim = tl.arange(0, DIM)
    first = tl.load(lse_a + head * tokens + token)
    second = tl.load(lse_b + head * tokens + token)
    highest = tl.maximum(first, second)
    first = tl.exp(first - highest)
    second = tl.exp(second - highest)
    share = (first / (first + second))[:, None]
    x = tl.load(a + token.to(tl.int64) * a_token + head[:, None] * a_head + dim[None, :]).to(tl.float32)
    y = tl.load(b + token.to(tl.int64) * b_token + head[:, None] * b_head + dim[None, :]).to(tl.float32)
    place = out + (token.to(tl.int64) * HEADS + head[:, None]) * DIM + dim[None, :]
    tl.store(place, (x * share + y * (1 - share)).to(out.dtype.element_ty))


def library_prefill(step: Step, layer: int, which: str) -> None:
    """which: cudnn or flash. ValueError for more than one sequence."""
    if len(step.shapes) != 1:
        raise ValueError("the libraries' candidates take one sequence")
    new, length = step.shapes[0]
    past = length - new
    copies = step.plan.scratch.setdefault("contiguous", {})
    if layer not in copies:
        copies[layer] = contiguous(step, layer)
    key, value = copies[layer]
    q = step.q.transpose(0, 1)[None]  # [1, Hq, T, D]
    b, lse_b = _attend(which, q, key[:, :, past:length], value[:, :, past:length], True, step.scale)
    if past == 0:
        step.out.copy_(b[0].transpose(0, 1))
        return
    a, lse_a = _attend(which, q, key[:, :, :past], value[:, :, :past], False, step.scale)
    merge_kernel[(new,)](
        a, b, lse_a, lse_b, step.out, new, a.stride(2), a.stride(1), b.stride(2), b.stride(1),
        HEADS=step.heads.query, DIM=step.heads.dim, num_warps=4,
    )  # fmt: skip


def contiguous(step: Step, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The only sequence's keys and values, each [1, Hkv, length, D]."""
    length = step.shapes[0][1]
    blocks = step.plan.tables[0, : -(-length // BLOCK)].long()
    key, value = step.layer(layer)[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length].contiguous()
    return key[None], value[None]


def _attend(
    which: str, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (out [1, Hq, T, D], lse [1, Hq, T] contiguous)."""
    if which == "cudnn":
        done = torch.ops.aten._scaled_dot_product_cudnn_attention(q, key, value, None, True, 0.0, causal, False, scale=scale)
    else:
        done = torch.ops.aten._scaled_dot_product_flash_attention(q, key, value, 0.0, causal, False, scale=scale)
    return done[0], done[1].reshape(q.shape[:3]).contiguous()
