"""16- and 32-bit weights → FP8 with one scale a row: scale[n] = max_k |w[n, k]| / 448, q = w / scale, rounded to nearest."""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
CHUNK_ELEMENTS = 1 << 22


def quantise_rows(weight: torch.Tensor, quantised: torch.Tensor, scale: torch.Tensor) -> None:
    """Quantise a matrix row by row into given tensors, a few rows at a time, so that float32 temporaries stay small.

    Args:
        weight: [N, K] float32, bfloat16 or float16.  quantised: [N, K] float8_e4m3fn.  scale: [N] float32.

    A row of zeros gets the scale 1. A row that holds a value which is not finite gets a scale which is not finite.
    """
    rows = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = weight[start:start + rows].float()
        factor = part.abs().amax(1) / FP8_MAX
        factor[factor == 0] = 1.0
        scale[start:start + rows] = factor
        quantised[start:start + rows] = (part / factor[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
