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
from workstation.model.transformer import Decoder
from workstation.model.whole_step import whole_step
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
        inputs, kv = whole_step(model.shape, [document.tokens for document in batch], engine.kv_dtype, model.device)
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
