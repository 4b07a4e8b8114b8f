"""The paged KV cache as kernels see it.

One pool tensor a KV group: `kv[blocks, layers of the group, K|V, kv heads, block_size, head_dim]`. A layer reads the
view `kv[:, i]` = `[blocks, 2, kv heads, block_size, head_dim]`; kernels take its strides, so the layout may change.
A token's *slot* is `block * block_size + offset in block`. Block 0 is the null block, all zeros and never written:
padding and freed window blocks point to it.

A pool of float8_e4m3fn holds codes: a key is `code * scales.key`, a value `code * scales.value`, one scale each a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

FP8 = torch.float8_e4m3fn


class KVScales(NamedTuple):
    """What a layer's stored keys and values are multiplied with; 1 unless the cache is FP8."""

    key: float = 1.0
    value: float = 1.0


UNSCALED = KVScales()


def codes(kv: torch.Tensor) -> torch.Tensor:
    """An FP8 cache as bytes, for what is done to it without arithmetic; any other as it is."""
    return kv.view(torch.uint8) if kv.dtype == FP8 else kv


@dataclass(slots=True)
class AttentionPlan:
    """What paged attention needs to know about a step, for one KV group. Sequences with one new token come first.

    Attributes:
        query_start: [S + 1] int32, first token of each sequence in the flat batch; query_start[S] = T.
        context_lens: [S] int32, keys a sequence has after this step (its new tokens included).
        tables: [R, W] int32, block tables by row.  rows: [S] int32, each sequence's row in `tables`.
        num_decodes: sequences at the front that bring exactly one token.
        max_query_len, max_context_len: host integers, upper bounds over the step.
        window: a query at position p sees keys in (p - window, p]; 0 means all keys up to p.
        block_size: tokens a block.
        scratch: whatever a back-end prepares once a step for all layers (index arrays, tile lists).
    """

    query_start: torch.Tensor
    context_lens: torch.Tensor
    tables: torch.Tensor
    rows: torch.Tensor
    num_decodes: int
    max_query_len: int
    max_context_len: int
    window: int = 0
    block_size: int = 16
    scratch: dict[str, Any] = field(default_factory=dict)


class StepInputs(NamedTuple):
    """What a step's T tokens are and where they stand.

    token_ids, positions: [T] int64; positions of padding are 0.  slots: a KV group each, [T] int64, -1 for padding.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: tuple[torch.Tensor, ...]
