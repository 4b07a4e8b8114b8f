"""How far a model's next-token distributions are from those of the same model in another form, on the same tokens.

Both read the true text so far (teacher forcing). Over a number of positions, p the reference's distribution, q the other's:

    perplexity  exp(mean −ln q(next token))          divergence  mean Σ p · (ln p − ln q), in nats (Kullback and Leibler 1951)
    agreement   share of positions at which both give the same token the highest probability

A prompt is not what a model was taught to write: its tokens are hard to foresee, so that small differences show there, and tell
little about answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from workstation.architecture import ModelShape
from workstation.engine.engine import Engine
from workstation.kernels.paging import AttentionPlan
from workstation.model.inputs import InputTensors
from workstation.model.transformer import Decoder
from workstation.quant.forms import HEAD_MODULE, WeightForms, all_linears, weight_bytes

STEP_TOKENS = 4096
LOGIT_ELEMENTS = 1 << 26  # computed at a time, for the model and for the reference


@dataclass(frozen=True, slots=True)
class Document:
    """tokens: at least two.  first: the first of them that belongs to the answer, at least 1: tokens[0] is only read."""

    tokens: list[int]
    first: int = 1


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Of `tokens` positions in answers; `everywhere` is the divergence over prompts as well. None for the reference itself."""

    tokens: int
    perplexity: float
    divergence: float | None = None
    agreement: float | None = None
    everywhere: float | None = None


@torch.inference_mode()
def final_states(engine: Engine, documents: Sequence[Document]) -> list[torch.Tensor]:
    """What the head makes logits of, a document each: [tokens − 1, H] on the CPU, in the model's dtype.

    The engine must be idle. Its pool is left alone: keys and values go into one of a step's size, of the pool's dtype.
    """
    model, states = engine.model, []
    for batch in _batches(documents):
        inputs, kv = _step(model, batch, engine.kv_dtype)
        hidden = model.forward(inputs, kv)
        states += [rows[:-1].cpu() for rows in torch.split(hidden, [len(document.tokens) for document in batch])]
    return states


@torch.inference_mode()
def fidelity(
    engine: Engine, documents: Sequence[Document], states: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor] | None = None,
) -> Fidelity:
    """Compare `states` of the documents with a reference's. The head, which no form changes, makes logits of both."""
    sums, answers, total = torch.zeros(4, dtype=torch.float64), 0, 0
    for number, (document, found) in enumerate(zip(documents, states, strict=True)):
        total += len(found)
        answers += len(document.tokens) - document.first
        sums += _sums(engine.model, document, found, None if reference is None else reference[number])
    loss, divergence, agreed, everywhere = sums.tolist()
    perplexity = math.exp(loss / answers)
    if reference is None:
        return Fidelity(answers, perplexity)
    return Fidelity(answers, perplexity, divergence / answers, agreed / answers, everywhere / total)


def _sums(model: Decoder, document: Document, found: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
    """[4] over a document: loss, divergence and agreement in the answer, divergence everywhere."""
    targets = torch.tensor(document.tokens[1:], device=model.device)
    answer = torch.arange(1, len(document.tokens), device=model.device) >= document.first
    rows = max(1, LOGIT_ELEMENTS // model.shape.vocab_size)
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        ours = _log_probabilities(model, found[part])
        values = [-ours.gather(1, targets[part, None])[:, 0] * answer[part]]
        if reference is not None:
            theirs = _log_probabilities(model, reference[part])
            divergence = (theirs.exp() * (theirs - ours)).sum(1)
            values += [divergence * answer[part], (theirs.argmax(1) == ours.argmax(1)) & answer[part], divergence]
        for place, value in enumerate(values):
            sums[place] += float(value.sum(dtype=torch.float64))
    return sums


def bytes_per_weight(shape: ModelShape, forms: WeightForms) -> float:
    """Of the linear layers without the head, scales included; layers that are not quantised count two bytes."""
    weights = sum(linear.out_features * linear.in_features for linear in all_linears(shape)
                  if linear.parts[0][0] != HEAD_MODULE)
    return 2 + (weight_bytes(shape, 2, forms) - weight_bytes(shape, 2)) / weights


def _log_probabilities(model: Decoder, states: torch.Tensor) -> torch.Tensor:
    return model.logits(states.to(model.device)).float().log_softmax(-1)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in order, together at most STEP_TOKENS long unless one alone is longer."""
    batch: list[Document] = []
    for document in documents:
        if batch and sum(len(item.tokens) for item in batch) + len(document.tokens) > STEP_TOKENS:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def _step(model: Decoder, batch: list[Document], kv_dtype: torch.dtype) -> tuple[InputTensors, tuple[torch.Tensor, ...]]:
    """One step that computes whole documents, each with blocks of its own in every KV group, and the pool for it."""
    shape, size = model.shape, 16
    lengths = torch.tensor([len(document.tokens) for document in batch])
    widths = (lengths + size - 1) // size
    firsts = 1 + widths.cumsum(0) - widths  # block 0 stays the null block
    tables = firsts[:, None] + torch.arange(int(widths.max()))
    positions = torch.cat([torch.arange(int(length)) for length in lengths])
    owners = torch.arange(len(batch)).repeat_interleave(lengths)
    groups, blocks = shape.kv_groups, int(widths.sum())

    def on_device(tensor: torch.Tensor, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return tensor.to(model.device, dtype)

    plans, slots = [], []
    for number, group in enumerate(groups):
        table = tables + number * blocks
        slots.append(on_device(table[owners, positions // size] * size + positions % size))
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        plans.append(AttentionPlan(
            query_start=on_device(starts, torch.int32), context_lens=on_device(lengths, torch.int32),
            tables=on_device(table, torch.int32), rows=on_device(torch.arange(len(batch)), torch.int32), num_decodes=0,
            max_query_len=int(lengths.max()), max_context_len=int(lengths.max()), window=group.window, block_size=size))
    tokens = torch.tensor([token for document in batch for token in document.tokens])
    pool = torch.zeros(1 + blocks * len(groups), shape.layers_per_block, 2, shape.num_kv_heads, size, shape.head_dim,
                       dtype=kv_dtype, device=model.device)
    return InputTensors(on_device(tokens), on_device(positions), tuple(slots), tuple(plans), None), (pool,) * len(groups)
