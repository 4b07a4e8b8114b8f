"""Activations that are rounded to FP8 on their way to a product."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rounding(NamedTuple):
    """One scale a token, max |x| / 448. bound: the largest value a scale is made from; what lies beyond it saturates."""

    bound: float = float("inf")


class Quantized(NamedTuple):
    """`x ≈ values * scale[:, None]`.

    values: [T, K] float8_e4m3fn.  scale: [T] float32.  dtype: x's own, which the product returns.
    """

    values: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype

    def tokens(self, first: int, count: int) -> Quantized:
        """Tokens [first, first + count), without a copy."""
        return Quantized(self.values[first : first + count], self.scale[first : first + count], self.dtype)


# What a product may be given.
Operand = torch.Tensor | Quantized
