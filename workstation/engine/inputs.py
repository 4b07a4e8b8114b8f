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
from workstation.kernels import ops
from workstation.kernels.paging import AttentionPlan, StepInputs
from workstation.model.inputs import InputTensors

Ints = npt.NDArray[np.int64]
ON_DEVICE = -1  # in place of a token id: the row's last token, which only the device knows
PADDING = -1  # in place of a position: no token; nothing is written and nothing is attended to


@dataclass(slots=True)
class StepTensors:
    """A step's model inputs and what sampling needs: rows and positions, [L] int64 on the device."""

    model: InputTensors
    sample_rows: torch.Tensor
    sample_positions: torch.Tensor


@dataclass(slots=True)
class HostStep:
    """A step as host arrays, [T] a token and [S] a chunk; `lengths` are the chunks' contexts after the step."""

    tokens: Ints
    positions: Ints
    token_rows: Ints
    rows: Ints
    lengths: Ints
    query_start: Ints
    decodes: int
    max_query_len: int
    max_context_len: int


def pack(batch: Batch) -> HostStep:
    """Flatten a batch's chunks."""
    counts = np.array([chunk.count for chunk in batch.chunks], dtype=np.int64)
    starts = np.array([chunk.start for chunk in batch.chunks], dtype=np.int64)
    rows = np.array([chunk.row for chunk in batch.chunks], dtype=np.int64)
    query_start = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=query_start[1:])
    total = int(query_start[-1])
    lengths = starts + counts
    longest = int(counts.max())
    if longest == 1:
        return HostStep(_host_tokens(batch, total), starts, rows, rows, lengths, query_start, total, 1, int(lengths.max()))
    positions = np.arange(total) - np.repeat(query_start[:-1] - starts, counts)
    return HostStep(_host_tokens(batch, total), positions, np.repeat(rows, counts), rows, lengths, query_start,
                    int(np.argmax(counts > 1)), longest, int(lengths.max()))


def _host_tokens(batch: Batch, total: int) -> Ints:
    """Token ids known on the host, ON_DEVICE where they are not."""
    tokens = np.full(total, ON_DEVICE, dtype=np.int64)
    place = 0
    for chunk in batch.chunks:
        if not chunk.pending:
            if chunk.count == 1:
                tokens[place] = chunk.seq.tokens[chunk.start]
            else:
                tokens[place:place + chunk.count] = chunk.seq.tokens[chunk.start:chunk.start + chunk.count]
        place += chunk.count
    return tokens


class InputBuilder:
    """Turns a Batch into tensors, given the rows it refers to."""

    def __init__(self, rows: Rows, groups: tuple[KVGroup, ...], block_size: int) -> None:
        self._rows = rows
        self._groups = groups
        self._block_size = block_size

    def update_tables(self, batch: Batch) -> None:
        """Upload the batch's block table changes."""
        self._rows.update_tables([(group, chunk.row, entry, block) for chunk in batch.chunks
                                  for group, entry, block in chunk.table_updates])

    def samples(self, batch: Batch) -> Ints:
        """[3, L]: chunks, rows and positions of the batch's samples."""
        return np.array([[sample.chunk for sample in batch.samples], [sample.row for sample in batch.samples],
                         [sample.position for sample in batch.samples]], dtype=np.int64)

    def build(self, batch: Batch, step: HostStep) -> StepTensors:
        """The tensors of any batch. Nothing waits for the device."""
        chunks, rows, positions = self.samples(batch)
        parts = [step.tokens, step.positions, step.token_rows, step.rows, step.lengths, step.query_start,
                 step.query_start[chunks + 1] - 1, rows, positions]
        sent = torch.split(to_device(np.concatenate(parts), self._rows.device), [len(part) for part in parts])
        tokens, places, token_rows, sequence_rows, lengths, query_start, logits_indices, sample_rows, sample_at = sent
        placed = self.placed(tokens, places, token_rows)
        plans = self.plans(query_start.to(torch.int32), lengths.to(torch.int32), sequence_rows.to(torch.int32), step)
        model = InputTensors(placed.token_ids, placed.positions, placed.slots, plans, logits_indices)
        return StepTensors(model, sample_rows, sample_at)

    def placed(self, tokens: torch.Tensor, positions: torch.Tensor, token_rows: torch.Tensor) -> StepInputs:
        """What the tokens are and where they stand; ids that never left the device come from their rows."""
        return ops.step_inputs(tokens, positions, token_rows, self._rows.last_token, self._rows.tables, self._block_size)

    def plans(self, query_start: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor,
              step: HostStep) -> tuple[AttentionPlan, ...]:
        """One attention plan a KV group; all tensors int32."""
        return tuple(AttentionPlan(
            query_start=query_start, context_lens=lengths, tables=table, rows=rows, num_decodes=step.decodes,
            max_query_len=step.max_query_len, max_context_len=step.max_context_len, window=group.window,
            block_size=self._block_size) for group, table in zip(self._groups, self._rows.tables, strict=True))
