"""A step that computes whole documents at once, each from its first token, outside an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workstation.architecture import ModelShape
from workstation.kernels.paging import AttentionPlan
from workstation.model.inputs import InputTensors

BLOCK_SIZE = 16


def whole_step(
    shape: ModelShape, documents: Sequence[Sequence[int]], kv_dtype: torch.dtype, device: torch.device,
) -> tuple[InputTensors, tuple[torch.Tensor, ...]]:
    """The step, each document with blocks of its own in every KV group, and the pool for it, a group each."""
    size = BLOCK_SIZE
    lengths = torch.tensor([len(tokens) for tokens in documents])
    widths = (lengths + size - 1) // size
    firsts = 1 + widths.cumsum(0) - widths  # block 0 stays the null block
    tables = firsts[:, None] + torch.arange(int(widths.max()))
    positions = torch.cat([torch.arange(int(length)) for length in lengths])
    owners = torch.arange(len(documents)).repeat_interleave(lengths)
    groups, blocks = shape.kv_groups, int(widths.sum())

    def on_device(tensor: torch.Tensor, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return tensor.to(device, dtype)

    plans, slots = [], []
    for number, group in enumerate(groups):
        table = tables + number * blocks
        slots.append(on_device(table[owners, positions // size] * size + positions % size))
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        plans.append(AttentionPlan(
            query_start=on_device(starts, torch.int32), context_lens=on_device(lengths, torch.int32),
            tables=on_device(table, torch.int32), rows=on_device(torch.arange(len(documents)), torch.int32), num_decodes=0,
            max_query_len=int(lengths.max()), max_context_len=int(lengths.max()), window=group.window, block_size=size))
    tokens = torch.tensor([token for document in documents for token in document])
    pool = torch.zeros(1 + blocks * len(groups), shape.layers_per_block, 2, shape.num_kv_heads, size, shape.head_dim,
                       dtype=kv_dtype, device=device)
    return InputTensors(on_device(tokens), on_device(positions), tuple(slots), tuple(plans), None), (pool,) * len(groups)
