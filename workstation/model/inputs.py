"""One step's inputs to a model: tensors on the device, passed down, never global."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workstation.kernels.paging import AttentionPlan


@dataclass(slots=True)
class InputTensors:
    """The tokens of a step, flat: first every decode (one token a sequence), then the prefill chunks.

    Attributes:
        token_ids: [T] int64, each below the embedding's rows.
        positions: [T] int64, place of the token in its sequence.
        slots: per KV group [T] int64, flat slot `block * block_size + offset` the token's K and V go to.
        plans: per KV group, what attention needs (block tables, lengths), made once a step and read by every layer.
        logits_indices: [L] int64, which of the T tokens need logits; None: all of them.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: tuple[torch.Tensor, ...]
    plans: tuple[AttentionPlan, ...]
    logits_indices: torch.Tensor | None
