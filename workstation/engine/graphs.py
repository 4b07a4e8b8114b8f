"""CUDA graphs of the decode step: inputs, forward pass and logits in one launch, for a ladder of batch sizes.

A captured graph reads and writes fixed addresses, so each size owns a static input buffer; a batch is padded to the next
size by rows that write nothing and attend to nothing. Everything else that changes (block tables, last tokens) lives in rows,
whose addresses stay. Grids follow host bounds (`max_model_len`), real lengths are read on the device. Sampling follows
outside the graph.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from workstation.engine.inputs import ON_DEVICE, PADDING, HostStep, InputBuilder, Ints
from workstation.engine.transfer import to_device
from workstation.model.inputs import InputTensors

log = logging.getLogger("ws.engine")

# What a captured graph runs: model inputs → logits [B, V] float32.
Forward = Callable[[InputTensors], torch.Tensor]


def graph_sizes(max_rows: int) -> list[int]:
    """Batch sizes to capture, ascending: 1, 2, 4, 8, then every 16th up to max_rows (at most 512)."""
    top = min(max_rows, 512)
    sizes = [size for size in (1, 2, 4, 8) if size < top] + list(range(16, top, 16))
    return [*sizes, top]


@dataclass(slots=True)
class _Captured:
    """One size: packed input [3 * size + 2 * size] int64 (tokens, positions, rows | sample rows, sample positions)."""

    size: int
    inputs: torch.Tensor
    logits: torch.Tensor
    graph: Any


class DecodeGraphs:
    """Graphs for batches in which every sequence brings one token.

    Args:
        forward: runs the model and its head.  pad_row: a row no sequence owns.  max_model_len: bound on every context.
    """

    def __init__(self, builder: InputBuilder, forward: Forward, *, pad_row: int, max_model_len: int,
                 device: torch.device) -> None:
        self._builder = builder
        self._forward = forward
        self._pad_row = pad_row
        self._max_model_len = max_model_len
        self._device = device
        self._sizes: list[int] = []
        self._captured: dict[int, _Captured] = {}

    def capture(self, sizes: list[int]) -> None:
        """Capture the sizes, largest first, in one memory pool. Out of memory leaves the smaller ones uncaptured."""
        pool = torch.cuda.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            try:
                self._captured[size] = self._capture(size, pool)
            except torch.OutOfMemoryError:
                log.warning("no memory for a CUDA graph of %d rows; such batches run without one", size)
        self._sizes = sorted(self._captured)

    def fits(self, step: HostStep) -> bool:
        """Whether a captured size covers this step."""
        return step.max_query_len == 1 and bool(self._sizes) and len(step.rows) <= self._sizes[-1]

    def replay(self, step: HostStep, samples: Ints) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run a decode step: logits [S, V] in the order of the chunks, and samples' rows and positions [L] on the device.

        Results lie in static memory: they are good until the next replay of the stream.
        """
        captured = self._captured[self._sizes[bisect_left(self._sizes, len(step.rows))]]
        size, count = captured.size, len(step.rows)
        packed = np.empty(3 * size + 2 * count, dtype=np.int64)
        fields = packed[:3 * size].reshape(3, size)
        fields[:, :count] = step.tokens, step.positions, step.rows
        fields[:, count:] = [[0], [PADDING], [self._pad_row]]
        packed[3 * size:].reshape(2, count)[:] = samples
        captured.inputs[:len(packed)].copy_(to_device(packed, self._device), non_blocking=True)
        captured.graph.replay()
        rows = captured.inputs[3 * size:3 * size + count]
        return captured.logits[:count], rows, captured.inputs[3 * size + count:3 * size + 2 * count]

    def _capture(self, size: int, pool: Any) -> _Captured:
        inputs = torch.zeros(5 * size, dtype=torch.int64, device=self._device)
        inputs[:size] = ON_DEVICE
        inputs[size:2 * size] = PADDING
        inputs[2 * size:3 * size] = self._pad_row
        constants = (torch.arange(size + 1, dtype=torch.int32, device=self._device),
                     torch.arange(size, dtype=torch.int64, device=self._device))
        self._run(inputs, size, constants)  # compiles kernels and warms libraries, which a capture may not
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = self._run(inputs, size, constants)
        return _Captured(size, inputs, logits, graph)

    def _run(self, inputs: torch.Tensor, size: int, constants: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        tokens, positions, rows = inputs[:size], inputs[size:2 * size], inputs[2 * size:3 * size]
        bounds = HostStep(*(np.empty(0, dtype=np.int64),) * 6, decodes=size, max_query_len=1,
                          max_context_len=self._max_model_len)
        query_start, every = constants
        placed = self._builder.placed(tokens, positions, rows)
        plans = self._builder.plans(query_start, placed.lengths, placed.rows, bounds)
        model = InputTensors(placed.token_ids, placed.positions, placed.slots, plans, every)
        return self._forward(model)
