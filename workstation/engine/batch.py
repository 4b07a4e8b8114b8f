"""Batch: what one step computes, as the scheduler decided it. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from workstation.engine.request import TokenLogprobs
from workstation.engine.sequence import Sequence


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start + count) of one sequence, computed in this step. count is 1 for a decode.

    `pending` says that the last of them is still on the device (sampled by the step before).
    `table_updates` are the (group, entry, block) changes to upload before the step.
    """

    seq: Sequence
    row: int
    start: int
    count: int
    pending: bool
    table_updates: list[tuple[int, int, int]]

    @property
    def ends_prompt(self) -> bool:
        return self.start < self.seq.request.prompt_len <= self.start + self.count


@dataclass(slots=True)
class Sample:
    """One token to sample, from the logits of chunk number `chunk`. Forked samples share a chunk.

    `position` is the new token's place in its sequence.
    """

    seq: Sequence
    row: int
    chunk: int
    position: int


@dataclass(slots=True)
class Batch:
    """One step.

    Attributes:
        chunks: the decodes (one token each) first, then the chunks of prompts.
        samples: in the order of their chunks.  copies: (source, target) blocks to copy before the step.
        num_prompt_tokens: of num_tokens, those that belong to prompts.
    """

    chunks: list[Chunk] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt_tokens: int = 0


@dataclass(slots=True)
class StepResult:
    """What a step gave, on the host; lists run parallel to Batch.samples.

    Attributes:
        tokens: sampled ids.  finite: False where the logits held NaN or +Inf.
        logprobs: an entry where the sample asked for them, else None.
        prompt_logprobs: by chunk number, one entry a prompt token whose successor is a prompt token.
        pooled: by chunk number, [H] float32: the sum of the hidden states of a chunk whose mean is wanted, or the last one of a
            prompt whose last one is.
    """

    tokens: list[int]
    finite: list[bool]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    pooled: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
