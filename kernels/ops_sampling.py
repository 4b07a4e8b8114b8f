"""The door to sampling's kernels, as `ops.py` is to the model's: checks, then Triton (CUDA) or a plain-torch twin."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from workstation.kernels import reference
from workstation.kernels.door import FORCE_TRITON, check

if TYPE_CHECKING:
    from workstation.kernels.launch_sampling import Room


@cache
def _sampling() -> Any:
    from workstation.kernels import launch_sampling

    return launch_sampling


def samples(logits: torch.Tensor) -> bool:
    """Whether `sample` serves these logits; their twin is the sampler's own path over `engine/sampling_math.py`."""
    return logits.is_cuda or FORCE_TRITON


def sampling_room(width: int, device: torch.device) -> Room:
    """Scratch for `sample`: one a sampler, for logits [·, width]."""
    return _sampling().Room(width, device)  # type: ignore[no-any-return]


def prepare_sampling(dtype: torch.dtype, table: torch.Tensor, room: Room) -> None:
    """Compile what `sample` may need for logits of this dtype and for adjusted float32 copies of them."""
    _sampling().prepare(dtype, table, room)


def sample(
    logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, room: Room,
    last_token: torch.Tensor | None = None, *, filtered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row: greedy, or drawn by inverse CDF after min_p, top_k and top_p (over what top_k left), ties kept.

    Args:
        logits: [L, V] float32, bfloat16 or float16, a row contiguous; not changed.
        rows, positions: [L] int64, rows distinct. The row's key and the position decide the uniform number.
        table: [R, ≥ 5] int64: key, top_k (0: all), and the bits of float64: 1 / temperature (0: greedy), top_p, min_p.
        room: from `sampling_room`, for V.  last_token: [R] int64; gets the tokens at `rows`.
        filtered: some row has top_k or top_p: three launches instead of one.
    Returns:
        tokens [L] int64 (0 where not finite), finite [L] bool: False for rows with NaN or +inf or nothing but -inf.
    """
    check(logits.shape[1] == room.width and logits.stride(1) == 1, "logits", logits, "must be [L, V] for the room's V")
    check(rows.shape == positions.shape == logits.shape[:1], "rows", rows, "and positions must be [L]")
    return _sampling().sample(  # type: ignore[no-any-return]
        logits, rows, positions, table, room, last_token, filtered=filtered
    )


def mask_tokens(logits: torch.Tensor, bits: torch.Tensor, index: torch.Tensor) -> None:
    """Set logits of tokens that may not follow to -inf, in place. NaN and +inf stay, for a mask must hide no broken model.

    Args:
        logits: [L, V] float32, bfloat16 or float16, a row contiguous.
        bits: [M, W] int32, contiguous: token i of a mask is allowed where bit i % 32 of word i // 32 is set; ids beyond the
            words are not.
        index: [L] int32: each row's mask, -1 for none.
    """
    check(logits.dim() == 2 and logits.stride(1) == 1, "logits", logits, "must be [L, V] with contiguous rows")
    check(bits.dim() == 2 and bits.dtype == torch.int32 and bits.is_contiguous(), "bits", bits, "must be [M, W] int32")
    check(index.shape == logits.shape[:1] and index.dtype == torch.int32, "index", index, "must be [L] int32")
    if logits.is_cuda or FORCE_TRITON:
        _sampling().mask_tokens(logits, bits, index)
    else:
        reference.mask_tokens(logits, bits, index)
