"""ModelRunner: owns weights, KV pool and rows; launches a step and later collects what it gave.

`launch` never waits for the device: one upload, the forward pass, sampling, state update, and a download that `collect`
waits for. On a GPU the download is a copy into pinned memory, guarded by an event of its own step.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from workstation.architecture import ModelShape
from workstation.engine import sequence
from workstation.engine.batch import Batch, Chunk, Sample, StepResult
from workstation.engine.graphs import Shape, StepGraphs, graph_shapes, largest_shape, uncaptured_shapes
from workstation.engine.inputs import InputBuilder, pack
from workstation.engine.masks import TokenMasks
from workstation.engine.request import SamplingParams, TokenLogprobs
from workstation.engine.rows import Rows
from workstation.engine.sampler import SampleLogprobs, Sampler, prompt_logprobs, top_logprobs
from workstation.engine.sampling_state import SamplingState, banned_next
from workstation.engine.transfer import record_event, to_device, to_host
from workstation.kernels import ops
from workstation.memory import graph_prompts, logit_rows
from workstation.model.inputs import InputTensors
from workstation.model.transformer import Decoder

PROMPT_LOGPROB_ROWS = 256
MOST_COMPILERS = 16  # threads
_GREEDY = SamplingParams(temperature=0.0)
Masks = Callable[[], TokenMasks | None]
Report = Callable[[int, int], None]


@dataclass(slots=True)
class _PromptRows:
    """Log-probabilities of one chunk's prompt tokens, on the way to the host."""

    chunk: int
    targets: list[int]
    parts: list[tuple[torch.Tensor, ...]]


@dataclass(slots=True)
class _Pooled:
    """Hidden states of some chunks, [P, H] float32, on the way to the host."""

    chunks: list[int]
    hidden: torch.Tensor


@dataclass(slots=True)
class Step:
    """A launched step. `ready` is None on the CPU, where launch has done the work already."""

    batch: Batch
    tokens: torch.Tensor
    finite: torch.Tensor
    logprobs: SampleLogprobs | None = None
    beams: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    prompts: list[_PromptRows] = field(default_factory=list)
    pooled: _Pooled | None = None
    ready: Any = None


class ModelRunner:
    """Everything that lives on the device.

    Args:
        model: the decoder, its weights in place.  num_blocks: of the pool, the null block included.
        max_model_len: tokens a sequence may hold; sizes the block tables.  kv_dtype: of the pool.
    Attributes:
        pool: the KV cache.  logits_room: [most samples, V] for every step's logits on a GPU; empty elsewhere.
    """

    def __init__(self, model: Decoder, shape: ModelShape, *, num_blocks: int, block_size: int, max_rows: int,
                 max_model_len: int, kv_dtype: torch.dtype, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.pool = torch.zeros(num_blocks, shape.layers_per_block, 2, shape.num_kv_heads, block_size, shape.head_dim,
                                dtype=kv_dtype, device=device)
        self._kv = (self.pool,) * len(shape.kv_groups)
        self._rows = Rows(max_rows + 1, -(-max_model_len // block_size), len(shape.kv_groups), device)  # one row pads
        self._inputs = InputBuilder(self._rows, shape.kv_groups, block_size)
        self._state = SamplingState(max_rows, shape.vocab_size, device)
        self._sampler = Sampler(self._state)
        self._owners: dict[int, sequence.Sequence] = {}
        rooms = (logit_rows(max_rows), shape.vocab_size)
        on_gpu = device.type == "cuda"
        self.logits_room = torch.empty(rooms if on_gpu else (0, 0), dtype=model.dtype, device=device)
        self._graphs = StepGraphs(self._inputs, self._logits, pad_row=max_rows, max_model_len=max_model_len, device=device)

    @torch.inference_mode()
    def compile_ahead(self, max_tokens: int, report: Report) -> None:
        """On a GPU: compile what steps launch, in parallel, those of any length included that a graph never sees.

        report: called with (kernels compiled, kernels in all).
        """
        from workstation.kernels.ahead import compiling_ahead  # a CPU install may lack Triton

        prompts = graph_prompts(self.model.shape, max_tokens)
        *others, largest = uncaptured_shapes(self._state.max_rows, prompts, max_tokens)
        # Attention's kernels go by the longest chunk and context, each with one threshold: the ends choose all there are.
        ends = itertools.product((1, largest.tokens), (1, None))
        steps = [self._graphs.idle(shape) for shape in [*self._shapes(max_tokens), *others]]
        steps += [self._graphs.idle(largest, *bounds) for bounds in ends]
        model = self.model.sample_of_layers()
        with compiling_ahead(min(os.cpu_count() or 1, MOST_COMPILERS), report):
            self._sampler.prepare(self.model.dtype)
            while steps:  # and drop each with what its attention was planned with
                inputs = steps.pop()
                hidden = _wanted(model.forward(inputs, self._kv), inputs)
                model.logits(hidden, self.logits_room[:len(hidden)])

    @torch.inference_mode()
    def warm_up(self, max_tokens: int) -> None:
        """On a GPU: run the largest step, of max_tokens that are nobody's: what such steps need is compiled and allocated."""
        self._sampler.prepare(self.model.dtype)
        self._graphs.run(largest_shape(self._state.max_rows, max_tokens), self.logits_room)
        torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def capture(self, max_tokens: int, report: Report) -> None:
        """Capture CUDA graphs of steps up to a budget of max_tokens; without this every step runs kernel by kernel.

        report: called with (shapes done, shapes in all).
        """
        self._graphs.capture(self._shapes(max_tokens), self.logits_room, report)

    def _shapes(self, max_tokens: int) -> list[Shape]:
        return graph_shapes(self._state.max_rows, graph_prompts(self.model.shape, max_tokens))

    def _logits(self, inputs: InputTensors, out: torch.Tensor | None) -> torch.Tensor:
        return self.model.logits(_wanted(self.model.forward(inputs, self._kv), inputs), out)

    @torch.inference_mode()
    def launch(self, batch: Batch, masks: Masks | None = None) -> Step:
        """Start a step; its results are fetched by `collect`.

        masks: asked when the forward pass is under way, for what its samples may be; it may wait for the step before.

        Raises torch.OutOfMemoryError: nothing of the step counts; call `forget`.
        """
        self._own_rows(batch.samples)
        self._copy(batch.copies)
        self._inputs.update_tables(batch)
        packed = pack(batch)
        shape = self._graphs.choose(packed)
        if shape is not None and _suits_graphs(batch, every=shape.chunks == 0):
            logits, rows, positions = self._graphs.replay(shape, packed, self._inputs.samples(batch))
            step = self._sample(batch, logits, rows, positions, [], masks) if batch.samples else self._unsampled(batch)
            return self._download(step)
        tensors = self._inputs.build(batch, packed)
        hidden = self.model.forward(tensors.model, self._kv)
        prompts = self._prompt_logprobs(batch, hidden)
        if batch.samples:
            room = self.logits_room[:len(batch.samples)] if self.device.type == "cuda" else None
            logits = self.model.logits(_wanted(hidden, tensors.model), room)
            step = self._sample(batch, logits, tensors.sample_rows, tensors.sample_positions, prompts, masks)
        else:
            step = self._unsampled(batch, prompts)
        step.pooled = _pooled(batch, hidden)
        return self._download(step)

    def forget(self, batch: Batch) -> None:
        """After `launch` ran out of memory: drop what it left half done, and give the device's spare memory back."""
        for sample in batch.samples:
            self._owners.pop(sample.row, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def collect(self, step: Step) -> StepResult:
        """Wait for a step and bring its results into plain Python."""
        if step.ready is not None:
            step.ready.synchronize()
        logprobs: list[TokenLogprobs | None] = [None] * len(step.batch.samples)
        tokens: list[int] = step.tokens.tolist()
        finite: list[bool] = step.finite.tolist()
        if step.logprobs is not None:
            _read_logprobs(step, step.logprobs, tokens, logprobs)
        for place, (values, ids) in step.beams.items():
            logprobs[place] = TokenLogprobs([tokens[place], *ids[0].tolist()], [0.0, *values[0].tolist()], 1)
        prompts = {item.chunk: _prompt_rows(item, step.batch) for item in step.prompts}
        pooled = dict(zip(step.pooled.chunks, step.pooled.hidden.numpy(), strict=True)) if step.pooled is not None else {}
        return StepResult(tokens, finite, logprobs, prompts, pooled)

    # ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _own_rows(self, samples: Sequence[Sample]) -> None:
        """Give rows that changed hands their new owner's sampling rules, and upload the changes."""
        for sample in samples:
            seq = sample.seq
            request = seq.request.request
            if self._owners.get(sample.row) is not seq:
                self._owners[sample.row] = seq
                prompt_len = seq.request.prompt_len
                params = request.params if request.beam is None else _GREEDY
                stops = seq.request.stop_ids if seq.matcher is None else request.params.stop_token_ids  # a mask holds EOS
                self._state.set_row(sample.row, params, seq.seed, seq.index, request.prompt_token_ids,
                                    seq.tokens[prompt_len:], sorted(stops))
            if seq.request.needs_host_tokens and request.beam is None:
                self._state.set_banned(sample.row, banned_next(request.params.bad_word_ids,
                                                               seq.tokens[seq.request.prompt_len:]))
        self._state.flush()

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks before they are written. A block may be read by one copy and overwritten by a later one."""
        while copies:
            sources: set[int] = set()
            count = 0
            for source, target in copies:
                if target in sources:
                    break
                sources.add(source)
                count += 1
            pairs = to_device(np.array(copies[:count], dtype=np.int64), self.device)
            ops.copy_blocks(self.pool, pairs[:, 0].contiguous(), pairs[:, 1].contiguous())
            copies = copies[count:]

    # ── sampling ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _sample(self, batch: Batch, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor,
                prompts: list[_PromptRows], masks: Masks | None) -> Step:
        samples = batch.samples
        steps = [sample.position - sample.seq.request.prompt_len for sample in samples]
        output = self._sampler.sample(logits, [sample.row for sample in samples], rows, positions, steps, self._rows.last_token,
                                      masks() if masks is not None else None)
        step = Step(batch, output.tokens, output.finite, output.logprobs, prompts=prompts)
        for place, sample in enumerate(samples):
            beam = sample.seq.request.request.beam
            if beam is not None:
                count = min(2 * beam.beam_width, logits.shape[1])
                scale = beam.temperature if beam.temperature > 0.0 else 1.0
                step.beams[place] = top_logprobs(logits[place:place + 1].float() / scale, count)
        return step

    def _unsampled(self, batch: Batch, prompts: list[_PromptRows] | None = None) -> Step:
        empty = torch.empty(0, dtype=torch.int64, device=self.device)
        return Step(batch, empty, empty.bool(), prompts=prompts or [])

    def _prompt_logprobs(self, batch: Batch, hidden: torch.Tensor) -> list[_PromptRows]:
        found: list[_PromptRows] = []
        first = 0
        for number, chunk in enumerate(batch.chunks):
            wanted = chunk.seq.request.request.params.prompt_logprobs
            if wanted is not None:
                targets = _prompt_targets(chunk)
                if targets:
                    found.append(_PromptRows(number, targets, self._score(hidden[first:first + len(targets)], targets, wanted)))
            first += chunk.count
        return found

    def _score(self, hidden: torch.Tensor, targets: list[int], wanted: int) -> list[tuple[torch.Tensor, ...]]:
        ids = to_device(np.array(targets, dtype=np.int64), self.device)
        cuts = [slice(at, at + PROMPT_LOGPROB_ROWS) for at in range(0, len(targets), PROMPT_LOGPROB_ROWS)]
        return [prompt_logprobs(self.model.logits(hidden[cut]), ids[cut], wanted) for cut in cuts]

    def _download(self, step: Step) -> Step:
        if self.device.type != "cuda":
            return step
        step.tokens, step.finite = to_host(step.tokens), to_host(step.finite)
        if step.logprobs is not None:
            for name in ("chosen", "top_values", "top_ids", "ranks"):
                setattr(step.logprobs, name, to_host(getattr(step.logprobs, name)))
        step.beams = {place: (to_host(values), to_host(ids)) for place, (values, ids) in step.beams.items()}
        for item in step.prompts:
            item.parts = [tuple(map(to_host, part)) for part in item.parts]
        if step.pooled is not None:
            step.pooled.hidden = to_host(step.pooled.hidden)
        step.ready = record_event()
        return step


def _wanted(hidden: torch.Tensor, inputs: InputTensors) -> torch.Tensor:
    """The rows of hidden [T, H] that need logits."""
    return hidden if inputs.logits_indices is None else hidden.index_select(0, inputs.logits_indices)


def _suits_graphs(batch: Batch, *, every: bool) -> bool:
    """No chunk is sampled twice (with `every`: each once, in order), and nobody asks for more than logits."""
    chunks = [sample.chunk for sample in batch.samples]
    once = chunks == list(range(len(batch.chunks))) if every else len(set(chunks)) == len(chunks)
    return once and not any(chunk.seq.request.reads_hidden for chunk in batch.chunks)


def _pooled(batch: Batch, hidden: torch.Tensor) -> _Pooled | None:
    """What requests with pooling want of hidden [T, H]: see `StepResult.pooled`."""
    numbers, rows, first = [], [], 0
    for number, chunk in enumerate(batch.chunks):
        pooling = chunk.seq.request.request.pooling
        if pooling == "mean":
            numbers.append(number)
            rows.append(hidden[first:first + chunk.count].sum(0, dtype=torch.float32))
        elif pooling == "last" and chunk.ends_prompt:
            numbers.append(number)
            rows.append(hidden[first + chunk.count - 1].float())
        first += chunk.count
    return _Pooled(numbers, torch.stack(rows)) if rows else None


def _prompt_targets(chunk: Chunk) -> list[int]:
    """The prompt tokens that follow the chunk's tokens."""
    prompt = chunk.seq.request.request.prompt_token_ids
    return prompt[chunk.start + 1:chunk.start + 1 + chunk.count]


def _prompt_rows(item: _PromptRows, batch: Batch) -> list[TokenLogprobs]:
    wanted = batch.chunks[item.chunk].seq.request.request.params.prompt_logprobs or 0
    rows: list[TokenLogprobs] = []
    for chosen, values, ids, ranks in item.parts:
        for target, given, tops, names, rank in zip(item.targets[len(rows):], chosen.tolist(), values.tolist(),
                                                    ids.tolist(), ranks.tolist(), strict=False):
            rows.append(TokenLogprobs([target, *names[:wanted]], [given, *tops[:wanted]], rank))
    return rows


def _read_logprobs(step: Step, found: SampleLogprobs, tokens: list[int], into: list[TokenLogprobs | None]) -> None:
    for place, chosen, values, ids, rank in zip(found.places, found.chosen.tolist(), found.top_values.tolist(),
                                                found.top_ids.tolist(), found.ranks.tolist(), strict=True):
        wanted = step.batch.samples[place].seq.request.request.params.logprobs or 0
        into[place] = TokenLogprobs([tokens[place], *ids[:wanted]], [chosen, *values[:wanted]], rank)
