"""CUDA graphs of a step: inputs, forward pass and logits in one launch, for a ladder of shapes.

A captured graph reads and writes fixed addresses, so each shape owns a static input buffer; a step is padded to the next shape
by tokens that write nothing and sequences that attend to nothing. Everything else that changes (block tables, last tokens)
lives in rows, whose addresses stay. Grids follow host bounds (`max_model_len`), real lengths are read on the device.
Sampling follows outside the graph.

Decodes have shapes of their own, one token a sequence. A step with prompts has room for some decodes, then for prompt tokens
in a few chunks; a launch kernel by kernel would take the CPU longer than such a step takes the GPU.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from workstation.engine.inputs import PADDING, HostStep, InputBuilder, Ints
from workstation.engine.transfer import to_device
from workstation.memory import GRAPH_CHUNKS, GRAPH_DECODES, GRAPH_PROMPTS
from workstation.model.inputs import InputTensors

log = logging.getLogger("ws.engine")

# What a captured graph runs: model inputs → logits [L, V], written into the second argument if it is given.
Forward = Callable[[InputTensors, torch.Tensor | None], torch.Tensor]

MOST_DECODES = 512
SPARE_BYTES = 64 * 1024 * 1024  # free beside a step's own memory before it is captured


class Shape(NamedTuple):
    """What a captured step has room for: decodes, and prompt tokens in so many chunks."""

    decodes: int
    tokens: int = 0
    chunks: int = 0

    @property
    def all_tokens(self) -> int:
        return self.decodes + self.tokens

    @property
    def sequences(self) -> int:
        return self.decodes + self.chunks

    def holds(self, step: HostStep) -> bool:
        """Decodes never take the place of prompts, nor the other way round."""
        chunks, tokens = len(step.rows) - step.decodes, len(step.tokens) - step.decodes
        return step.decodes <= self.decodes and tokens <= self.tokens and chunks <= self.chunks


def graph_shapes(max_rows: int, prompts: Sequence[int]) -> list[Shape]:
    """Shapes to capture, the smallest first.

    Decodes of 1, 2, 4, 8, then every 16th up to max_rows (at most 512); so many tokens of prompts beside 0 … 256 decodes.
    """
    top = min(max_rows, MOST_DECODES)
    sizes = [size for size in (1, 2, 4, 8) if size < top] + list(range(16, top, 16))
    beside = sorted({min(size, top) for size in GRAPH_DECODES})
    mixed = [Shape(size, tokens, min(GRAPH_CHUNKS, max_rows)) for size in beside for tokens in prompts]
    return sorted([*(Shape(size) for size in [*sizes, top]), *mixed], key=lambda shape: (shape.all_tokens, shape.chunks))


def largest_shape(max_rows: int, max_tokens: int) -> Shape:
    """Of a step with max_tokens, nearly all of them prompts'; too large to be captured, as a rule."""
    decodes = 1 if max_tokens > 1 and max_rows > 1 else 0
    return Shape(decodes, max_tokens - decodes, min(GRAPH_CHUNKS, max_rows))


def uncaptured_shapes(max_rows: int, prompts: Sequence[int], max_tokens: int) -> list[Shape]:
    """Steps of prompts too large to be captured, one for each range of tokens in which products keep their kernels, the largest
    last. prompts: those captured."""
    ends = [tokens for tokens in GRAPH_PROMPTS if tokens not in prompts and tokens < max_tokens]
    return [largest_shape(max_rows, tokens) for tokens in [*ends, max_tokens]]


_NOTHING = np.empty(0, dtype=np.int64)
_NO_STEP = HostStep(_NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, np.zeros(1, dtype=np.int64), 0, 1, 1)


class _Fields:
    """Views into a shape's packed inputs: int64 first, then int32, each starting at 16 bytes (alignment is compiled in).

    tokens, positions, token_rows: [3, tokens].  sampled: [3, sequences]: which tokens need logits, samples' rows and positions.
    rows, lengths: [sequences].  query_start: [sequences + 1].
    """

    def __init__(self, shape: Shape, packed: Any, narrow: Callable[[Any], Any]) -> None:
        tokens, sequences = shape.all_tokens, shape.sequences
        wide = 3 * (tokens + sequences)
        self.tokens = packed[:3 * tokens].reshape(3, tokens)
        self.sampled = packed[3 * tokens:wide].reshape(3, sequences)
        ints = narrow(packed[wide + wide % 2:])
        room = _quads(sequences)
        self.rows, self.lengths = ints[:sequences], ints[room:room + sequences]
        self.query_start = ints[2 * room:2 * room + sequences + 1]

    @staticmethod
    def size(shape: Shape) -> int:
        """int64 elements of the packed inputs."""
        wide = 3 * (shape.all_tokens + shape.sequences)
        return wide + wide % 2 + (2 * _quads(shape.sequences) + _quads(shape.sequences + 1)) // 2


def _quads(count: int) -> int:
    return -(-count // 4) * 4


@dataclass(slots=True)
class _Captured:
    inputs: torch.Tensor
    logits: torch.Tensor
    graph: Any


class StepGraphs:
    """Graphs for steps in which every chunk is sampled once at most.

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
        self._captured: dict[Shape, _Captured] = {}

    def run(self, shape: Shape, logits: torch.Tensor) -> None:
        """Run a step of this shape that does nothing, kernel by kernel."""
        self._run(shape, self._idle_inputs(shape), logits[:shape.sequences])

    def idle(self, shape: Shape, longest_chunk: int | None = None, longest_context: int | None = None) -> InputTensors:
        """A step of this shape that does nothing, with other bounds than its own: kernels are chosen by them."""
        return self._tensors(shape, self._idle_inputs(shape), longest_chunk, longest_context)

    def capture(self, shapes: list[Shape], logits: torch.Tensor, report: Callable[[int, int], None]) -> None:
        """Capture the shapes, given smallest first, largest first, in one memory pool. Those without memory stay uncaptured.

        logits: [most sequences, V], into whose first rows every graph writes its result: of its own it keeps none.
        report: called with (shapes done, shapes in all).
        """
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        found = {}
        for number, shape in enumerate(reversed(shapes), 1):
            try:
                found[shape] = self._capture(shape, pool, stream, logits[:shape.sequences])
            except torch.OutOfMemoryError:
                log.warning("no memory for a CUDA graph of %s; such steps run without one", shape)
            report(number, len(shapes))
        self._captured = {shape: found[shape] for shape in shapes if shape in found}

    def choose(self, step: HostStep) -> Shape | None:
        """The smallest captured shape that holds this step."""
        return next((shape for shape in self._captured if shape.holds(step)), None)

    def replay(self, shape: Shape, step: HostStep, samples: Ints) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run a step. samples: [3, L]: each sample's chunk, row and position.

        Returns logits [L, V] in the order of the samples, and their rows and positions [L], on the device. Results lie in
        static memory: they are good until the next replay.
        """
        captured = self._captured[shape]
        captured.inputs.copy_(to_device(self._pack(shape, step, samples), self._device), non_blocking=True)
        captured.graph.replay()
        count = samples.shape[1]
        _, rows, positions = _device_fields(shape, captured.inputs).sampled[:, :count]
        return captured.logits[:count], rows, positions

    def _pack(self, shape: Shape, step: HostStep, samples: Ints) -> Ints:
        packed = np.empty(_Fields.size(shape), dtype=np.int64)
        fields = _Fields(shape, packed, lambda part: part.view(np.int32))
        decodes, first, tokens = step.decodes, shape.decodes, len(step.tokens) - step.decodes
        real = (step.tokens, step.positions, step.token_rows)
        fields.tokens[:] = [[0], [PADDING], [self._pad_row]]
        for field, values in zip(fields.tokens, real, strict=True):
            field[:decodes], field[first:first + tokens] = values[:decodes], values[decodes:]
        chunks = len(step.rows) - decodes
        fields.rows[:], fields.lengths[:] = self._pad_row, 0
        for part, values in ((fields.rows, step.rows), (fields.lengths, step.lengths)):
            part[:decodes], part[first:first + chunks] = values[:decodes], values[decodes:]
        moved = step.query_start + (first - decodes)  # where the prompts' tokens lie now
        fields.query_start[:first] = np.arange(first)
        fields.query_start[first:first + chunks + 1] = moved[decodes:]
        fields.query_start[first + chunks:] = first + tokens
        fields.sampled[:] = 0
        fields.sampled[:, :samples.shape[1]] = samples
        ends = np.where(samples[0] < decodes, samples[0], moved[samples[0] + 1] - 1)
        fields.sampled[0, :samples.shape[1]] = ends
        return packed

    def _capture(self, shape: Shape, pool: Any, stream: Any, logits: torch.Tensor) -> _Captured:
        inputs = self._idle_inputs(shape)
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(stream):
            # Compiles kernels and warms libraries, which a capture may not; and proves that there is memory, and some to spare:
            # a capture that runs out of it ends the process (torch 2.11).
            spare = torch.empty(SPARE_BYTES, dtype=torch.uint8, device=self._device)
            self._run(shape, inputs, logits)
            del spare
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with _no_collection(), torch.cuda.graph(graph, pool=pool, stream=stream):
            self._run(shape, inputs, logits)
        return _Captured(inputs, logits, graph)

    def _idle_inputs(self, shape: Shape) -> torch.Tensor:
        """Packed inputs of a step that only pads."""
        return torch.from_numpy(self._pack(shape, _NO_STEP, np.empty((3, 0), dtype=np.int64))).to(self._device)

    def _run(self, shape: Shape, inputs: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._forward(self._tensors(shape, inputs), out)

    def _tensors(self, shape: Shape, inputs: torch.Tensor, longest_chunk: int | None = None,
                 longest_context: int | None = None) -> InputTensors:
        fields = _device_fields(shape, inputs)
        placed = self._builder.placed(*fields.tokens)
        bounds = replace(_NO_STEP, decodes=shape.decodes, max_query_len=longest_chunk or max(shape.tokens, 1),
                         max_context_len=longest_context or self._max_model_len)
        plans = self._builder.plans(fields.query_start, fields.lengths, fields.rows, bounds)
        wanted = fields.sampled[0] if shape.chunks else None
        return InputTensors(placed.token_ids, placed.positions, placed.slots, plans, wanted)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Within: Python leaves garbage alone. Graphs of an engine there was before may be part of it, and letting go of those ends
    the capture under way."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _device_fields(shape: Shape, inputs: torch.Tensor) -> _Fields:
    return _Fields(shape, inputs, lambda part: part.view(torch.int32))
