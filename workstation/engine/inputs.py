"""Batch → InputTensors: one packed upload a step, the rest is derived on the device from the rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from workstation.architecture import KVGroup
from workstation.engine.batch import Batch
from workstation.engine.rows import Rows
from workstation.engine.transfer import to_device
from workstation.kernels.paging import AttentionPlan
from workstation.model.inputs import InputTensors

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class StepTensors:
    """A step's model inputs and what sampling needs: rows and positions, [L] int64 on the device."""

    model: InputTensors
    sample_rows: torch.Tensor
    sample_positions: torch.Tensor


def _host_tokens(batch: Batch, total: int) -> tuple[Ints, list[int]]:
    """Token ids known on the host, and the flat places of those that are still on the device."""
    tokens = np.zeros(total, dtype=np.int64)
    on_device: list[int] = []
    place = 0
    for chunk in batch.chunks:
        if chunk.pending:
            on_device.append(place)
        elif chunk.count == 1:
            tokens[place] = chunk.seq.tokens[chunk.start]
        else:
            tokens[place:place + chunk.count] = chunk.seq.tokens[chunk.start:chunk.start + chunk.count]
        place += chunk.count
    return tokens, on_device


class InputBuilder:
    """Turns a Batch into tensors, given the rows it refers to."""

    def __init__(self, rows: Rows, groups: tuple[KVGroup, ...], block_size: int) -> None:
        self._rows = rows
        self._groups = groups
        self._block_size = block_size

    def build(self, batch: Batch) -> StepTensors:
        """Apply the batch's table changes and build its tensors. Nothing waits for the device."""
        self._rows.update_tables([(group, chunk.row, entry, block) for chunk in batch.chunks
                                  for group, entry, block in chunk.table_updates])
        counts = np.array([chunk.count for chunk in batch.chunks], dtype=np.int64)
        starts = np.array([chunk.start for chunk in batch.chunks], dtype=np.int64)
        rows = np.array([chunk.row for chunk in batch.chunks], dtype=np.int64)
        query_start = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_start[1:])
        total = int(query_start[-1])
        token_rows = np.repeat(rows, counts)
        positions = np.arange(total) - np.repeat(query_start[:-1] - starts, counts)
        tokens, on_device = _host_tokens(batch, total)
        last = query_start[1:] - 1
        samples = batch.samples
        parts = [
            tokens, positions, token_rows, np.array(on_device, dtype=np.int64), rows, starts + counts, query_start,
            np.array([last[sample.chunk] for sample in samples], dtype=np.int64),
            np.array([sample.row for sample in samples], dtype=np.int64),
            np.array([sample.position for sample in samples], dtype=np.int64),
        ]
        pieces = torch.split(to_device(np.concatenate(parts), self._rows.device), [len(part) for part in parts])
        decodes = int(np.argmax(counts > 1)) if bool((counts > 1).any()) else len(counts)
        return self._assemble(pieces, decodes, int(counts.max()), int((starts + counts).max()))

    def _assemble(self, pieces: tuple[torch.Tensor, ...], decodes: int, max_query: int, max_context: int) -> StepTensors:
        tokens, positions, token_rows, on_device, rows, lengths, query_start, logits_indices, sample_rows, sample_at = pieces
        if on_device.numel() == tokens.numel():
            tokens = self._rows.last_token[token_rows]
        elif on_device.numel():
            tokens = tokens.index_copy(0, on_device, self._rows.last_token[token_rows[on_device]])
        entries, offsets = positions // self._block_size, positions % self._block_size
        slots, plans = [], []
        short = (query_start.to(torch.int32), lengths.to(torch.int32), rows.to(torch.int32))
        for group, table in zip(self._groups, self._rows.tables, strict=True):
            slots.append(table[token_rows, entries].to(torch.int64) * self._block_size + offsets)
            plans.append(AttentionPlan(
                query_start=short[0], context_lens=short[1], tables=table, rows=short[2], num_decodes=decodes,
                max_query_len=max_query, max_context_len=max_context, window=group.window, block_size=self._block_size))
        model = InputTensors(tokens, positions, tuple(slots), tuple(plans), logits_indices)
        return StepTensors(model, sample_rows, sample_at)
