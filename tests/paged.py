"""Runs a Decoder by hand over a paged cache with shuffled blocks, as the engine would, for tests of the model."""

from __future__ import annotations

import torch

from workstation.kernels.paging import AttentionPlan
from workstation.model.inputs import InputTensors
from workstation.model.transformer import Decoder

BLOCK = 16


class PagedModel:
    """Sequences in rows of shuffled block tables over one pool that starts full of NaN.

    Blocks that have left a sliding window point to the null block 0, as after the engine freed them.
    """

    def __init__(self, decoder: Decoder, rows: int, max_len: int, *, seed: int = 0,
                 dtype: torch.dtype = torch.float32) -> None:
        shape = decoder.shape
        self.decoder, self.groups = decoder, shape.kv_groups
        width = -(-max_len // BLOCK)
        blocks = 1 + rows * width * len(self.groups)
        self.pool = torch.full((blocks, shape.layers_per_block, 2, shape.num_kv_heads, BLOCK, shape.head_dim),
                               float("nan"), dtype=dtype)
        self.pool[0] = 0
        order = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(seed)) + 1
        self.tables = order.view(len(self.groups), rows, width).to(torch.int32)
        self.kv = (self.pool,) * len(self.groups)
        self.computed = [0] * rows

    def step(self, work: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """Compute each row's next tokens {row: token ids} in one step; returns {row: [tokens, V] float32 logits}."""
        ordered = sorted(work.items(), key=lambda item: len(item[1]) != 1)
        counts = [len(tokens) for _, tokens in ordered]
        rows = [row for row, _ in ordered]
        starts = [self.computed[row] for row in rows]
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        positions = torch.cat([torch.arange(a, b) for a, b in zip(starts, ends, strict=True)])
        plans, slots = [], []
        for number, group in enumerate(self.groups):
            tables = self._visible_tables(number, group.window)
            slots.append(torch.cat([self._slots(tables[row], a, b)
                                    for row, a, b in zip(rows, starts, ends, strict=True)]))
            plans.append(AttentionPlan(
                query_start=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
                context_lens=torch.tensor(ends, dtype=torch.int32), tables=tables,
                rows=torch.tensor(rows, dtype=torch.int32), num_decodes=sum(count == 1 for count in counts),
                max_query_len=max(counts), max_context_len=max(ends), window=group.window, block_size=BLOCK))
        inputs = InputTensors(torch.tensor([token for _, tokens in ordered for token in tokens]), positions,
                              tuple(slots), tuple(plans), torch.arange(sum(counts)))
        with torch.inference_mode():
            logits = self.decoder.logits(self.decoder.forward(inputs, self.kv)[inputs.logits_indices])
        for row, end in zip(rows, ends, strict=True):
            self.computed[row] = end
        return dict(zip(rows, logits.split(counts), strict=True))

    def _visible_tables(self, group: int, window: int) -> torch.Tensor:
        tables = self.tables[group].clone()
        if window:
            for row, start in enumerate(self.computed):
                tables[row, :max(0, (start - window + 1) // BLOCK)] = 0
        return tables

    @staticmethod
    def _slots(table: torch.Tensor, start: int, end: int) -> torch.Tensor:
        places = torch.arange(start, end)
        return table[places // BLOCK].long() * BLOCK + places % BLOCK
