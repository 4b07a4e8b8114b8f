"""The masks of a step: which tokens the grammars of its samples allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from workstation.engine.batch import Sample
from workstation.grammar.matcher import Bits, Matcher

Fill = Callable[[Sequence[Matcher], Bits, Sequence[bool]], None]
ALIGNED = 4  # int32: a mask begins at 16 bytes, for kernels are compiled for the alignment they meet


@dataclass(slots=True)
class TokenMasks:
    """bits: [M, words] int32, bit i % 32 of word i // 32 for token i.  index: [L] int32: a sample's mask, or -1."""

    bits: torch.Tensor
    index: torch.Tensor

    def of(self, cut: slice) -> TokenMasks:
        """Those of some of the samples."""
        return TokenMasks(self.bits, self.index[cut])


def waits_for_tokens(samples: Sequence[Sample]) -> bool:
    """Whether a mask depends on a token that is still on the device."""
    return any(sample.seq.matcher is not None and sample.seq.pending > 1 for sample in samples)


def token_masks(samples: Sequence[Sample], device: torch.device, fill: Fill) -> TokenMasks | None:
    """What may be sampled now, uploaded without waiting; None when no sample has a grammar."""
    bound = [(place, sample, sample.seq.matcher) for place, sample in enumerate(samples)
             if sample.seq.matcher is not None and sample.seq.finished is None]
    if not bound:
        return None
    words = bound[0][2].words
    head = -(-len(samples) // ALIGNED) * ALIGNED
    packed = torch.empty(head + len(bound) * words, dtype=torch.int32, pin_memory=device.type == "cuda")
    array = packed.numpy()
    array[:head] = -1
    bits = array[head:].reshape(len(bound), words)
    array[[place for place, _, _ in bound]] = range(len(bound))
    fill([matcher for _, _, matcher in bound], bits, [_holds_end(sample) for _, sample, _ in bound])
    sent = packed.to(device, non_blocking=True)  # torch keeps the pinned memory until the device has read it
    return TokenMasks(sent[head:].view(len(bound), words), sent[:len(samples)])


def _holds_end(sample: Sample) -> bool:
    params = sample.seq.request.request.params
    return params.ignore_eos or sample.position - sample.seq.request.prompt_len < params.min_tokens
