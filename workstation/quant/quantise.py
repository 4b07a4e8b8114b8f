"""16- and 32-bit weights → FP8 or integers.

FP8 has one scale a row: scale[n] = max_k |w[n, k]| / 448, q = w / scale, rounded to nearest.
Integers have one a group of columns.

Scales are rounded to bfloat16 before the codes are found. Readers of a written folder keep scales in the model's type: so
they lose nothing, where a scale rounded afterwards would move its whole row.
"""

from __future__ import annotations

import torch

from workstation.kernels.int_weights import pack

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
CHUNK_ELEMENTS = 1 << 22


def quantise_rows(weight: torch.Tensor, quantised: torch.Tensor, scale: torch.Tensor) -> None:
    """Quantise a matrix row by row into given tensors, a few rows at a time, so that float32 temporaries stay small.

    Args:
        weight: [N, K] float32, bfloat16 or float16.  quantised: [N, K] float8_e4m3fn.
        scale: [N] float32, filled with values that bfloat16 holds.

    A row of zeros gets the scale 1. A row that holds a value which is not finite gets a scale which is not finite.
    """
    rows = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = weight[start:start + rows].float()
        factor = _usable(part.abs().amax(1) / FP8_MAX, torch.bfloat16)
        scale[start:start + rows] = factor
        quantised[start:start + rows] = (part / factor[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


# Shares of the range that a group's scale may give up at its ends, so that the values inside are closer.
SHRINKS = tuple(1.0 - 0.025 * step for step in range(15))


def quantise_groups(weight: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, bits: int) -> None:
    """Quantise a matrix to symmetric integers with a scale a group, into given tensors, a few rows at a time.

    Args:
        weight: [N, K] float32, bfloat16 or float16.  words: [N, W] int16 (`kernels.int_weights`).
        scale: [G, N], G a divisor of K.  bits: 8 rounds to nearest; 4 searches each group's scale.

    A group of zeros gets the scale 1. A group that holds a value which is not finite gets a scale which is not finite.
    """
    rows = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        values = weight[part].float().view(-1, scale.shape[0], weight.shape[1] // scale.shape[0])
        found = _nearest(values, bits, scale.dtype) if bits == 8 else search_scale(values, bits, scale.dtype)
        codes = signed_codes(values, found, bits) + (1 << bits - 1)
        words[part] = pack(codes.to(torch.uint8).flatten(1), bits)
        scale[:, part] = found.squeeze(2).t().to(scale.dtype)


def search_scale(
    values: torch.Tensor, bits: int, dtype: torch.dtype, importance: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """The scales, [N, G, 1] float32 with values of `dtype`, of least squared error for values [N, G, size].

    importance: [size], what an error counts in each column of a group.

    Tried are scales that put the value of largest magnitude on the outermost code of its sign or a little beyond, and for
    each of them the scale that fits its codes best: Σ w·q / Σ q². Only what `dtype` can hold counts.
    """
    largest = values.gather(2, values.abs().argmax(2, keepdim=True))
    # The range has one more code below zero than above: a group whose largest value is positive is mirrored into it.
    bottom = -float(1 << bits - 1)
    best = _usable(largest / bottom, dtype)
    least = _error(values, best, bits, importance)
    for shrink in SHRINKS:
        for outermost in (bottom, bottom + 1):
            tried = _round(largest * (shrink / outermost), dtype)
            codes = signed_codes(values, tried, bits)
            counted = codes * importance
            fitted = _round((values * counted).sum(2, keepdim=True) / (codes * counted).sum(2, keepdim=True), dtype)
            for candidate in (tried, fitted):
                error = _error(values, candidate, bits, importance)
                better = error < least
                best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


def _nearest(values: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    return _usable(values.abs().amax(2, keepdim=True) / ((1 << bits - 1) - 1), dtype)


def _usable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded, and 1 where nothing is left to scale."""
    rounded = _round(scale, dtype)
    return torch.where(rounded == 0, 1.0, rounded)


def signed_codes(values: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes as float32."""
    half = 1 << bits - 1
    return (values / scale).round_().clamp_(-half, half - 1)


def _error(values: torch.Tensor, scale: torch.Tensor, bits: int, importance: torch.Tensor | float) -> torch.Tensor:
    return ((signed_codes(values, scale, bits) * scale - values).square() * importance).sum(2, keepdim=True)


def _round(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return scale.to(dtype).float()
